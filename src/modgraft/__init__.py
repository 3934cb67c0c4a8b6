"""modgraft: implant, compose, train and share modules in a frozen host model."""
