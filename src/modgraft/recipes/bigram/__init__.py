"""The simplest language model: a table of what follows each token."""
