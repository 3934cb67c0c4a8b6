"""One model of all tasks against a module for each."""
