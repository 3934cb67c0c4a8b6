"""The host: a model, the modules implanted in it, and their compositions."""
