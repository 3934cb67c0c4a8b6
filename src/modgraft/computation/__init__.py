"""Computation functions: what a module does at a site, one file a method."""
