"""Training procedures that methods and papers bring: tickets, gates, prefixes, task by task."""
