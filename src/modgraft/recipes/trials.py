"""Run a recipe over several seeds, and write its results as a table and a picture.

Each recipe's module holds its idea and ends in a :class:`Recipe`. Each seed is a job in a process
of its own, and an interrupted job resumes. The run's folder then holds ``run.json`` (the settings,
seeds and recipe), ``results.json``, ``table.md``, ``plot.png``, ``plot-dark.png`` and, for each
seed, a folder with the files of its trainings.
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
from rich.console import Console
from rich.markup import escape

from modgraft.core.config import mismatch
from modgraft.core.errors import CheckpointError, DataError, UnknownNameError, listed
from modgraft.core.files import Lock, folder_path, read_json, write_json, write_text
from modgraft.log.record.runs import RunNote, plain, recorded, settings_row
from modgraft.recipes.folder import run_folder
from modgraft.recipes.workers import Job, side_by_side
from modgraft.report.figures import Scheme, draw
from modgraft.report.table import print_fitted, terminal_table

NAMES: tuple[str, ...] = (
    "arithmetic", "bigram", "chargpt", "code_book", "flan_vs_modules",
    "instruction_prompt_tuning", "madx", "optimizers", "students",
)  # fmt: skip
"""Recipes that this module runs: each defines ``RECIPE`` in ``modgraft/recipes/NAME/recipe.py``."""


@dataclass(frozen=True)
class Recipe:
    """An experiment that is repeated over seeds.

    Attributes:
        name: The name of its package, its command and, by default, its run's folder.
        title: One line that describes it.
        rows: Row key → the row's title, in the table's order.
        columns: Column key → the column's header.
        settings: The default settings, a frozen dataclass of plain values.
        scaled: The settings that ``--quick`` scales down → the smallest value of each.
        trial: ``(folder, settings, seed)`` → ``{"rows": {row: {column: number}}, "series": …}``;
            runs in a process with one torch thread, and resumes from what it saved in ``folder``.
        paint: Draws the contents of ``results.json`` on a figure, in a scheme's colours.
        size: The picture's size in inches.
        formats: Column key → format of its numbers, where it is not ``.1f``.
        notes: Sentences under the table: what is measured, on how many examples, what chance gives.
        sample: ``(folder, text, tokens=, temperature=, top_k=, top_p=, seed=)`` → what a model of
            the run writes after a text, piece by piece; None where there is nothing to write.
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
    sample: Callable[..., Iterator[str]] | None = None

    def smaller(self, share: float) -> Any:
        """Scale data and steps of the default settings down to ``share``, for a quick look."""
        values = {
            name: max(least, round(share * getattr(self.settings, name)))
            for name, least in self.scaled.items()
        }
        return replace(self.settings, **values)


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in NAMES:
        raise UnknownNameError.among("recipe", name, NAMES)
    return import_module(f"modgraft.recipes.{name}.recipe").RECIPE


def run(
    recipe: Recipe,
    folder: Path,
    settings: Any,
    seeds: Sequence[int],
    *,
    jobs: int = 2,
    fresh: bool = False,
    console: Console | None = None,
    note: bool = True,
) -> dict[str, Any]:
    """Run the seeds that are not done, then write results, table and pictures.

    Calling it again resumes an interrupted run; more seeds may be added to a finished one.

    Args:
        recipe: The recipe.
        folder: The run's folder.
        settings: An instance of the recipe's settings.
        seeds: The seeds; each is one trial.
        jobs: The number of processes at a time, with one thread each.
        fresh: Whether to delete the run in the folder first.
        console: Where to show progress.
        note: Whether to describe the run and its results in ``note.md``, for the research log.

    Returns:
        The contents of ``results.json``.

    Raises:
        CheckpointError: The folder holds a run of another recipe or with other settings.
        ModgraftError: A seed failed; finished seeds are kept. Or another process has the folder.
    """
    folder_path(folder, "a run")
    with run_folder(folder, fresh=fresh) as lock:
        return _run(recipe, folder, settings, seeds, jobs, lock, console, note)


