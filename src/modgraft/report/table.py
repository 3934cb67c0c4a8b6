"""Lay out the table of results, for the page, for Markdown and for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modgraft.core.errors import DataError, MissingFileError
from modgraft.core.files import write_text
from modgraft.report.family_groups import group_families
from modgraft.report.run import Results, Row, check, read_results, read_run
from modgraft.report.statistics import Chance, Read, best, chance_of, figure, figures

GROUPS = {"main": "Models", "ablation": "Ablations", "control": "Controls (not competitors)"}
NOT_RUN = "not run"
NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: its title on the page and in the terminal, what it reads, and whether rows compete.

    Rows compete for the highest accuracy; no other figure makes one the best. A column of
    `scienceqa` stands in tables of its questions alone.
    """

    title: str
    short: str
    read: Read
    wins: bool = False
    scienceqa: bool = False


PERCENT = (
    Column("Image questions", "Image", lambda m: m.image, wins=True),
    Column("All questions", "All", lambda m: m.accuracy, wins=True),
    Column("ROUGE-L", "ROUGE-L", lambda m: m.rouge_l),
    Column("BLEU-1", "BLEU-1", lambda m: m.bleu_1, scienceqa=True),
    Column("BLEU-4", "BLEU-4", lambda m: m.bleu_4, scienceqa=True),
    Column("Exact rationale", "Exact", lambda m: m.exact),
    Column("Facts", "Facts", lambda m: m.facts),
)


def _columns(results: Results) -> tuple[list[Column], list[Column]]:
    """Return the columns of a run's table, and those that no row has a figure for."""
    asked = [column for column in PERCENT if results.scienceqa or not column.scienceqa]
    kept = [c for c in asked if any(figure(row, c.read) for row in results.rows)]
    return kept, [c for c in asked if c not in kept]


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and whether its row is among the best in this column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """One row of the table; `cells` is empty if the row was not run."""

    row: Row
    cells: list[Cell]
    marks: list[str]


@dataclass(frozen=True)
class ResultTable:
    """Lines by group, in the order of `GROUPS`; `dropped` are columns that no row has."""

    columns: list[str]
    groups: list[tuple[str, list[Line]]]
    chance: list[str] | None
    dropped: list[str]
    remarks: list[str]


def build(results: Results, chance: Chance | None = None) -> ResultTable:
    """Lay out results: percentages as mean ± spread, then trained parameters and time."""
    kept, dropped = _columns(results)
    winners = {c.title: best(results.rows, c.read) for c in kept if c.wins}
    groups = []
    for group, title in GROUPS.items():
        lines = [_line(row, kept, winners, results) for row in results.rows if row.group == group]
        if lines:
            groups.append((title, lines))
    guess = None
    if chance is not None:
        known = {"Image questions": chance.image, "All questions": chance.all}
        row = [known.get(column.title) for column in kept]
        guess = [NONE if value is None else f"{value:.1f}" for value in row] + [NONE, NONE]
    return ResultTable(
        [c.title for c in kept] + ["Trained parameters", "Time"],
        groups,
        guess,
        [c.title for c in dropped],
        _remarks(results, chance, winners),
    )


def _line(row: Row, kept: list[Column], winners: dict[str, set[str]], results: Results) -> Line:
    if not row.seeds:
        return Line(row, [], [NOT_RUN])
    cells = []
    for column in kept:
        found = figure(row, column.read)
        won = row.key in winners.get(column.title, ())
        cells.append(Cell(NONE if found is None else str(found), won))
    trained, size, time = (
        None if (found := figure(row, read)) is None else found.mean
        for read in (lambda m: m.trained, lambda m: m.parameters, lambda m: m.seconds)
    )
    share = f" ({100 * trained / size:.0f} %)" if trained and size and trained < size else ""
    cells.append(Cell(count(trained) + share))
    cells.append(Cell(seconds(time)))
    marks = ["leak"] if row.leaks else []
    if len(row.seeds) < len(results.seeds):
        marks.append(f"{len(row.seeds)} of {len(results.seeds)} seeds")
    return Line(row, cells, marks)


