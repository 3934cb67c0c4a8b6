"""What the notes say, in a database that can always be made again from them."""
