"""What the post claims, measured on small models."""
