"""A run's results in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modgraft.report.run import Metrics, Results, read_results

Read = Callable[[Metrics], float | None]

FIGURES: dict[str, Read] = {
    "Image": lambda m: m.image,
    "All": lambda m: m.accuracy,
    "ROUGE-L": lambda m: m.rouge_l,
    "Exact": lambda m: m.exact,
    "Facts": lambda m: m.facts,
}


def show(run: Path, console: Console) -> None:
    """Print every row's figures, mean over seeds, then its accuracy by family."""
    results = read_results(run / "results.json")
    names = {f: None for row in results.rows for m in row.seeds.values() for f in m.families}
    families: dict[str, Read] = {f: lambda m, f=f: m.families.get(f) for f in names}
    seeds = ", ".join(map(str, results.seeds))
    title = f"Test questions, decoded freely, percent; seed {seeds}"
    console.print(_table(title, results, FIGURES))
    console.print(_table("Accuracy by family", results, families))


def _table(title: str, results: Results, columns: dict[str, Read]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in results.rows:
        leak = " [red](leak)[/red]" if row.leaks else ""
        cells = [_mean([read(m) for m in row.seeds.values()]) for read in columns.values()]
        style = "bold" if row.group == "main" else None
        table.add_row(escape(row.title) + leak, *cells, style=style)
    return table


def _mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.1f}" if known else "–"
