"""The claims of the post, measured."""
