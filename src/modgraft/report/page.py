"""Write the HTML page of a run: one file without scripts or requests, for light and dark."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from modgraft.core.files import write_text
from modgraft.report import attention, figures, statistics, wrong_answers
from modgraft.report.family_groups import group_families, merge_rare, rare_families
from modgraft.report.figures import Picture
from modgraft.report.run import Results, Row, Run, read_run
from modgraft.report.statistics import Chance, ReadSeveral, chance_of, figure
from modgraft.report.table import NONE, build

MOST_QUESTIONS = 6
"""The number of questions whose gates the page shows; gates.json has all."""

COLUMNS = {
    "NAT": "natural science", "SOC": "social science", "LAN": "language science",
    "TXT": "has a hint", "IMG": "has an image", "NO": "has neither", "G1-6": "school grades 1 to 6",
    "G7-12": "school grades 7 to 12", "Avg": "all questions",
}  # fmt: skip
"""Column → its questions, in words."""


@dataclass(frozen=True)
class Breakdown:
    """Accuracy by column or family: a figure of the main rows, all rows as numbers, and chance.

    `empty` are names without a measurement, `left_out` are rows without a bar in the figure;
    `unfolded` is whether the numbers are what a reader has come for.
    """

    title: str
    picture: Picture | None
    names: list[str]
    meanings: list[str]
    lines: list[tuple[Row, list[str]]]
    chance: list[str] | None
    empty: list[str]
    left_out: list[str]
    unfolded: bool


def write(folder: Path | str) -> Path:
    """Write `report.html` and its PNGs into a run folder, and return the page's path.

    The page says what the run does not hold. Nothing is written until everything is read and
    drawn, and an older page is replaced in one step.

    Raises:
        MissingFileError: The folder does not exist, or holds no run.
        DataError: A file of the run cannot be read; the message names file, line and field.
    """
    folder = Path(folder)
    run = read_run(folder)
    pictures: dict[str, Picture] = {}
    text = _render(run, pictures)
    for name, picture in pictures.items():
        figures.save(picture, folder / f"{name}.png")
    write_text(folder / "report.html", text)
    return folder / "report.html"


def _render(run: Run, pictures: dict[str, Picture]) -> str:
    results, chance = run.results, chance_of(run)
    content: dict[str, Any] = {
        "run": run,
        "chance": chance,
        "curves": _curves(run, pictures),
        "gates": _gates(run, pictures),
        "gates_left": max(0, len(run.gates) - MOST_QUESTIONS),
        "table": None,
    }
    if results is not None:
        content |= _results(run, results, chance, pictures)
    env = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                      lstrip_blocks=True)  # fmt: skip
    env.filters |= {"png": attention.data_uri, "compact": _compact, "moment": _to_the_minute}
    source = files("modgraft.report")
    # Only the package's style sheet is not escaped.
    style = Markup((source / "page.css").read_text("utf-8"))  # noqa: S704
    return env.from_string((source / "page.html").read_text("utf-8")).render(content, style=style)


def _results(
    run: Run, results: Results, chance: Chance | None, pictures: dict[str, Picture]
) -> dict[str, Any]:
    seen = chance.image if chance else None
    what = "questions with an image"
    n = chance.n_image if chance else 0
    overview = figures.overview(results.rows, lambda m: m.image, seen, what, n)
    if overview is None:
        what, every, n = "all questions", chance.all if chance else None, chance.n if chance else 0
        overview = figures.overview(results.rows, lambda m: m.accuracy, every, what, n)
    if overview is not None:
        pictures["results"] = overview
    main = next((row for row in results.rows if row.group == "main" and row.seeds), None)
    by_seed = {} if main is None else run.predictions.get(main.key, {})
    seed, predictions = min(by_seed.items(), default=(None, []))
    return {
        "table": build(results, chance),
        "overview": overview,
        "overview_of": what,
        "breakdowns": [
            _breakdown(
                results, "column", lambda m: m.columns, chance.columns if chance else {}, pictures
            ),
            _families(results, chance, pictures),
        ],
        "main": main,
        "tiles": _tiles(main, chance) if main is not None else [],
        "counts": wrong_answers.counts(run, results),
        "links": {row.key: _links(run, row) for row in results.rows},
        "classes": wrong_answers.examples(run, predictions),
        "examples_seed": seed,
        "answered": len(predictions),
    }


def _links(run: Run, row: Row) -> dict[int, str]:
    """Return seed → the address of a row's predictions, beside the page."""
    seeds = sorted(run.predictions.get(row.key, ()))
    return {seed: quote(f"seed{seed}/{row.key}/predictions.jsonl") for seed in seeds}


