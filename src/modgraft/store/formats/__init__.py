"""Folders of other tools, each format in a file of its own."""
