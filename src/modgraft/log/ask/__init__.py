"""Questions to the log: read, looked up, answered with the lines that say so."""
