"""Show the results of continual learning, as a table in the terminal and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure as Canvas
from rich.markup import escape

from modgraft.core.errors import ModgraftError
from modgraft.core.tables import Table
from modgraft.report.figures import Picture, Scheme, draw, heat_map
from modgraft.report.table import terminal_table

if TYPE_CHECKING:  # the report is written without torch
    from modgraft.training.procedures.continual import Continual

START = "before any"


def continual_table(record: Continual, title: str = "Accuracy in percent") -> Table:
    """Return a table with a row after each task and a column for each task, then their mean.

    Args:
        record: The result of :func:`modgraft.continual`.
        title: The table's title.
    """
    table = terminal_table(title, "after", (*record.tasks, "mean"))
    for name, row in zip((START, *record.tasks), (record.start, *record.matrix), strict=True):
        values = [*row, sum(row) / len(row)]
        table.add_row(escape(name), *(f"{100 * value:.1f}" for value in values))
    table.caption = (
        f"in the end {100 * record.accuracy:.1f}; forgetting {100 * record.forgetting:.1f}, "
        f"backward transfer {100 * record.backward_transfer:+.1f}, forward transfer "
        f"{100 * record.forward_transfer:+.1f}"
    )
    return table


def continual_figure(records: Mapping[str, Continual]) -> Picture:
    """Draw the accuracy matrix R of each record as a heat map, side by side.

    Rows are the moments after each task, columns the tasks.

    Args:
        records: Title → record; all are of the same tasks.

    Returns:
        PNG bytes for light and dark pages.

    Raises:
        ModgraftError: There is no record, or the records are of different tasks.
    """
    every = list(records.values())
    if not every or any(record.tasks != every[0].tasks for record in every):
        raise ModgraftError(
            "a figure compares records of the same tasks, as "
            "continual_figure({'a module each': record, 'one module': other})"
        )
    tasks = every[0].tasks

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        grid = canvas.subplots(1, len(every), sharey=True, squeeze=False)[0]
        for axes, (name, record) in zip(grid, records.items(), strict=True):
            values = np.array([record.start, *record.matrix])
            texts = [[f"{100 * value:.0f}" for value in row] for row in values]
            heat_map(axes, scheme, values, texts)
            axes.set_xticks(range(len(tasks)), tasks)
            axes.set_yticks(range(len(tasks) + 1), [START, *(f"after {task}" for task in tasks)])
            axes.set_title(f"{name}: forgetting {100 * record.forgetting:.1f}")

    lost = "; ".join(f"{name} forgets {100 * r.forgetting:.1f}" for name, r in records.items())
    alt = f"Accuracy on {', '.join(tasks)} after each: {lost}"
    width = 1.2 + len(every) * max(2.6, 0.7 * len(tasks))
    return draw((width, 1.0 + 0.34 * (len(tasks) + 1)), alt, paint)
