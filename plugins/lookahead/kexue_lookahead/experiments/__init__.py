"""The claims of post 6869 and of the paper, measured."""
