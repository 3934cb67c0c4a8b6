"""The syntax of a note: blocks, citations, events, and their problems."""
