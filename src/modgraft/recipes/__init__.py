"""Recipes: each a page, the idea and nothing else, on top of the library."""
