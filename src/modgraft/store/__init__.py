"""Folders that modules are kept in and travel in."""