def _remarks(results: Results, chance: Chance | None, winners: dict[str, set[str]]) -> list[str]:
    remarks = []
    most = max((len(row.seeds) for row in results.rows), default=0)
    if most > 1:
        remarks.append(f"Mean ± spread (sample standard deviation) over {most} seeds, in percent.")
        if any(winners.values()):
            remarks.append(
                "Bold: the highest mean, and every row that its seeds do not set apart from it "
                "(Welch's test, 5 %). Controls do not compete."
            )
        else:
            remarks.append("No row is in bold: the seeds set none apart from all others.")
    else:
        remarks.append("In percent, of one seed: no spread, so no row is called best.")
    if chance is not None:
        what = f"{chance.n_image} image questions" if chance.n_image else f"{chance.n} questions"
        remarks.append(
            f"The spread is not the error of a finite test set: {what} leave up to "
            f"± {chance.sampling_error():.1f} points (one standard error). "
            "Chance is the expectation of a uniform guess among each question's own options."
        )
    else:
        remarks.append("Chance is not known: the run has no predictions.")
    if any(row.leaks for row in results.rows):
        remarks.append(
            "Leak: the model was shown part of what it had to write; its figures are no result."
        )
    if any(not row.seeds for row in results.rows):
        remarks.append(f"“{NOT_RUN}”: the run holds nothing of this row.")
    remarks.append(f"“{NONE}”: not measured.")
    return remarks


def table(results: Results | Mapping[str, Any] | Path | str) -> str:
    """Return the table of results as Markdown.

    Args:
        results: A run's folder (chance is then computed from its predictions), or the content of
            a `results.json`.

    Raises:
        DataError: The results do not have the right schema, or there are none yet.
    """
    chance = None
    if isinstance(results, (Path, str)):
        run = read_run(Path(results))
        if run.results is None:
            raise DataError(
                "the run was interrupted before its results were written",
                file=run.folder / "results.json",
                remedy="Let the run finish: the same command resumes it.",
            )
        results, chance = run.results, chance_of(run)
    elif not isinstance(results, Results):
        results = check(results)
    laid = build(results, chance)
    width = len(laid.columns)
    lines = _markdown_head(laid.columns)
    for title, members in laid.groups:
        lines.append(f"| *{title}* |" + " |" * width)
        for line in members:
            marks = "".join(f" ({mark})" for mark in line.marks)
            cells = [f"**{c.text}**" if c.best else c.text for c in line.cells] or [""] * width
            lines.append(f"| {_escaped(line.row.title)}{marks} | " + " | ".join(cells) + " |")
    if laid.chance is not None:
        lines.append("| *Chance* | " + " | ".join(laid.chance) + " |")
    notes = [f"{_escaped(row.title)}: {_escaped(row.note)}" for row in results.rows if row.note]
    return "\n".join(
        [*lines, "", " ".join(laid.remarks), *(["", "; ".join(notes) + "."] if notes else [])]
    )


def families(results: Results) -> str:
    """Return accuracy by family as Markdown, mean ± spread over seeds."""
    results = group_families(results)
    names = _family_names(results)
    lines = _markdown_head(names)
    for row in results.rows:
        cells = figures(row, lambda m: m.families, names)
        shown = " | ".join(NONE if cell is None else str(cell) for cell in cells)
        lines.append(f"| {_escaped(row.title)}{' (leak)' if row.leaks else ''} | {shown} |")
    return "\n".join(lines)


def _markdown_head(columns: Sequence[str]) -> list[str]:
    """Begin a table whose first column has no title, and whose others are numbers."""
    return ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]


def _family_names(results: Results) -> list[str]:
    """Return the families that any row has an accuracy of, each once, in order."""
    return list(
        dict.fromkeys(f for row in results.rows for m in row.seeds.values() for f in m.families)
    )


