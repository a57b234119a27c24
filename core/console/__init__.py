"""The terminal: what commands are made of, and how results look."""
