"""The page of plots: quality against each cost, the frontier, and the choice."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from modgraft.recipes.ladder.lines import Line, frontier_of
from modgraft.recipes.ladder.pareto import frontier
from modgraft.report.figures import Scheme

PANELS = (
    ("parameters", "trained parameters", 1.0),
    ("memory", "memory in training, MiB", 2**20),
    ("steps", "steps", 1.0),
    ("seconds", "seconds of training", 1.0),
)
"""A panel's cost, what stands under it, and the unit."""


def paint_ladder(
    canvas: Canvas, scheme: Scheme, lines: Sequence[Line], finalists: Sequence[Line], choice: str
) -> None:
    """Draw a panel for each cost, with the frontier: of those that have taken all steps, and of all
    moments over the steps."""
    trained = [line for line in lines if line.best is not None]
    for axes, (cost, words, unit) in zip(canvas.subplots(2, 2).flat, PANELS, strict=True):
        if cost == "steps":
            _paint_curves(axes, scheme, trained, finalists, choice)
        else:
            _paint_points(axes, scheme, trained, finalists, choice, cost, unit)
        axes.margins(x=0.12)  # for the names beside the last points
        axes.set(xlabel=words, ylabel="quality")
    marks = [
        ("o", scheme.series[0], scheme.series[0], "all steps"),
        ("o", scheme.paper, scheme.series[0], "fell behind, with fewer steps"),
        ("o", scheme.series[1], scheme.ink, "the choice"),
    ]
    handles = [
        Line2D([], [], ls="", marker=mark, mfc=fill, mec=edge, label=label)
        for mark, fill, edge, label in marks
    ]
    handles.append(Line2D([], [], color=scheme.series[2], lw=1.6, label="Pareto frontier"))
    canvas.legend(handles=handles, loc="outside upper left", ncols=4)


def _paint_points(
    axes: Axes, scheme: Scheme, trained: Sequence[Line], finalists: Sequence[Line], choice: str,
    cost: str, unit: float,
) -> None:  # fmt: skip
    front = set(frontier_of(finalists, cost))
    edge = sorted(_at(line, cost, unit) for line in trained if line.name in front)
    axes.plot(*zip(*edge, strict=True), drawstyle="steps-post", color=scheme.series[2], lw=1.6)
    for number, line in enumerate(sorted(trained, key=lambda line: _at(line, cost, unit))):
        x, y = _at(line, cost, unit)
        error = line.best.error if line.best is not None else None
        all_steps = line in finalists
        if error is not None and all_steps:
            axes.plot([x, x], [y - error, y + error], color=scheme.series[0], lw=1, alpha=0.6)
        chosen = line.name == choice
        fill = scheme.series[1] if chosen else scheme.series[0] if all_steps else scheme.paper
        rim = scheme.ink if chosen else scheme.series[0]
        axes.plot([x], [y], "o", ms=8 if chosen else 6, mfc=fill, mec=rim, zorder=3)
        axes.annotate(
            line.name, (x, y), (5, 6 if number % 2 else -11), textcoords="offset points",
            fontsize=7, color=scheme.ink if all_steps else scheme.faint,
        )  # fmt: skip
    least, most = (f(_at(line, cost, unit)[0] for line in trained) for f in (min, max))
    if most > 20 * least:
        axes.set_xscale("symlog" if least <= 0 else "log")


def _paint_curves(
    axes: Axes, scheme: Scheme, trained: Sequence[Line], finalists: Sequence[Line], choice: str
) -> None:
    """Draw the quality of each rung's best learning rate after each round, and the frontier."""
    points = [(score.quality, score.steps) for line in trained for score in line.curve]
    edge = sorted((points[i][1], points[i][0]) for i in frontier(points))
    axes.plot(*zip(*edge, strict=True), drawstyle="steps-post", color=scheme.series[2], lw=1.6)
    for line in trained:
        curve = [(score.steps, score.quality) for score in line.curve]
        chosen, all_steps = line.name == choice, line in finalists
        colour = scheme.series[1] if chosen else scheme.series[0]
        shade = 1.0 if chosen else 0.7 if all_steps else 0.35
        axes.plot(*zip(*curve, strict=True), "-o", color=colour, ms=4, lw=1.3, alpha=shade)
        axes.annotate(
            line.name, curve[-1], (5, -3), textcoords="offset points", fontsize=7,
            color=scheme.ink if all_steps else scheme.faint,
        )  # fmt: skip


def _at(line: Line, cost: str, unit: float) -> tuple[float, float]:
    assert line.best is not None  # noqa: S101
    return line.cost(cost) / unit, line.best.quality
