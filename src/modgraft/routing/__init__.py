"""Routing functions: which modules act, and how strongly."""
