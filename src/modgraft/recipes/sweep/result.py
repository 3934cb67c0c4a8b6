"""What a sweep has found: figures by settings and seed, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure as Canvas

from modgraft.core.config import Configured
from modgraft.core.errors import ModgraftError, UnknownNameError, listed
from modgraft.core.tables import Page, Table, table
from modgraft.report.figures import WIDTH, Picture, Scheme, draw, short
from modgraft.report.statistics import Figure

LOG = 20
"""How many times its smallest value a setting's largest is, from which its axis is logarithmic."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        settings: what it was given.
        seed: its seed.
        figures: what it measured, by name; empty where it failed.
        seconds: wall time; of modules that trained in one pass, their share of it.
        error: why it failed, "" where it did not.
    """

    settings: Mapping[str, Any]
    seed: int
    figures: Mapping[str, float]
    seconds: float
    error: str = ""

    def __str__(self) -> str:
        return ", ".join([*_parts(self.settings), f"seed {self.seed}"])


@dataclass(frozen=True)
class Row:
    """The runs with the same settings, one a seed; ``row["accuracy"]`` is a figure over them."""

    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]

    def __getitem__(self, name: str) -> Figure:
        """Return a figure with its ``values``, ``mean`` and ``spread`` over the seeds.

        Raises:
            UnknownNameError: no run with these settings has measured it.
        """
        values = tuple(cell.figures[name] for cell in self.cells if name in cell.figures)
        if not values:
            known = {each for cell in self.cells for each in cell.figures}
            raise UnknownNameError.among(f"figure of {self}", name, known)
        return Figure(values)

    @property
    def failed(self) -> bool:
        """Whether one of its runs has failed."""
        return any(cell.error for cell in self.cells)

    def __str__(self) -> str:
        return ", ".join(_parts(self.settings)) or "as it is"


@dataclass(frozen=True, repr=False)
class Sweep:
    """The result of :func:`modgraft.sweep`; ``print`` shows a table, :meth:`figure` draws it.

    Attributes:
        rows: a row for each choice of settings, in the order in which they were asked for.
        seeds: the seeds of each row.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """The names of the figures."""
        return list(dict.fromkeys(n for row in self.rows for c in row.cells for n in c.figures))

    @property
    def failed(self) -> list[Cell]:
        """The runs that failed."""
        return [cell for row in self.rows for cell in row.cells if cell.error]

    def best(self, name: str | None = None, mode: str | None = None) -> Row:
        """Return the row with the best mean of a figure over the seeds.

        A row of which a run has failed does not compete. The figure chooses among the rows: measure
        it on other data than those on which the chosen one is to be judged.

        Args:
            name: the figure's; None: the first.
            mode: ``"max"`` or ``"min"``; None: ``"min"`` if "loss" is in its name.

        Raises:
            UnknownNameError: no row has that figure.
            ModgraftError: every row has failed, or for another mode.
        """
        rows = [row for row in self.rows if not row.failed]
        if not rows:
            raise ModgraftError(f"no row is best: a run of each has failed, as {self.failed[0]}")
        name = self._named(name)
        mode = mode or ("min" if "loss" in name else "max")
        if mode not in ("min", "max"):
            raise ModgraftError(f"mode={mode!r}: it must be 'min' or 'max'")
        return (min if mode == "min" else max)(rows, key=lambda row: row[name].mean)

    def figure(self, name: str | None = None, against: str | None = None) -> Picture:
        """Draw a figure of every row: a dot a seed, the mean, and a line for the spread.

        Args:
            name: the figure's; None: the first.
            against: the setting along the horizontal axis, with a line for each choice of the
                others; None: the first that has several numbers. Where no setting has, each row has
                a line of its own.

        Raises:
            UnknownNameError: there is no such figure or setting.
            ModgraftError: nothing was measured.
        """
        name = self._named(name)
        rows = [row for row in self.rows if any(name in cell.figures for cell in row.cells)]
        numeric = [n for n in self.varied if all(_is_number(r.settings.get(n)) for r in rows)]
        if against is not None and against not in numeric:
            raise UnknownNameError.among("setting of several numbers", against, numeric)
        axis = against or next(iter(numeric), None)

        def paint(canvas: Canvas, scheme: Scheme) -> None:
            if axis is None:
                _paint_rows(canvas, scheme, rows, name)
            else:
                _paint_lines(canvas, scheme, rows, name, axis)

        alt = f"{name}: " + "; ".join(f"{row} {shown(row[name])}" for row in rows)
        return draw((WIDTH, 3.2 if axis else 0.9 + 0.31 * len(rows)), alt, paint)

    def _named(self, name: str | None) -> str:
        if not self.names:
            raise ModgraftError(f"nothing was measured: {self.failed[0]}: {self.failed[0].error}")
        if name is not None and name not in self.names:
            raise UnknownNameError.among("figure", name, self.names)
        return self.names[0] if name is None else name

    @property
    def varied(self) -> list[str]:
        """The names of the settings that differ between rows."""
        names = list(dict.fromkeys(n for row in self.rows for n in row.settings))
        found = {n: {repr(told(row.settings.get(n))) for row in self.rows} for n in names}
        return [name for name in names if len(found[name]) > 1]

    # -- what is shown --------------------------------------------------------------------------

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the table as text: the names of its columns, and its rows."""
        columns = [*self.varied, *self.names, "seconds"]
        rows = []
        for row in self.rows:
            found = [[c.figures[n] for c in row.cells if n in c.figures] for n in self.names]
            done = [cell.seconds for cell in row.cells if not cell.error]
            figures = [shown(Figure(tuple(each))) if each else "–" for each in (*found, done)]
            failed = sum(bool(cell.error) for cell in row.cells)
            rows.append([*(word(row.settings.get(n)) for n in self.varied), *figures])
            if failed:
                rows[-1].append(f"{failed} of {len(row.cells)} failed")
        if self.failed:
            columns.append("failed")
            rows = [row + [""] * (len(columns) - len(row)) for row in rows]
        return columns, rows

    def remarks(self) -> list[str]:
        """Return sentences about the table."""
        seeds = ", ".join(map(str, self.seeds))
        said = [f"Mean ± sample standard deviation over the seeds {seeds}."]
        if len(self.seeds) == 1:
            said = [f"One seed, {seeds}: no spread is known."]
        return [*said, *(f"Failed: {cell}: {cell.error}" for cell in self.failed)]

    def markdown(self) -> str:
        """Return the table as Markdown, with what is to be said of it."""
        columns, rows = self.cells()
        lines = [columns, ["---"] * len(columns), *rows]
        body = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
        return "\n".join([*body, "", *self.remarks()])

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        cells = [asdict(cell) for row in self.rows for cell in row.cells]
        return {"seeds": list(self.seeds), "cells": [told(cell) for cell in cells]}

    def __repr__(self) -> str:
        return str(self._page())

    def __str__(self) -> str:
        return str(self._page())

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._page()._repr_html_()

    def _page(self) -> Page:
        columns, rows = self.cells()
        parts: list[str | Table] = [table(columns, rows, right=columns[len(self.varied) :])]
        return Page(*parts, "\n".join(self.remarks()))


class SweepError(ModgraftError):
    """Runs of a sweep that failed; what the others measured is its ``sweep``."""

    def __init__(self, words: str, sweep: Sweep) -> None:
        super().__init__(words)
        self.sweep = sweep

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.sweep)


def told(value: Any) -> Any:
    """Return a value as JSON has it: numbers and texts as they are, other things as text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): told(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [told(each) for each in value]
    if isinstance(value, Configured):
        return value.brief()
    name = getattr(value, "__qualname__", None)
    return repr(value) if name is None else f"{value.__module__}.{name}"


def word(value: Any) -> str:
    """Return a setting's value for people."""
    if isinstance(value, float):
        return f"{value:g}"
    name = getattr(value, "__name__", None)
    return str(told(value)) if name is None else str(name)


def shown(figure: Figure) -> str:
    """Return mean ± spread to four digits, and two of the spread."""
    spread = figure.spread
    return f"{figure.mean:.4g}" if spread is None else f"{figure.mean:.4g} ± {spread:.2g}"


def _parts(settings: Mapping[str, Any]) -> list[str]:
    return [f"{name}={word(value)}" for name, value in settings.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _paint_lines(canvas: Canvas, scheme: Scheme, rows: Sequence[Row], name: str, axis: str) -> None:
    """Draw a line over the values of a setting for each choice of the others."""
    axes = canvas.subplots()
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others = {n: v for n, v in row.settings.items() if n != axis}
        groups.setdefault(", ".join(_parts(others)), []).append(row)
    for index, (label, several) in enumerate(groups.items()):
        several.sort(key=lambda row: row.settings[axis])
        colour = scheme.series[index % len(scheme.series)]
        style = ("-", "--", ":", "-.")[index // len(scheme.series) % 4]
        found = [(row.settings[axis], row[name]) for row in several]
        axes.plot([x for x, _ in found], [f.mean for _, f in found], style, color=colour,
                  lw=1.5, label=label)  # fmt: skip
        for x, f in found:
            axes.plot([x] * len(f.values), f.values, "o", ms=4, color=colour, alpha=0.7)
    values = [row.settings[axis] for row in rows]
    if min(values) > 0 and max(values) >= LOG * min(values):
        axes.set_xscale("log")
    axes.set(xlabel=axis, ylabel=name)
    if len(groups) > 1:
        axes.legend(fontsize=8)


def _paint_rows(canvas: Canvas, scheme: Scheme, rows: Sequence[Row], name: str) -> None:
    """Draw a line for each row: a dot a seed, and a bar at the mean."""
    axes, colour = canvas.subplots(), scheme.series[0]
    for place, row in enumerate(rows):
        figure, spread = row[name], row[name].spread or 0.0
        ends = [figure.mean - spread, figure.mean + spread]
        axes.plot(ends, [place] * 2, color=colour, lw=1.4, alpha=0.45)
        axes.plot(figure.values, [place] * len(figure.values), "o", ms=5, color=colour, alpha=0.8)
        axes.plot([figure.mean] * 2, [place - 0.26, place + 0.26], color=colour, lw=2.2)
    axes.set_yticks(range(len(rows)), [short(str(row), 40) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=scheme.ink)
    axes.set_xlabel(name)
    axes.grid(visible=False, axis="y")


def failures(cells: Sequence[Cell]) -> str:
    """Name the runs that failed, each with its error."""
    return listed([f"{cell} ({cell.error})" for cell in cells], 4)
