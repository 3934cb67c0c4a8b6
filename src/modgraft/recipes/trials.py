"""The frame of a recipe that asks a question over seeds: jobs on disk, a table, a picture.

A page under ``recipes/`` holds the idea and ends in a :class:`Recipe`. This runs it: one job a
seed, side by side, each going on where it was interrupted; the run's folder then holds
``run.json`` (what was asked for), ``results.json``, ``table.md``, ``plot.png``, ``plot-dark.png``
and a folder a seed with whatever the recipe's trainings keep.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modgraft.core.errors import CheckpointError, UnknownNameError
from modgraft.core.files import read_json, write_json, write_text
from modgraft.log.record.runs import RunNote, listed, plain, recorded, settings_row
from modgraft.recipes.workers import Job, side_by_side
from modgraft.report.figures import DARK, LIGHT, Scheme, draw

NAMES: tuple[str, ...] = ("arithmetic", "flan_vs_modules", "madx")
"""Pages under ``modgraft/recipes`` that end in a ``RECIPE``."""


@dataclass(frozen=True)
class Recipe:
    """A question asked over seeds.

    Attributes:
        name: of its page, its command and its run's folder.
        title: one line.
        rows: key → what a reader sees, in the table's order.
        columns: key → header of the table.
        settings: a frozen dataclass of plain values, as they are when nothing else is said.
        scaled: the settings that ``--quick`` takes a share of → the least value of each.
        trial: ``(folder, settings, seed)`` → ``{"rows": {row: {column: figure}}, "series": …}``;
            runs in a process of one torch thread, and keeps in ``folder`` what it resumes from.
        paint: draws what ``results.json`` holds on a figure, in a scheme's colours.
        size: of the picture, in inches.
        formats: of a column's figures, where it is not ``.1f``.
        notes: lines under the table: what is measured, on how much, and what chance gives.
    """

    name: str
    title: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    settings: Any
    scaled: Mapping[str, int]
    trial: Callable[[Path, Any, int], dict[str, Any]]
    paint: Callable[[Figure, Scheme, dict[str, Any]], None]
    size: tuple[float, float] = (7.2, 3.6)
    formats: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def smaller(self, share: float) -> Any:
        """The settings with a share of the data and of the steps, for a quick look."""
        values = {
            name: max(least, round(share * getattr(self.settings, name)))
            for name, least in self.scaled.items()
        }
        return replace(self.settings, **values)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UnknownNameError: if there is none.
    """
    if name not in NAMES:
        raise UnknownNameError.among("recipe", name, NAMES)
    return import_module(f"modgraft.recipes.{name}.recipe").RECIPE


def run(
    what: Recipe,
    folder: Path,
    settings: Any,
    seeds: Sequence[int],
    *,
    jobs: int = 2,
    console: Console | None = None,
    note: bool = True,
) -> dict[str, Any]:
    """Run the seeds that are not done, then write results, table and pictures.

    The same command goes on where an interrupted one stopped; more seeds may be added to a run.

    Args:
        what: the recipe.
        folder: the run's.
        settings: an instance of the recipe's settings.
        seeds: one trial each.
        jobs: processes side by side, of one thread each.
        console: where progress is shown.
        note: write what was run and what came out into ``note.md``, for the research log.

    Returns:
        What ``results.json`` holds.

    Raises:
        CheckpointError: the folder holds another recipe's run, or one of other settings.
        ModgraftError: a seed failed; what is done is kept.
    """
    began, before = time.monotonic(), _asked(what, folder, settings)
    seeds = sorted({*before.get("seeds", ()), *seeds})
    asked = {"recipe": what.name, "settings": asdict(settings), "seeds": seeds}
    write_json(folder / "run.json", asked)
    work = [
        Job(
            str(seed), f"{what.name}: seed {seed}", run_seed, (what.name, folder, seed),
            folder / f"seed{seed}", made=folder / f"seed{seed}" / "figures.json",
        )
        for seed in seeds
    ]  # fmt: skip
    done = all(job.done for job in work)
    with _noted(what, folder, asked, wanted=note and not done):
        side_by_side(work, jobs, console)
        results = _gather(what, folder, asked)
        if not done:
            results["wall_seconds"] += round(time.monotonic() - began, 1)
        write_json(folder / "results.json", results)
        write_report(folder)
    return results


def _noted(
    what: Recipe, folder: Path, asked: Mapping[str, Any], *, wanted: bool
) -> AbstractContextManager[None]:
    """The run, recorded in its folder's note."""

    def about(said: RunNote) -> None:
        said.context["Recipe"] = f"{plain(what.title)} ({what.name})"
        said.context["Rows"] = listed([plain(title) for title in what.rows.values()])
        said.context["Seeds"] = listed([str(seed) for seed in asked["seeds"]])
        said.context["Settings"] = settings_row(asked["settings"])

    def result(said: RunNote) -> None:
        results = read_results(folder)
        lines = list(_lines(what, results))
        for title, cells in lines:
            pairs = zip(what.columns.values(), cells, strict=True)
            said.learned[title] = ", ".join(f"{plain(c)} {cell}" for c, cell in pairs)
        first = next(iter(what.columns.values()))
        said.headline = f"{first}: " + ", ".join(f"{title} {cells[0]}" for title, cells in lines)
        said.done["Seeds"] = f"{len(asked['seeds'])} trained and tested, [table.md](table.md)"
        said.learned["How to read"] = plain(_remarks(what, results))
        said.figures[folder / "plot.png"] = what.title
        said.seconds = results["wall_seconds"]

    return recorded(folder, what.name, about, result, wanted=wanted)


