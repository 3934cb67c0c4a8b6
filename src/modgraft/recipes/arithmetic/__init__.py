"""Task arithmetic: modules of skills, added and subtracted."""
