"""Tables on the terminal or as Markdown, and what each benchmark says in one line each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Claim:
    """One ratio: of what, what was asked of it, what was measured, and the peer's in that run."""

    what: str
    ratio: str
    asked: str = "–"
    peer: str = "–"


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark's output."""
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    parser.add_argument("--claims", type=Path, help="write the ratios to this JSON file as well")


def show(
    tables: Sequence[Table], claims: Sequence[Claim] = (), options: argparse.Namespace | None = None
) -> None:
    """Print ``tables``, and write ``claims`` where they are asked for."""
    for table in tables:
        _print(table, options is not None and options.markdown)
    if options is not None and options.claims is not None:
        options.claims.write_text(json.dumps([asdict(c) for c in claims]), encoding="utf-8")


def read_claims(path: Path) -> list[Claim]:
    """What :func:`show` wrote."""
    return [Claim(**claim) for claim in json.loads(path.read_text(encoding="utf-8"))]


def table_of(claims: Sequence[tuple[str, Claim]]) -> Table:
    """One table of the claims of several benchmarks, each under its benchmark's name."""
    table = Table(title="Every ratio, each of one run")
    for title in ("benchmark", "ratio of", "asked", "modgraft", "the peer"):
        table.add_column(title, justify="left" if title[0] in "br" else "right")
    for name, claim in claims:
        table.add_row(name, claim.what, claim.asked, claim.ratio, claim.peer)
    return table


def _print(table: Table, markdown: bool) -> None:
    if markdown:
        print(as_markdown(table))
    else:
        Console(width=150).print(table)


def as_markdown(table: Table) -> str:
    """A table of a page, under its title."""
    marks = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [[column.header for column in table.columns], marks, *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"{table.title}\n\n{text}\n"
