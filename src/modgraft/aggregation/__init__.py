"""Aggregation functions: how the results of the modules that act become one."""

from modgraft.aggregation import base, representation

__all__ = ["base", "representation"]
