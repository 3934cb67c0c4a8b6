"""Show what routers have chosen, as a table in the terminal and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from rich.markup import escape

from modgraft.core.errors import ModgraftError, an
from modgraft.core.tables import Table
from modgraft.report.figures import Picture, Scheme, draw, heat_map
from modgraft.report.table import terminal_table

if TYPE_CHECKING:  # the report is written without torch
    from modgraft.routing.stats import Usage

NETWORK = "the network"  # where one choice holds for all of it


class Counted(Protocol):
    """A module whose routers' choices are counted: the handle of a mixture."""

    def stats(self) -> list[Usage]: ...  # noqa: D102


def routing_table(uses: Sequence[Usage] | Counted) -> Table:
    """Return a table with a row for each router: each module's share, entropy, spread, problems.

    Args:
        uses: ``host["skills"]``, or its ``stats()``.

    Raises:
        ModgraftError: Nothing has been routed yet, or the module is no mixture.
    """
    uses = _uses(uses)
    names = _names(uses)
    title = f"Use of {len(names)} modules, share of the weight in percent"
    table = terminal_table(title, "site", (*names, "choices", "entropy", "spread"))
    table.add_column("")
    for use in uses:
        shares = [f"{100 * share:.0f}" if use.choices else "–" for share in use.share]
        bits = [f"{bit:.2f}" if use.choices else "–" for bit in (use.entropy, use.spread)]
        notes = []
        if use.choices and use.collapsed:
            notes.append("[red]collapsed[/red]")
        if use.choices and use.dead:
            notes.append(f"dead: {escape(', '.join(use.dead))}")
        table.add_row(
            escape(use.path or NETWORK), *shares, f"{use.choices:,}", *bits, "; ".join(notes)
        )
    table.caption = (
        f"entropy of a choice and spread of all, in bits: none to {math.log2(len(names)):.2f}"
    )
    return table


def routing_figure(uses: Sequence[Usage] | Counted) -> Picture:
    """Draw each module's share at each site as a heat map, beside the entropies of the choices.

    A cross marks a module that was never chosen, a red name a site that has collapsed.

    Args:
        uses: ``host["skills"]``, or its ``stats()``.

    Returns:
        PNG bytes for light and dark pages.

    Raises:
        ModgraftError: Nothing has been routed yet, or the module is no mixture.
    """
    uses = _uses(uses)
    names = _names(uses)
    labels = _short([use.path for use in uses])

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        heat, bits = canvas.subplots(
            1, 2, sharey=True, width_ratios=[max(2.2, 0.62 * len(names)), 2.2]
        )
        _paint_shares(heat, scheme, uses)
        heat.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 6 else 0)
        heat.set_yticks(range(len(uses)), labels)
        for tick, use in zip(heat.get_yticklabels(), uses, strict=True):
            tick.set_color(scheme.warn if use.choices and use.collapsed else scheme.ink)
        _paint_entropy(bits, scheme, uses)
        canvas.legend(loc="outside lower right", ncols=2)

    collapsed = sum(use.collapsed for use in uses if use.choices)
    alt = f"Use of {', '.join(names)} at {len(uses)} sites; {collapsed} collapsed"
    width = 3.4 + max(2.2, 0.62 * len(names)) + 0.07 * max(map(len, labels))
    return draw((width, 1.4 + 0.3 * len(uses)), alt, paint)


def _paint_shares(axes: Axes, scheme: Scheme, uses: Sequence[Usage]) -> None:
    """Draw each module's share of the weight, with a row for each site."""
    count = len(uses[0].names)
    shares = np.array([use.share if use.choices else [np.nan] * count for use in uses])
    texts = [
        [
            "×" if times == 0 else f"{100 * share:.0f}"
            for share, times in zip(use.share, use.picked, strict=True)
        ]
        for use in uses
    ]
    heat_map(axes, scheme, shares, texts)
    for row, use in enumerate(uses):
        if not use.choices:
            middle = (count - 1) / 2
            axes.text(middle, row, "no choices", ha="center", va="center", color=scheme.faint)
    axes.set_title("Share of the weight, %\n×: never picked")


def _paint_entropy(axes: Axes, scheme: Scheme, uses: Sequence[Usage]) -> None:
    """Draw the entropy of one choice and that of all choices, with a row for each site."""
    count = len(uses[0].names)
    most = math.log2(count) if count > 1 else 1.0
    rows = [row for row, use in enumerate(uses) if use.choices]
    of_one, of_all = [uses[row].entropy for row in rows], [uses[row].spread for row in rows]
    axes.hlines(rows, of_one, of_all, color=scheme.grid, lw=2, zorder=1)
    axes.plot(of_one, rows, "o", color=scheme.series[1], label="of one choice")
    axes.plot(of_all, rows, "s", color=scheme.series[0], label="of all choices")
    axes.axvline(most, color=scheme.faint, lw=1, ls="--")
    axes.set_xlim(-0.04 * most, 1.06 * most)
    axes.set_title("Entropy, bits\ndashed: even use")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _uses(of: Sequence[Usage] | Counted) -> Sequence[Usage]:
    """Return what routers have counted, of a mixture or of what it has counted."""
    if isinstance(of, str) or not (isinstance(of, Sequence) or hasattr(of, "stats")):
        raise ModgraftError(
            f"{an(type(of).__name__)} ({str(of).partition(chr(10))[0]:.40}) counts no choices; "
            f"give a mixture's handle, host['skills'], or its stats()"
        )
    return of if isinstance(of, Sequence) else of.stats()


def _names(uses: Sequence[Usage]) -> tuple[str, ...]:
    if not any(use.choices for use in uses):
        raise ModgraftError(
            "nothing has been routed yet, so there is no use to show; run the host first, as "
            "host(**batch, modules='skills'), then host['skills'].stats()"
        )
    return uses[0].names


def _short(paths: Sequence[str]) -> list[str]:
    """Return the paths without the parts that all of them begin with."""
    if len(paths) == 1:
        return [paths[0] or NETWORK]
    words = [path.split(".") for path in paths]
    same = 0
    while all(len(w) > same + 1 for w in words) and len({w[same] for w in words}) == 1:
        same += 1
    return [".".join(w[same:]) for w in words]
