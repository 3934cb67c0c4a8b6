"""What the benchmarks' pretrained host is asked: which part of the library a docstring describes.

The host is all-MiniLM-L6-v2 (:mod:`modgraft.models.minilm`), the task that of
:mod:`modgraft.data.library_topics`.

    python -m benchmarks.minilm         # sizes, and a few examples
"""

from __future__ import annotations

import platform
from functools import partial

from rich.console import Console
from rich.table import Table

from modgraft.data.library_topics import NAMES, majority, split
from modgraft.models import minilm

classifier = partial(minilm.classifier, len(NAMES))


def main() -> None:
    """The sizes of the task, and an example of each class."""
    parts = split()
    table = Table(title=f"docstrings of Python {platform.python_version()}")
    for title in ("class", *parts, "an example of validation"):
        table.add_column(title, justify="left" if title[0] in "ca" else "right")
    for label, name in enumerate(NAMES):
        counts = [str(sum(e.label == label for e in rows)) for rows in parts.values()]
        shown = next(e for e in parts["validation"] if e.label == label)
        table.add_row(name, *counts, shown.text[:90])
    rates = [f"{majority(rows):.1%}" for rows in parts.values()]
    table.add_row("all", *(str(len(rows)) for rows in parts.values()), "")
    table.add_row("commonest class", *rates, "")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
