"""FLAN against modules: one model for all tasks, or a module for each."""