def _run(
    recipe: Recipe, folder: Path, settings: Any, seeds: Sequence[int], jobs: int, lock: Lock,
    console: Console | None, note: bool,
) -> dict[str, Any]:  # fmt: skip
    """Run the seeds in a folder that is held."""
    began, before = time.monotonic(), _read_run_card(recipe, folder, settings)
    if (folder / "results.json").is_file():
        read_results(folder)  # a damaged one is found before hours of training
    seeds = sorted({*before.get("seeds", ()), *seeds})
    asked = {"recipe": recipe.name, "settings": asdict(settings), "seeds": seeds}
    write_json(folder / "run.json", asked)
    work = [
        Job(
            str(seed), f"{recipe.name}: seed {seed}", run_seed, (recipe.name, folder, seed),
            folder / f"seed{seed}", last_file=folder / f"seed{seed}" / "figures.json",
        )
        for seed in seeds
    ]  # fmt: skip
    done = all(job.done for job in work)
    with _recorded_run(recipe, folder, asked, wanted=note and not done):
        side_by_side(work, jobs, console, lock)
        results = _gather(recipe, folder, asked)
        if not done:
            results["wall_seconds"] += round(time.monotonic() - began, 1)
        write_json(folder / "results.json", results)
        write_report(folder)
    return results


def _recorded_run(
    recipe: Recipe, folder: Path, asked: Mapping[str, Any], *, wanted: bool
) -> AbstractContextManager[None]:
    """Record the run in ``note.md`` of its folder; see `modgraft.log.record.runs`."""

    def about(said: RunNote) -> None:
        said.context["Recipe"] = f"{plain(recipe.title)} ({recipe.name})"
        said.context["Rows"] = listed([plain(title) for title in recipe.rows.values()])
        said.context["Seeds"] = listed([str(seed) for seed in asked["seeds"]])
        said.context["Settings"] = settings_row(asked["settings"])

    def result(said: RunNote) -> None:
        results = read_results(folder)
        lines = list(_table_lines(recipe, results))
        for title, cells in lines:
            pairs = zip(recipe.columns.values(), cells, strict=True)
            said.learned[title] = ", ".join(f"{plain(c)} {cell}" for c, cell in pairs)
        first = next(iter(recipe.columns.values()))
        said.headline = f"{first}: " + ", ".join(f"{title} {cells[0]}" for title, cells in lines)
        said.done["Seeds"] = f"{len(asked['seeds'])} trained and tested, [table.md](table.md)"
        said.learned["How to read"] = plain(_remarks(recipe, results))
        said.figures[folder / "plot.png"] = recipe.title
        said.seconds = results["wall_seconds"]

    return recorded(folder, recipe.name, about, result, wanted=wanted)


def run_seed(name: str, folder: Path, seed: int) -> None:
    """Run the trial of one seed, and write its figures into the seed's folder."""
    recipe = find_recipe(name)
    asked = read_json(folder / "run.json", what="a run", remedy=f"modgraft recipe {name}")
    home = folder / f"seed{seed}"
    figures = recipe.trial(home, type(recipe.settings)(**asked["settings"]), seed)
    for row, found in figures["rows"].items():
        if row not in recipe.rows:
            raise UnknownNameError.among("row", row, recipe.rows)
        for column in found:
            if column not in recipe.columns:
                raise UnknownNameError.among("column", column, recipe.columns)
    write_json(home / "figures.json", figures)


def _read_run_card(recipe: Recipe, folder: Path, settings: Any) -> dict[str, Any]:
    """Read the folder's ``run.json``, if there is one, and refuse another recipe or settings."""
    path = folder / "run.json"
    if not path.is_file():
        return {}
    before = read_json(path, what="a run", remedy="take another --run")
    if before.get("recipe") != recipe.name:
        raise CheckpointError(
            f"{folder} holds a run of {before.get('recipe', 'mmcot')}, not of {recipe.name}; take "
            f"another --run, or --fresh"
        )
    then, now = before["settings"], json.loads(json.dumps(asdict(settings)))
    if differs := [name for name in now if then.get(name) != now[name]]:
        shown = ", ".join(f"{n} {then.get(n)!r}, now {now[n]!r}" for n in differs)
        raise CheckpointError(
            f"{folder} holds a run of other settings ({shown}); take another --run, or --fresh"
        )
    return before


