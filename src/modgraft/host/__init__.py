"""The host: a model, the modules implanted in it, and what is composed of them."""