def _escaped(text: str) -> str:
    """Escape a text for Markdown and HTML."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(text.split()))


def insert(page: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- results:name -->` and `<!-- /results -->` in a page.

    Raises:
        MissingFileError: There is no such page.
        DataError: The page does not have exactly one such pair of markers, or is no text.
    """
    page = Path(page)
    remedy = f"Put <!-- results:{name} --> and <!-- /results --> on lines of their own."
    if not page.is_file():
        raise MissingFileError("there is no such page", file=page, remedy="Name one that is there.")
    try:
        old = page.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error})", file=page, remedy=remedy) from error
    pattern = re.compile(
        rf"(<!-- results:{re.escape(name)} -->\n)(.*?)(<!-- /results -->)", re.DOTALL
    )
    found = pattern.findall(old)
    if len(found) != 1:
        raise DataError(
            f"{len(found)} places for the results of {name!r}, where one is needed",
            file=page,
            remedy=remedy,
        )
    new = pattern.sub(lambda match: f"{match[1]}{text}\n{match[3]}", old)
    write_text(page, new)


def count(number: float | None) -> str:
    """Format a number of parameters for people: 1.04 M, 37 k, 512."""
    if number is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{number:.0f}"


def seconds(number: float | None) -> str:
    """Format a duration for people: 48 s, 8.6 min, 2.1 h."""
    if number is None:
        return "–"
    if number < 90:
        return f"{number:.0f} s"
    return f"{number / 60:.1f} min" if number < 5400 else f"{number / 3600:.1f} h"


# -- in the terminal ---------------------------------------------------------------------------


def print_results(run: Path, console: Console) -> None:
    """Print every row's figures, mean over seeds, then its accuracy by family.

    Of ScienceQA's questions, its accuracy by their published columns is between. A table that is
    too wide for the terminal comes in several, each with some of the columns.
    """
    results = group_families(read_results(run / "results.json"))
    tested, seeds = results.tested, ", ".join(map(str, results.seeds))
    title = f"{tested[0].upper()}{tested[1:]}, decoded freely, percent; seed {seeds}"
    tables: dict[str, dict[str, Read]] = {title: {c.short: c.read for c in _columns(results)[0]}}
    if results.scienceqa:
        names = dict.fromkeys(c for r in results.rows for m in r.seeds.values() for c in m.columns)
        tables["Accuracy by column"] = {c: lambda m, c=c: m.columns.get(c) for c in names}
    tables["Accuracy by family"] = {
        f: lambda m, f=f: m.families.get(f) for f in _family_names(results)
    }
    for title, columns in tables.items():
        for part in _fitting(title, results, columns, console):
            console.print(part)


def terminal_table(title: str, first: str, columns: Iterable[str]) -> Table:
    """Begin a table of numbers, with titles for its first column and for the others."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(escape(name), justify="right", no_wrap=True)
    return table


def _fitting(
    title: str, results: Results, columns: Mapping[str, Read], console: Console
) -> Iterator[Table]:
    """Lay out columns in as many tables as the console's width asks for."""
    wide, fitting, part = console.options.update_width(10_000), dict[str, Read](), None
    for name, read in columns.items():
        longer = _terminal_table(title, results, fitting | {name: read})
        if part is not None and console.measure(longer, options=wide).maximum > console.width:
            yield part
            title, fitting = "", {}
        fitting[name] = read
        part = _terminal_table(title, results, fitting)
    if part is not None:
        yield part


def _terminal_table(title: str, results: Results, columns: dict[str, Read]) -> Table:
    table = terminal_table(title, "", columns)
    for row in results.rows:
        leak = " [red](leak)[/red]" if row.leaks else ""
        found = [figure(row, read) for read in columns.values()]
        cells = [NONE if value is None else f"{value.mean:.1f}" for value in found]
        style = "bold" if row.group == "main" else None
        table.add_row(escape(row.title) + leak, *cells, style=style)
    return table
