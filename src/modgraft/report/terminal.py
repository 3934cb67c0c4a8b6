"""A run's results in the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from modgraft.report.run import Results, read_results

FIGURES = ("Image", "All", "ROUGE-L", "Exact", "Facts")


def show(run: Path, console: Console) -> None:
    """Print the rows' figures, mean over seeds, and accuracy by family."""
    results = read_results(run / "results.json")
    seeds = ", ".join(map(str, results.seeds))
    families = list(
        dict.fromkeys(f for row in results.rows for m in row.seeds.values() for f in m.families)
    )
    table = Table(
        title=f"Test questions, free-running, percent (seeds {seeds})", title_justify="left"
    )
    table.add_column("")
    for title in (*FIGURES, *families):
        table.add_column(title, justify="right")
    for row in results.rows:
        runs = list(row.seeds.values())
        cells = [
            _mean([m.image for m in runs]),
            _mean([m.accuracy for m in runs]),
            _mean([m.rouge_l for m in runs]),
            _mean([m.exact for m in runs]),
            _mean([m.facts for m in runs]),
            *(_mean([m.families.get(f) for m in runs]) for f in families),
        ]
        title = f"{row.title} [red](a leak, no result)[/red]" if row.leaks else row.title
        table.add_row(title, *cells, style="bold" if row.group == "main" else None)
    console.print(table)


def _mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.1f}" if known else "–"


__all__ = ["Results", "show"]
