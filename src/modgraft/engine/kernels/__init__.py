"""One layer with its modules, computed fast and exactly."""