def run_seed(name: str, folder: Path, seed: int) -> None:
    """One seed's trial; its figures go into its folder."""
    what = recipe(name)
    asked = read_json(folder / "run.json", what="a run", remedy=f"modgraft recipe {name}")
    home = folder / f"seed{seed}"
    figures = what.trial(home, type(what.settings)(**asked["settings"]), seed)
    for row, found in figures["rows"].items():
        if row not in what.rows:
            raise UnknownNameError.among("row", row, what.rows)
        for column in found:
            if column not in what.columns:
                raise UnknownNameError.among("column", column, what.columns)
    write_json(home / "figures.json", figures)


def _asked(what: Recipe, folder: Path, settings: Any) -> dict[str, Any]:
    """What the folder was asked for before, if anything."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    before = read_json(path, what="a run", remedy="take another --run")
    if before.get("recipe") != what.name:
        raise CheckpointError(
            f"{folder} holds a run of {before.get('recipe', 'mmcot')}, not of {what.name}; take "
            f"another --run, or --fresh"
        )
    then, now = before["settings"], json.loads(json.dumps(asdict(settings)))
    if differs := [name for name in now if then.get(name) != now[name]]:
        shown = ", ".join(f"{n} {then.get(n)!r}, now {now[n]!r}" for n in differs)
        raise CheckpointError(
            f"{folder} holds a run of other settings ({shown}); take another --run, or --fresh"
        )
    return before


def _gather(what: Recipe, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    path, trials = folder / "results.json", {}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for seed in asked["seeds"]:
        home = folder / f"seed{seed}" / "figures.json"
        trials[str(seed)] = read_json(home, what="a seed's figures", remedy="run it again")
    return {
        **asked,
        "title": what.title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": before.get("wall_seconds", 0.0),
        "rows": {
            row: {seed: made["rows"][row] for seed, made in trials.items() if row in made["rows"]}
            for row in what.rows
        },
        "series": {seed: made.get("series") for seed, made in trials.items()},
    }


# -- what is shown -----------------------------------------------------------------------------


def write_report(folder: Path) -> None:
    """Write ``table.md`` and the pictures of a run again."""
    results = read_results(folder)
    what = recipe(results["recipe"])
    write_text(folder / "table.md", markdown(results) + "\n")
    picture = draw(
        what.size, what.title, lambda canvas, scheme: what.paint(canvas, scheme, results),
        schemes=(LIGHT, DARK),
    )  # fmt: skip
    assert picture.dark is not None  # noqa: S101  (both schemes were asked for)
    (folder / "plot.png").write_bytes(picture.light)
    (folder / "plot-dark.png").write_bytes(picture.dark)


def read_results(folder: Path) -> dict[str, Any]:
    """What a run's ``results.json`` holds."""
    return read_json(folder / "results.json", what="results", remedy="modgraft recipe NAME")


def markdown(results: dict[str, Any]) -> str:
    """The table, and under it what it was measured on."""
    what = recipe(results["recipe"])
    lines = [
        "| | " + " | ".join(what.columns.values()) + " |",
        "|---" * len(what.columns) + "|---|",
    ]
    lines += [f"| {title} | " + " | ".join(cells) + " |" for title, cells in _lines(what, results)]
    return "\n".join([*lines, "", _remarks(what, results)])


def show(folder: Path, console: Console) -> None:
    """Print a run's table."""
    results = read_results(folder)
    what = recipe(results["recipe"])
    table = Table(title=what.title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for header in what.columns.values():
        table.add_column(header, justify="right")
    for title, cells in _lines(what, results):
        table.add_row(escape(title), *cells)
    console.print(table)
    console.print(_remarks(what, results), highlight=False, markup=False, soft_wrap=True)


def _lines(what: Recipe, results: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for row, title in what.rows.items():
        seeds = results["rows"].get(row, {}).values()
        yield (
            title,
            [
                _cell([s[c] for s in seeds if c in s], what.formats.get(c, ".1f"))
                for c in what.columns
            ],
        )


def _cell(values: list[float], form: str) -> str:
    if not values:
        return "–"
    text = f"{mean(values):{form}}"
    differ = any(value != values[0] for value in values)
    return f"{text} ± {stdev(values):{form}}" if differ else text


def _remarks(what: Recipe, results: dict[str, Any]) -> str:
    seeds = results["seeds"]
    head = f"Mean ± sample standard deviation over {len(seeds)} seeds."
    if len(seeds) == 1:
        head = f"One seed, {seeds[0]}."
    return " ".join([head, *what.notes])
