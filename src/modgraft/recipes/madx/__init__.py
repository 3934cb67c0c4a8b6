"""MAD-X: language and task adapters, stacked on a multilingual host."""
