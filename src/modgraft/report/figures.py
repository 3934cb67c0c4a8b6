"""Draw figures with matplotlib, without a display, for light and for dark pages."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from modgraft.report.run import Point, Row
from modgraft.report.statistics import Figure, Read, ReadSeveral, figure, figures, interval


@dataclass(frozen=True)
class Scheme:
    """The colours of a page; colour-blind readers can tell `series` apart (after Okabe and Ito)."""

    name: str
    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, ...]
    warn: str


LIGHT = Scheme(
    "light", "#ffffff", "#1c2024", "#687076", "#e3e6e8",
    ("#0072b2", "#d98200", "#008a68", "#b0568f", "#4d5358"), "#b8460b",
)  # fmt: skip
DARK = Scheme(
    "dark", "#16191c", "#e6e8ea", "#9aa3aa", "#2d3338",
    ("#5fb4ee", "#f0a93b", "#33c79d", "#df94c2", "#b4bcc2"), "#ff9660",
)  # fmt: skip

SCALE = 180
"""Pixels per inch of a saved figure."""


WIDTH = 6.2
"""Inches of a figure as wide as the page: its letters can be read at 500 pixels too."""


@dataclass(frozen=True)
class Picture:
    """A drawn figure: PNG bytes for both schemes, its size in CSS pixels, its alternative text.

    A notebook shows the light one.
    """

    light: bytes = field(repr=False)
    dark: bytes | None = field(repr=False)
    width: int
    height: int
    alt: str

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        """Return the light PNG, and the size at which it is shown."""
        return self.light, {"width": self.width, "height": self.height, "alt": self.alt}


def draw(
    size: tuple[float, float],
    alt: str,
    paint: Callable[[Canvas, Scheme], None],
    *,
    schemes: Sequence[Scheme] = (LIGHT, DARK),
) -> Picture:
    """Draw a figure of `size` inches once for each scheme, light first."""
    drawn = []
    for scheme in schemes:
        with mpl.rc_context(_style(scheme)), warnings.catch_warnings():
            # Letters that the font lacks are drawn as boxes; the page has the text as well.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            canvas = Canvas(figsize=size, layout="constrained")
            FigureCanvasAgg(canvas)
            paint(canvas, scheme)
            out = io.BytesIO()
            canvas.savefig(out, format="png", dpi=SCALE, facecolor=scheme.paper)
        drawn.append(out.getvalue())
    dark = drawn[1] if len(drawn) > 1 else None
    return Picture(drawn[0], dark, round(size[0] * 100), round(size[1] * 100), alt)


def _style(scheme: Scheme) -> dict[Any, Any]:
    return {
        "font.size": 9.5,
        "axes.edgecolor": scheme.grid,
        "axes.facecolor": scheme.paper,
        "axes.labelcolor": scheme.faint,
        "axes.titlecolor": scheme.ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": scheme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": scheme.faint,
        "ytick.color": scheme.faint,
        "text.color": scheme.ink,
        "text.parse_math": False,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.solid_capstyle": "round",
    }


def heat_map(
    axes: Axes, scheme: Scheme, shares: np.ndarray, texts: Sequence[Sequence[str]]
) -> None:
    """Draw shares [rows, columns] in 0..1 as a heat map with texts; NaN leaves a cell empty."""
    ramp = LinearSegmentedColormap.from_list(
        "share", [to_rgb(scheme.paper), to_rgb(scheme.series[0])]
    )
    axes.imshow(shares, cmap=ramp, vmin=0, vmax=1, aspect="auto")
    for y, (row, words) in enumerate(zip(shares, texts, strict=True)):
        for x, (share, word) in enumerate(zip(row, words, strict=False)):
            if not math.isnan(share):
                ink = scheme.paper if share > 0.7 else scheme.ink
                axes.text(x, y, word, ha="center", va="center", color=ink, fontsize=8.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)


def overview(
    rows: Sequence[Row], read: Read, level: float | None, what: str, n: int
) -> Picture | None:
    """Draw a line for each row: a dot for every seed, a bar for the mean, a dashed line for chance.

    A band shows each row's 95 % interval over `n` questions; 0 leaves it out. Returns None if no
    row has the figure.
    """
    found = [(row, value) for row in rows if (value := figure(row, read)) is not None]
    if not found:
        return None

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        axes = canvas.add_subplot()
        shades = {"main": scheme.series[0], "ablation": scheme.series[2]}
        for place, (row, value) in enumerate(found):
            shade = scheme.warn if row.leaks else shades.get(row.group, scheme.faint)
            axes.plot([0, value.mean], [place, place], color=shade, lw=1.4, alpha=0.45)
            low, high = interval(value.mean, n) if n else (value.mean, value.mean)
            axes.barh(place, high - low, 0.34, low, color=shade, alpha=0.25)
            fill = scheme.paper if row.leaks else shade
            places = [place] * len(value.values)
            axes.plot(value.values, places, "o", ms=6, mec=shade, mfc=fill, alpha=0.85)
            axes.plot([value.mean] * 2, [place - 0.26, place + 0.26], color=shade, lw=2.2)
            text = f"{value}  leak" if row.leaks else str(value)
            axes.annotate(
                text, (max(high, *value.values), place), (7, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=shade,
                bbox={"facecolor": scheme.paper, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        _chance(axes, level, scheme)
        axes.set_yticks(range(len(found)), [short(row.title, 30) for row, _ in found])
        axes.tick_params(axis="y", length=0, labelcolor=scheme.ink)
        axes.set_ylim(len(found) - 0.4, -0.9 if level is not None else -0.6)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(f"accuracy on {what}, %")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    alt = f"Accuracy on {what}: " + "; ".join(f"{row.title} {value}" for row, value in found)
    return draw((WIDTH, 0.9 + 0.31 * len(found)), alt, paint)


def _chance(axes: Axes, level: float | None, scheme: Scheme) -> None:
    if level is None:
        return
    axes.axvline(level, color=scheme.ink, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"chance {level:.1f}", (level, 1), (4, -1), xycoords=("data", "axes fraction"),
        textcoords="offset points", va="top", fontsize=8.5,
    )  # fmt: skip


def bars(
    rows: Sequence[Row],
    names: Sequence[str],
    read: ReadSeveral,
    level: Mapping[str, float],
    what: str,
) -> Picture | None:
    """Draw a group of bars for each name, with a bar for each row; whiskers show the spread.

    A dashed line in each group shows chance. Returns None if no row has a figure.
    """
    values: list[tuple[Row, list[Figure | None]]] = [
        (row, figures(row, read, names)) for row in rows
    ]
    values = [(row, found) for row, found in values if any(found)]
    if not values:
        return None
    width = 0.8 / len(values)

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        axes = canvas.add_subplot()
        shades = scheme.series
        for index, (_, found) in enumerate(values):
            for group, value in enumerate(found):
                at = group - 0.4 + width * (index + 0.5)
                labelled = len(values) * len(names) <= 24
                _bar(axes, scheme, value, at, width * 0.86, shades[index], labelled)
        for group, name in enumerate(names):
            if name in level:
                axes.hlines(level[name], group - 0.46, group + 0.46, color=scheme.ink, lw=1.2,
                            ls=(0, (3, 2)))  # fmt: skip
        _name_groups(axes, [short(name, 24) for name in names])
        axes.tick_params(axis="x", length=0, labelcolor=scheme.ink)
        axes.set_xlim(-0.55, len(names) - 0.45)
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel(f"accuracy by {what}, %")
        axes.grid(visible=False, axis="x")
        handles = [
            Line2D([], [], marker="s", ls="", ms=7, color=shades[i], label=short(row.title, 36))
            for i, (row, _) in enumerate(values)
        ]
        if level:
            handles.append(Line2D([], [], color=scheme.ink, lw=1.2, ls=(0, (3, 2)), label="chance"))
        canvas.legend(
            handles=handles,
            loc="outside upper left",
            ncols=len(handles) if sum(len(str(h.get_label())) + 6 for h in handles) < 80 else 2,
            handletextpad=0.5,
        )

    spoken = (
        f"{row.title}: "
        + ", ".join(f"{n} {v}" for n, v in zip(names, found, strict=True) if v is not None)
        for row, found in values
    )
    return draw((WIDTH, 3.1), f"Accuracy by {what}, in percent. " + "; ".join(spoken), paint)


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Write the names under their groups, slanted where they would run into one another."""
    long = sum(len(name) + 2 for name in names) > 90
    slant: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, **(slant if long else {}))


