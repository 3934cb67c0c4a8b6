"""Questions to the log: parsed, looked up, and answered with the lines that support the answer."""