def _tiles(main: Row, chance: Chance | None) -> list[tuple[str, str]]:
    tiles = [
        ("image questions, %", figure(main, lambda m: m.image)),
        ("all questions, %", figure(main, lambda m: m.accuracy)),
        ("ROUGE-L of the rationale", figure(main, lambda m: m.rouge_l)),
        ("rationales exactly right, %", figure(main, lambda m: m.exact)),
    ]
    shown = [(title, str(value)) for title, value in tiles if value is not None]
    if chance is not None and chance.image is not None:
        shown.insert(1, ("chance on image questions, %", f"{chance.image:.1f}"))
    return shown


def _breakdown(
    results: Results,
    what: str,
    read: ReadSeveral,
    levels: Mapping[str, float],
    pictures: dict[str, Picture],
) -> Breakdown:
    measured = [read(metrics) for row in results.rows for metrics in row.seeds.values()]
    asked = list(dict.fromkeys(name for values in measured for name in values))
    names = [n for n in asked if any(values.get(n) is not None for values in measured)]
    by_row = [(row, statistics.figures(row, read, names)) for row in results.rows]
    lines = [
        (row, [NONE if f is None else str(f) for f in found]) for row, found in by_row if any(found)
    ]
    main = [row for row, _ in lines if row.group == "main" and not row.leaks]
    drawn = main[: figures.MOST_BARS]
    picture = figures.bars(drawn, names, read, levels, what)
    if picture is not None:
        pictures["columns" if what == "column" else "families"] = picture
    left_out = [row.title for row, _ in lines if row not in drawn]
    meant = COLUMNS if what == "column" else {}
    meanings = [f"{name}: {meant[name]}" for name in names if name in meant]
    known = [f"{levels[name]:.1f}" if name in levels else NONE for name in names]
    empty, unfolded = [n for n in asked if n not in names], what == "column" and results.scienceqa
    return Breakdown(
        what, picture, names, meanings, lines, known if levels else None, empty, left_out, unfolded
    )


def _families(results: Results, chance: Chance | None, pictures: dict[str, Picture]) -> Breakdown:
    """Break accuracy down by family, where rare ones of very many are one group."""
    levels, rare = {}, rare_families(results)
    if chance is not None:
        guesses = merge_rare(chance.families, chance.family_sizes, rare)
        levels = {name: level for name, level in guesses.items() if level is not None}
    return _breakdown(group_families(results), "family", lambda m: m.families, levels, pictures)


def _curves(run: Run, pictures: dict[str, Picture]) -> list[tuple[str, Picture | None, int]]:
    titles: dict[str, str] = {}
    if run.results:
        titles = {row.key: row.title for row in run.results.rows} | run.results.titles
    curves = []
    for key, seeds in run.curves.items():
        title = titles.get(key, key)
        bad = sum(
            point.loss is not None and not abs(point.loss) < float("inf")
            for points in seeds.values()
            for point in points
        )
        picture = figures.loss(title, seeds)
        if picture is not None:
            pictures[f"loss-{_file_name(key)}"] = picture
        curves.append((title, picture, bad))
    return curves


def _gates(run: Run, pictures: dict[str, Picture]) -> list[attention.QuestionView]:
    shown = [attention.view(seed, gate) for seed, gate in run.gates[:MOST_QUESTIONS]]
    for each in shown:
        pictures[f"gate-{each.seed}-{_file_name(each.gate.id)}"] = each.picture
    return shown


def _file_name(name: str) -> str:
    """Turn a name into a portable file name that cannot leave the folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".") or "_"


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _to_the_minute(written: str) -> str:
    """Shorten a time stamp to the minute; one that is not ISO 8601 stays as it is."""
    try:
        moment = datetime.fromisoformat(written)
    except ValueError:
        return written
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()
