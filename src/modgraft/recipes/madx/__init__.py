"""MAD-X: language and task adapters, stacked, on a host that speaks many languages."""
