"""The index of the notes: a database that can always be built again from them."""
