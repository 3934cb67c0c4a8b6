"""Print results of the log's commands: tables on a terminal, elsewhere one line per hit."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from modgraft.log import Answer, Diagnostic, Hit
    from modgraft.log.index.indexer import Indexed
    from modgraft.log.index.query import Owed

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, which a terminal would interpret: a note is shown as text."""

BARE = re.compile(r"\s*[-*+]\s+\[\w+\]:?\s*")
"""An event without arguments and result."""

SHOWN = 5
"""Lines of an event shown in a table."""

WHEN = 10
"""Characters of a time that are shown: the day."""


def clean(text: str) -> str:
    """Replace the control characters of a text."""
    return CONTROL.sub("�", text)


def show_hits(hits: Sequence[Hit], as_json: bool) -> None:
    """Print events and passages, each with its file, line and text."""
    if as_json:
        _json(hits)
        return
    console = _console()
    what = _lines if console.is_terminal else _first
    rows = [(hit.when[:WHEN], hit.place, what(hit.text)) for hit in hits]
    _print(console, ("when", "where", "what"), rows, "nothing is recorded that fits")


def show_queue(queue: Sequence[Owed], as_json: bool) -> None:
    """Print the reading queue."""
    if as_json:
        _json(queue)
        return
    console = _console()
    rows = [(o.status, o.owed, f"@{o.key}", o.title, f"{o.note}:{o.line}") for o in queue]
    if console.is_terminal:  # two columns fewer
        rows = [
            (owed or status, f"{key}\n{title}".strip(), at) for status, owed, key, title, at in rows
        ]
    _print(console, ("status", "source", "where"), rows, "no source is in the queue")


def show_answer(answer: Answer, as_json: bool) -> None:
    """Print an answer with the lines that support it, or why there is none."""
    if as_json:
        print(json.dumps(asdict(answer), indent=1, ensure_ascii=False))
        return
    console = _console()
    refused = answer.refused is not None
    console.print(Text("No answer: " + clean(answer.text) if refused else clean(answer.text)))
    for line in answer.evidence:
        place = Text(f"{clean(line.note)}:{line.line}", style="cyan")
        console.print(Text.assemble("  ", place, "  ", clean(line.quote.strip())))
    for remark in answer.remarks:
        console.print(Text(clean(remark), style="dim"))


def show_problems(problems: Sequence[Diagnostic], as_json: bool) -> None:
    """Print one line per problem, then how many there are of each severity."""
    if as_json:
        names = ("note", "line", "severity", "code", "message")
        print(json.dumps([{n: getattr(one, n) for n in names} for one in problems], indent=1))
        return
    console, style = _console(), {"error": "red", "warning": "yellow", "info": "dim"}
    for one in problems:
        console.print(Text(clean(str(one)), style=style[one.severity]))
    counts = Counter(one.severity for one in problems)
    said = [f"{counts[name]} {name}{'s' * (counts[name] > 1)}" for name in style if counts[name]]
    console.print(Text(", ".join(said) or "nothing to mend", style="dim"))


def show_indexed(made: Indexed) -> None:
    """Print the report of an indexing, with one line per problem."""
    console = _console()
    for problem in made.problems:
        console.print(Text(clean(problem)))
    console.print(Text(str(made)))


def _json(found: Iterable[Any]) -> None:
    print(json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False))


def _first(text: str) -> str:
    """Return the first line, with the next if the first is only an event's name."""
    first, _, rest = text.strip().partition("\n")
    below = rest.strip().splitlines()
    if below and BARE.fullmatch(first):
        first, below = f"{first} {below[0].strip()}", below[1:]
    return f"{first} …" if below else first


def _lines(text: str) -> str:
    """Return the first lines, without their common indent."""
    lines = textwrap.dedent(text).strip().splitlines()
    return "\n".join(lines[:SHOWN] + ["…"] * (len(lines) > SHOWN))


def _console() -> Console:
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def _print(
    console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], none: str
) -> None:
    """Print a table on a terminal, else rows with tabs, for other programs."""
    if not console.is_terminal:
        for row in rows:
            print("\t".join(clean(cell) for cell in row))
        return
    if not rows:
        console.print(Text(none, style="dim"))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for header in headers:
        table.add_column(header, overflow="fold", no_wrap=header in ("when", "status"))
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row))
    console.print(table)
    console.print(Text(f"{len(rows)} found", style="dim"))
