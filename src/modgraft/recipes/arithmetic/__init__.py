"""Arithmetic with modules: add what a model should do, subtract what it should not."""
