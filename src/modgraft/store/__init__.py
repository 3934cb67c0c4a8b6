"""Modules in folders: saving and loading them."""
