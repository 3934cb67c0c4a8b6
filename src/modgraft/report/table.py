"""Lay out the table of results, for the page, for Markdown and for the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape

from modgraft.core.errors import DataError, MissingFileError
from modgraft.core.files import write_text
from modgraft.core.tables import Markdown, Table
from modgraft.report.family_groups import group_families
from modgraft.report.run import Metrics, Results, Row, check, read_results, read_run
from modgraft.report.statistics import Chance, Read, best, chance_of, figure, figures, interval

GROUPS = {"main": "Models", "ablation": "Ablations", "control": "Controls (not competitors)"}
NOT_RUN = "not run"
NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: its title on the page and in the terminal, and what it reads.

    An accuracy is a share of `questions`, and has an interval. Rows compete for the highest
    accuracy; no other figure makes one the best. A column of `scienceqa` stands in tables of its
    questions alone.
    """

    title: str
    short: str
    read: Read
    questions: Callable[[Chance], int] | None = None
    scienceqa: bool = False

    @property
    def wins(self) -> bool:
        """Whether rows compete in this column."""
        return self.questions is not None


PERCENT = (
    Column("Image questions", "Image", lambda m: m.image, lambda c: c.n_image),
    Column("All questions", "All", lambda m: m.accuracy, lambda c: c.n),
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
    """The text of a cell, its interval, and whether its row is among the best in this column."""

    text: str
    best: bool = False
    interval: str = ""


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
    """Lay out results: percentages as mean ± spread, then what was trained, and time."""
    kept, dropped = _columns(results)
    costs = [c for c in COSTS if _costs_something(c, results)]
    winners = {c.title: best(results.rows, c.read) for c in kept if c.wins}
    groups = []
    for group, title in GROUPS.items():
        rows = [row for row in results.rows if row.group == group]
        lines = [_line(row, kept, costs, winners, results, chance) for row in rows]
        if lines:
            groups.append((title, lines))
    guess = None
    if chance is not None:
        known = {"Image questions": chance.image, "All questions": chance.all}
        row = [known.get(column.title) for column in kept]
        guess = [NONE if value is None else f"{value:.1f}" for value in row] + [NONE] * len(costs)
    return ResultTable(
        [c.title for c in [*kept, *costs]],
        groups,
        guess,
        [c.title for c in dropped],
        _remarks(results, chance, winners),
    )


def _costs_something(column: Cost, results: Results) -> bool:
    found = (figure(row, column.read) for row in results.rows)
    return not column.optional or any(each is not None and each.mean > 0 for each in found)


def _line(
    row: Row,
    kept: list[Column],
    costs: list[Cost],
    winners: dict[str, set[str]],
    results: Results,
    chance: Chance | None,
) -> Line:
    if not row.seeds:
        return Line(row, [], [NOT_RUN])
    cells = []
    for column in kept:
        found = figure(row, column.read)
        won = row.key in winners.get(column.title, ())
        n = column.questions(chance) if chance is not None and column.questions else 0
        ends = "" if found is None or not n else "[{:.1f}, {:.1f}]".format(*interval(found.mean, n))
        cells.append(Cell(NONE if found is None else str(found), won, ends))
    for column in costs:
        found = figure(row, column.read)
        cells.append(Cell(column.write(None if found is None else found.mean)))
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
        what = f"{chance.n_image} image questions of {chance.n}" if chance.n_image else chance.n
        remarks.append(
            "Brackets: the 95 % interval (Wilson) around a row's mean for one test set of this "
            f"size ({what}); the spread over seeds leaves that out."
        )
        remarks.append(
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
    tested = [row for row in results.rows if row.seeds]
    if 0 < sum(figure(row, lambda m: m.trained) is None for row in tested) < len(tested):
        remarks.append("A row without parameters tests the models of another row.")
    remarks.append(f"“{NONE}”: not measured.")
    return remarks


def table(results: Results | Mapping[str, Any] | Path | str) -> Markdown:
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
            cells = [_markdown_cell(cell) for cell in line.cells] or [""] * width
            lines.append(f"| {_escaped(line.row.title)}{marks} | " + " | ".join(cells) + " |")
    if laid.chance is not None:
        lines.append("| *Chance* | " + " | ".join(laid.chance) + " |")
    notes = [f"{_escaped(row.title)}: {_escaped(row.note)}" for row in results.rows if row.note]
    said = [*lines, "", " ".join(laid.remarks), *(["", "; ".join(notes) + "."] if notes else [])]
    return Markdown("\n".join(said))


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return f"{text} {cell.interval}".rstrip()


def families(results: Results) -> Markdown:
    """Return accuracy by family as Markdown, mean ± spread over seeds."""
    results = group_families(results)
    names = _family_names(results)
    lines = _markdown_head(names)
    for row in results.rows:
        cells = figures(row, lambda m: m.families, names)
        shown = " | ".join(NONE if cell is None else str(cell) for cell in cells)
        lines.append(f"| {_escaped(row.title)}{' (leak)' if row.leaks else ''} | {shown} |")
    return Markdown("\n".join(lines))


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


@dataclass(frozen=True)
class Cost:
    """A column of what a row's own training took; an `optional` one goes where all rows have 0."""

    title: str
    read: Read
    write: Callable[[float | None], str] = count
    optional: bool = False


def _frozen(metrics: Metrics) -> int | None:
    if metrics.parameters is None or metrics.trained is None:
        return None
    return metrics.parameters - metrics.trained


COSTS = (
    Cost("Trained parameters", lambda m: m.trained),
    Cost("of these fusion", lambda m: m.fusion, optional=True),
    Cost("Frozen parameters", _frozen, optional=True),
    Cost("Time", lambda m: m.seconds, seconds),
)


# -- in the terminal ---------------------------------------------------------------------------


def print_results(run: Path, console: Console, *, wide: bool = False) -> None:
    """Print every row's figures, mean over seeds, then its accuracy by family; see `print_fitted`.

    Of ScienceQA's questions, its accuracy by their published columns is between.
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
        table = _terminal_table(title, results, columns)
        print_fitted(table, console, run / "report.html", wide=wide)


def terminal_table(title: str, first: str, columns: Iterable[str]) -> Table:
    """Begin a table of numbers, with titles for its first column and for the others.

    Where the terminal is too narrow, the first column alone is folded.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in columns:
        table.add_column(escape(name), justify="right", no_wrap=True)
    return table


def print_fitted(table: Table, console: Console, file: Path, *, wide: bool = False) -> None:
    """Print a table, on a terminal with as many of its columns as there is room for.

    Args:
        table: The table, none of whose columns wraps.
        console: Where to.
        file: Where all columns are, for the line that says which are left out.
        wide: Whether to print all of it, however wide; so it is where there is no terminal.
    """
    everything = console.options.update(max_width=10_000)
    left_out = []
    while (
        console.is_terminal
        and not wide
        and len(table.columns) > 2
        and console.measure(table, options=everything).maximum > console.width
    ):
        left_out.insert(0, str(table.columns.pop().header))
    before, console.width = console.width, console.measure(table, options=everything).maximum
    console.print(table)
    console.width = before
    if left_out:
        more = f"{len(left_out)} more columns ({', '.join(left_out)}): --wide, or {file}"
        console.print(more, markup=False, highlight=False, soft_wrap=True)


def _terminal_table(title: str, results: Results, columns: dict[str, Read]) -> Table:
    table = terminal_table(title, "", columns)
    for row in results.rows:
        leak = " [red](leak)[/red]" if row.leaks else ""
        found = [figure(row, read) for read in columns.values()]
        cells = [NONE if value is None else f"{value.mean:.1f}" for value in found]
        style = "bold" if row.group == "main" else None
        table.add_row(escape(row.title) + leak, *cells, style=style)
    return table
