"""``modgraft diff``: how two modules, or two checkpoints, differ, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modgraft.cli.merge import kind_of, loaded, shown_progress

if TYPE_CHECKING:
    from modgraft.store.merging.diff import Row

_ONLY = {
    "A": "only in A", "B": "only in B", "shape": "another shape", "type": "other whole numbers",
}  # fmt: skip


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="A folder of a module or checkpoint.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Modules: their host; left out, what the card names. Checkpoints: what is "
            "subtracted from both first, so that what they have learned is compared.",
        ),
    ] = None,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks", help="Checkpoints: the rank of each difference too, which is slow."
        ),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show also what is equal.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file, a PNG or SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Show what differs between A and B: how much, in which direction, in how many directions.

    The norm of the difference is relative to A; the cosine is that of the angle between both. Of
    modules, the changes of weights are compared, whatever makes them.

    [bold]Examples[/bold]

      modgraft diff modules/qa modules/qa-longer --base ./my-model

      modgraft diff ./seed0 ./seed1 --base ./pretrained --plot diff.png

      modgraft diff ./before ./after --ranks --json
    """
    from modgraft.store.merging.diff import compare_checkpoints, compare_modules

    kind = kind_of([one, other])
    if kind == "modules":
        host, names = loaded([one, other], base)
        rows = compare_modules(host, *names)
    else:
        with shown_progress("comparing", as_json) as progress:
            rows = compare_checkpoints(one, other, base, ranks=ranks, progress=progress)
    if plot is not None:
        _plot(rows, one, other, plot)
    if as_json:
        typer.echo(json.dumps({"compared": kind, "rows": [_plain(row) for row in rows]}, indent=2))
        return
    _print(rows, kind, every)
    if plot is not None:
        typer.echo(f"\nPicture: {plot}")


def _plain(row: Row) -> dict[str, Any]:
    """Return a row for JSON, which has no infinity."""
    said = asdict(row)
    return said | {"relative": None if math.isinf(row.relative) else row.relative}


def _print(rows: Sequence[Row], kind: str, every: bool) -> None:
    from modgraft.host.describe import plain, table

    shown = [row for row in rows if every or not row.equal]
    equal = sum(row.equal for row in rows)
    typer.echo(f"{kind}: {len(rows)} weights, {equal} of them equal")
    if not shown:
        return
    cells = [
        (
            row.name,
            " × ".join(map(str, row.shape)),
            _ONLY[row.only] if row.only else f"{row.relative:.3g}",
            "" if row.cosine is None else f"{row.cosine:.4f}",
            "" if row.rank is None else str(row.rank),
        )
        for row in shown
    ]
    console = Console(highlight=False, markup=False)
    made = table(("weight", "shape", "‖B − A‖ / ‖A‖", "cosine", "rank of B − A"), cells)
    typer.echo()
    console.print(made if console.is_terminal else plain(made), soft_wrap=not console.is_terminal)


def _plot(rows: Sequence[Row], one: Path, other: Path, path: Path) -> None:
    """Draw relative norm, cosine and rank of each weight, in order."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.only and math.isfinite(row.relative)]
    ranked = any(row.rank is not None for row in shown)
    figure = Figure(figsize=(9, 6.5 if ranked else 4.5), layout="constrained")
    axes = figure.subplots(3 if ranked else 2, 1, sharex=True)
    figure.suptitle(f"A = {one.name}, B = {other.name}: {len(shown)} weights in order")
    places = range(len(shown))
    axes[0].plot(places, [row.relative for row in shown], ".", markersize=4)
    axes[0].set_ylabel("‖B − A‖ / ‖A‖")
    angles = [math.nan if row.cosine is None else row.cosine for row in shown]
    axes[1].plot(places, angles, ".", markersize=4)
    axes[1].set_ylabel("cosine(A, B)")
    if ranked:
        axes[2].plot(places, [row.rank if row.rank else 0 for row in shown], ".", markersize=4)
        axes[2].set_ylabel("rank of B − A")
    axes[-1].set_xlabel("weight")
    if len(shown) <= 40:
        axes[-1].set_xticks(list(places), [row.name for row in shown], rotation=90, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
