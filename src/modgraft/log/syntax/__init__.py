"""What stands in a note: blocks, citations, events, and what is wrong with them."""
