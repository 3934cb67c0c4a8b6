"""Sweeps: a run repeated over settings and seeds."""