def _gather(recipe: Recipe, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    path, trials = folder / "results.json", {}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for seed in asked["seeds"]:
        home = folder / f"seed{seed}" / "figures.json"
        trials[str(seed)] = read_json(home, what="a seed's figures", remedy="run it again")
    return {
        **asked,
        "title": recipe.title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": before.get("wall_seconds", 0.0),
        "rows": {
            row: {seed: made["rows"][row] for seed, made in trials.items() if row in made["rows"]}
            for row in recipe.rows
        },
        "series": {seed: made.get("series") for seed, made in trials.items()},
    }


# -- table and picture -------------------------------------------------------------------------


def write_report(folder: Path) -> None:
    """Write ``table.md`` and the pictures of a run again."""
    results = read_results(folder)
    recipe = find_recipe(results["recipe"])
    write_text(folder / "table.md", markdown(results) + "\n")
    picture = draw(
        recipe.size, recipe.title, lambda canvas, scheme: recipe.paint(canvas, scheme, results)
    )
    assert picture.dark is not None  # noqa: S101  (by default, both schemes are drawn)
    (folder / "plot.png").write_bytes(picture.light)
    (folder / "plot-dark.png").write_bytes(picture.dark)


def read_results(folder: Path) -> dict[str, Any]:
    """Read a run's ``results.json``.

    Raises:
        MissingFileError: There is none.
        DataError: It is damaged, or is none of a recipe.
    """
    path, remedy = folder / "results.json", "Move it away: modgraft recipe NAME writes it again"
    results = read_json(path, what="results", remedy=remedy)
    wanted = {"recipe": str, "seeds": list, "rows": dict, "series": dict, "wall_seconds": float}
    found = mismatch({name: results.get(name) for name in wanted}, wanted)
    if found is not None:
        raise DataError(f"{found[0]}: {found[1]}", file=path, remedy=remedy)
    return results


def markdown(results: dict[str, Any]) -> str:
    """Return the table of results as Markdown, with the notes under it."""
    recipe = find_recipe(results["recipe"])
    lines = [
        "| | " + " | ".join(recipe.columns.values()) + " |",
        "|---" * len(recipe.columns) + "|---|",
    ]
    lines += [
        f"| {title} | " + " | ".join(cells) + " |" for title, cells in _table_lines(recipe, results)
    ]
    return "\n".join([*lines, "", _remarks(recipe, results)])


def show(folder: Path, console: Console, *, wide: bool = False) -> None:
    """Print a run's table, as `modgraft.report.table.print_fitted` does."""
    results = read_results(folder)
    recipe = find_recipe(results["recipe"])
    table = terminal_table(recipe.title, "", recipe.columns.values())
    for title, cells in _table_lines(recipe, results):
        table.add_row(escape(title), *cells)
    print_fitted(table, console, folder / "table.md", wide=wide)
    console.print(_remarks(recipe, results), highlight=False, markup=False, soft_wrap=True)


def _table_lines(recipe: Recipe, results: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for row, title in recipe.rows.items():
        seeds = results["rows"].get(row, {}).values()
        yield (
            title,
            [
                _cell([s[c] for s in seeds if c in s], recipe.formats.get(c, ".1f"))
                for c in recipe.columns
            ],
        )


def _cell(values: list[float], form: str) -> str:
    if not values:
        return "–"
    text = f"{mean(values):{form}}"
    differ = any(value != values[0] for value in values)
    return f"{text} ± {stdev(values):{form}}" if differ else text


def _remarks(recipe: Recipe, results: dict[str, Any]) -> str:
    seeds = results["seeds"]
    head = f"Mean ± sample standard deviation over {len(seeds)} seeds."
    if len(seeds) == 1:
        head = f"One seed, {seeds[0]}."
    return " ".join([head, *recipe.notes])
