"""Merging: several modules become one module, several checkpoints one checkpoint."""
