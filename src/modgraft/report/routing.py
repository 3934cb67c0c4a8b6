"""What routers have chosen, as a table for the terminal and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure as Canvas
from rich import box
from rich.markup import escape
from rich.table import Table

from modgraft.core.errors import ModgraftError
from modgraft.report.figures import Picture, Scheme, draw

if TYPE_CHECKING:  # the page of a run needs no torch
    from modgraft.routing.stats import Usage

NETWORK = "the network"  # where one choice holds for all of it


def routing_table(uses: Sequence[Usage]) -> Table:
    """A row for each router: share of the weight by module, entropy and spread, what is wrong.

    Args:
        uses: ``host["skills"].stats()``.

    Raises:
        ModgraftError: where nothing has been counted.
    """
    names = _names(uses)
    title = f"Use of {len(names)} modules, share of the weight in percent"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("site", no_wrap=True)
    for name in (*names, "choices", "entropy", "spread"):
        table.add_column(escape(name), justify="right", no_wrap=True)
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


def routing_figure(uses: Sequence[Usage]) -> Picture:
    """Use by site as a heat map; beside it the entropy of a choice and the spread of all.

    A cross marks a module that no choice picked, a red name a site that has collapsed.

    Args:
        uses: ``host["skills"].stats()``.

    Returns:
        PNG bytes for light and dark pages.

    Raises:
        ModgraftError: where nothing has been counted.
    """
    names = _names(uses)
    most = math.log2(len(names)) if len(names) > 1 else 1.0
    labels = _short([use.path for use in uses])

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        heat, bits = canvas.subplots(
            1, 2, sharey=True, width_ratios=[max(2.2, 0.62 * len(names)), 2.2]
        )
        shares = np.array([u.share if u.choices else [np.nan] * len(names) for u in uses])
        ramp = LinearSegmentedColormap.from_list(
            "use", [to_rgb(scheme.paper), to_rgb(scheme.series[0])]
        )
        heat.imshow(shares, cmap=ramp, vmin=0, vmax=1, aspect="auto")
        for row, use in enumerate(uses):
            if not use.choices:
                middle = (len(names) - 1) / 2
                heat.text(middle, row, "no choices", ha="center", va="center", color=scheme.faint)
                continue
            for column, share in enumerate(use.share):
                ink = scheme.paper if share > 0.7 else scheme.ink
                text = "×" if use.picked[column] == 0 else f"{100 * share:.0f}"
                heat.text(column, row, text, ha="center", va="center", color=ink, fontsize=8.5)
        heat.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 6 else 0)
        heat.set_yticks(range(len(uses)), labels)
        for tick, use in zip(heat.get_yticklabels(), uses, strict=True):
            tick.set_color(scheme.warn if use.choices and use.collapsed else scheme.ink)
        heat.set_title("Share of the weight, % (×: never picked)")
        heat.grid(visible=False)
        heat.tick_params(length=0)
        known = [(row, use) for row, use in enumerate(uses) if use.choices]
        rows = [row for row, _ in known]
        for row, use in known:
            bits.plot([use.entropy, use.spread], [row, row], color=scheme.grid, lw=2, zorder=1)
        own, both = [u.entropy for _, u in known], [u.spread for _, u in known]
        bits.plot(own, rows, "o", color=scheme.series[1], label="of one choice")
        bits.plot(both, rows, "s", color=scheme.series[0], label="of all choices")
        bits.axvline(most, color=scheme.faint, lw=1, ls="--")
        bits.set_xlim(-0.04 * most, 1.06 * most)
        bits.set_title("Entropy, bits (dashed: even use)")
        bits.grid(visible=False, axis="y")
        bits.tick_params(axis="y", length=0)
        canvas.legend(loc="outside lower right", ncols=2)

    collapsed = sum(use.collapsed for use in uses if use.choices)
    alt = f"Use of {', '.join(names)} at {len(uses)} sites; {collapsed} collapsed"
    width = 3.4 + max(2.2, 0.62 * len(names)) + 0.07 * max(map(len, labels))
    return draw((width, 1.25 + 0.3 * len(uses)), alt, paint)


def _names(uses: Sequence[Usage]) -> tuple[str, ...]:
    if not any(use.choices for use in uses):
        raise ModgraftError(
            "nothing has been routed yet, so there is no use to show; run the host first, as "
            "host(**batch, modules='skills'), then host['skills'].stats()"
        )
    return uses[0].names


def _short(paths: Sequence[str]) -> list[str]:
    """Paths without the words that all of them begin with."""
    if len(paths) == 1:
        return [paths[0] or NETWORK]
    words = [path.split(".") for path in paths]
    same = 0
    while all(len(w) > same + 1 for w in words) and len({w[same] for w in words}) == 1:
        same += 1
    return [".".join(w[same:]) for w in words]
