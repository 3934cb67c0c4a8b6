"""A table on the terminal, or as Markdown for a page of the documentation."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show(table: Table, markdown: bool = False) -> None:
    """Print ``table``."""
    if not markdown:
        Console(width=150).print(table)
        return
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [[column.header for column in table.columns], marks, *rows]
    print(f"{table.title}\n")
    print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))
