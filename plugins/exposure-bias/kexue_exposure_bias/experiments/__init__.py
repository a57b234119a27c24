"""What post 7259 claims of exposure bias and of what helps against it, measured."""
