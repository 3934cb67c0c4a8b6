"""The research log's former name."""

raise ImportError("modgraft.trajectory is modgraft.log now: from modgraft.log import Log")
