"""What post 7533 and the papers claim, measured on data that needs no download."""

__all__: list[str] = []
