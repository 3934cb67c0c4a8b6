"""How a batch goes through the modules: graft, run, plan, apply. README.md draws the way."""
