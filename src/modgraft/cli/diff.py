"""``modgraft diff``: how two modules, or two checkpoints, differ, layer by layer."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modgraft.cli.merge import host_of, kind_of, shown_progress
from modgraft.cli.options import Strict

if TYPE_CHECKING:
    from modgraft.store.merging.diff import Row

_ONLY = {
    "A": "only in A", "B": "only in B", "shape": "another shape", "type": "other whole numbers",
    "NaN": "NaN or infinity",
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
    strict: Strict = True,
    every: Annotated[bool, typer.Option("--all", help="Show also what is equal.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file, a PNG or SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Show what differs between A and B: how much, in which direction, in how many directions.

    The norm of the difference is relative to A; the cosine is that of the angle between both. Of
    modules, the changes of weights are compared, whatever makes them, or of adapters and prompts
    their own tensors; and the parts of the host, such as heads, that trained beside them.

    [bold]Examples[/bold]

      modgraft diff modules/qa modules/qa-longer --base ./my-model

      modgraft diff ./seed0 ./seed1 --base ./pretrained --plot diff.png

      modgraft diff ./before ./after --ranks --json
    """
    from modgraft.store.merging.diff import compare_checkpoints, compare_modules, compare_tensors
    from modgraft.store.merging.folders import load_apart

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--plot {plot}: a picture's name ends in .png, .svg or .pdf")
    kind = kind_of([one, other])
    if kind == "modules":
        host, _ = host_of([one, other], base)
        a, b = load_apart(host, [one, other], strict=strict)
        rows = compare_modules(host, a.name, b.name) + compare_tensors(a.head, b.head)
    else:
        with shown_progress("comparing", as_json) as progress:
            rows = compare_checkpoints(one, other, base, ranks=ranks, progress=progress)
    if as_json:
        typer.echo(json.dumps({"compared": kind, "rows": [_plain(row) for row in rows]}, indent=2))
    else:
        _print(rows, kind, every)
    if plot is not None:
        from modgraft.core.files import writing

        with writing(plot):
            _plot(rows, one, other, plot)
        if not as_json:
            typer.echo(f"\nPicture: {plot}")


def _plain(row: "Row") -> dict[str, Any]:
    """Return a row for JSON, which has no infinity."""
    said = asdict(row)
    return said | {"relative": None if math.isinf(row.relative) else row.relative}


def _print(rows: "Sequence[Row]", kind: str, every: bool) -> None:
    from modgraft.core.tables import table

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
    console.print(made if console.is_terminal else str(made), soft_wrap=not console.is_terminal)


def _plot(rows: "Sequence[Row]", one: Path, other: Path, path: Path) -> None:
    """Draw relative norm, cosine and rank of each weight, in order."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.only and math.isfinite(row.relative)]
    ranked = any(row.rank is not None for row in shown)
    figure = Figure(figsize=(9, 6.5 if ranked else 4.5), layout="constrained")
    axes = figure.subplots(3 if ranked else 2, 1, sharex=True)
    more = f", {len(rows) - len(shown)} more cannot be drawn" if len(rows) > len(shown) else ""
    figure.suptitle(f"A = {one.name}, B = {other.name}: {len(shown)} weights in order{more}")
    places = range(len(shown))
    axes[0].plot(places, [row.relative for row in shown], ".", markersize=4)
    axes[0].set_ylabel("‖B − A‖ / ‖A‖")
    angles = [math.nan if row.cosine is None else row.cosine for row in shown]
    axes[1].plot(places, angles, ".", markersize=4)
    axes[1].set_ylabel("cosine(A, B)")
    if ranked:
        axes[2].plot(
            places, [math.nan if row.rank is None else row.rank for row in shown], ".", markersize=4
        )
        axes[2].set_ylabel("rank of B − A")
    step = max(1, -(-len(shown) // 40))  # every so-manieth has its name
    ticks = list(places)[::step]
    axes[-1].set_xticks(ticks, [shown[i].name for i in ticks], rotation=90, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
