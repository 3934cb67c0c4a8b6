"""Computation functions: what a module does at a site."""
