"""Report a run: a self-contained HTML page, its figures, and tables."""

from __future__ import annotations

from modgraft.report.continual import continual_figure, continual_table
from modgraft.report.page import write
from modgraft.report.routing import routing_figure, routing_table
from modgraft.report.run import read_results
from modgraft.report.table import families, insert, table

__all__ = [
    "continual_figure",
    "continual_table",
    "families",
    "insert",
    "read_results",
    "routing_figure",
    "routing_table",
    "table",
    "write",
]
