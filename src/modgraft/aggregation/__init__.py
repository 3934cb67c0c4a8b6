"""Aggregation functions: how the results of several modules become one."""