def _bar(
    axes: Axes, scheme: Scheme, value: Figure | None, at: float, width: float, shade: str,
    labelled: bool,
) -> None:  # fmt: skip
    """Draw one bar with its whisker and, if `labelled`, its mean; a dash without a value."""
    if value is None:
        axes.text(at, 1, "–", ha="center", color=scheme.faint)
        return
    axes.bar(at, value.mean, width, color=shade)
    spread = value.spread or 0.0
    if spread:
        ends = [max(0.0, value.mean - spread), value.mean + spread]
        axes.plot([at, at], ends, color=scheme.ink, lw=1)
    if labelled:
        axes.text(
            at, value.mean + spread + 1, f"{value.mean:.0f}", ha="center", va="bottom", fontsize=8
        )


MOST_BARS = len(LIGHT.series)


def loss(title: str, seeds: Mapping[int, Sequence[Point]]) -> Picture | None:
    """Draw training and evaluation loss over steps, a line a seed; None if none is finite."""
    kept = {
        (seed, split): [
            (p.step, p.loss)
            for p in points
            if p.split == split and p.loss is not None and math.isfinite(p.loss)
        ]
        for seed, points in sorted(seeds.items())
        for split in ("train", "eval")
    }
    kept = {key: found for key, found in kept.items() if found}
    if not kept:
        return None

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        axes = canvas.add_subplot()
        for (_, split), found in kept.items():
            steps, losses = np.array(found, dtype=float).T
            if split == "train":
                axes.plot(steps, losses, color=scheme.series[0], lw=0.6, alpha=0.25)
                axes.plot(steps, _smooth(losses), color=scheme.series[0], lw=1.5, alpha=0.9)
            else:
                axes.plot(steps, losses, "-o", color=scheme.series[1], lw=1.3, ms=3.5)
        lowest = min(value for found in kept.values() for _, value in found if value is not None)
        if lowest > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(short(title, 44))
        axes.set_xlabel("step")
        axes.set_ylabel("loss" + (" (log)" if lowest > 0 else ""))
        splits = {split for _, split in kept}
        handles = [
            Line2D([], [], color=scheme.series[i], lw=1.6, marker=mark, ms=3.5, label=label)
            for i, (split, mark, label) in enumerate(
                (("train", "", "training"), ("eval", "o", "evaluation"))
            )
            if split in splits
        ]
        axes.legend(handles=handles, loc="upper right")

    last = "; ".join(
        f"seed {seed}, {split}: {found[-1][1]:.3g} at step {found[-1][0]}"
        for (seed, split), found in kept.items()
    )
    return draw((4.3, 2.8), f"Loss of {title}. {last}", paint)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the centred moving average over a fortieth of the curve, at both ends over the half
    of it that there is: one step alone would draw its noise there, not the mean."""
    half = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def short(text: str, most: int) -> str:
    """Cut a label to at most `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def save(picture: Picture, path: Path) -> Path:
    """Write the light version of a figure as a PNG file."""
    path.write_bytes(picture.light)
    return path
