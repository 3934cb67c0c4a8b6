"""Run the recipe: prepare data, train models and test rows as resumable jobs, then report.

A run's folder holds ``run.json`` (the settings, rows and seeds), ``results.json``, the report and,
for each seed, ``data/`` in ScienceQA's layout, a folder for each model, and a folder of predictions
for each row. Once the data is prepared, all later jobs read the same files whatever its source.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import modgraft as mg
from modgraft.core.errors import CheckpointError, UnknownNameError
from modgraft.core.files import Lock, folder_path, read_json, write_json
from modgraft.data.digits import facts
from modgraft.log.record.runs import command, commit, versions
from modgraft.recipes.folder import run_folder
from modgraft.recipes.mmcot.data import (
    check,
    images_done_file,
    load_questions,
    load_skipped,
    load_strips,
    needs_features,
    notes,
    prepare_images,
    prepare_text,
    settings_of,
    tested_split,
    text_done_file,
)
from modgraft.recipes.mmcot.depth import depth_file, measure_depth
from modgraft.recipes.mmcot.metrics import (
    COLUMNS,
    DIGITS_COLUMNS,
    evaluate_predictions,
    write_predictions,
)
from modgraft.recipes.mmcot.nets import NO_GATES, gates, predict, read_card, train_net
from modgraft.recipes.mmcot.note import recorded_run, task
from modgraft.recipes.mmcot.recipe import ROWS, Settings, nets_of, steps_of
from modgraft.recipes.workers import Job, side_by_side
from modgraft.report.page import write as write_report
from modgraft.report.run import read_results

COSTS = ("parameters", "trained", "fusion", "seconds")
"""What the training of a model took, as its ``net.json`` says."""


def run(
    folder: Path,
    settings: Settings,
    rows: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int = 2,
    evaluate_only: bool = False,
    fresh: bool = False,
    console: Console | None = None,
    note: bool = True,
) -> dict[str, Any]:
    """Train what is not trained yet, test every row, and write ``results.json`` and the report.

    Calling it again resumes an interrupted run, and does nothing once all is done. More rows or
    seeds may be added to a run. Other settings are refused once a model has begun to train; only
    ``skip_bad`` may change at any time.

    Unless ``note`` is false, ``note.md`` describes the run and its results. With ``fresh``, the run
    in the folder is deleted first.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UnknownNameError: There is no such row.
        DataError: The data cannot be used, or ``results.json`` is damaged; nothing is written.
        CheckpointError: The folder holds a run with other settings.
        ModgraftError: A job failed; finished jobs are kept. Or another process has the folder.
    """
    for row in rows:
        if row not in ROWS:
            raise UnknownNameError.among("row", row, ROWS)
    check(settings, rows)
    folder_path(folder, "a run")
    if evaluate_only:
        for seed in seeds:
            for net in nets_of(rows):
                read_card(folder, seed, net.key)
    with run_folder(folder, fresh=fresh) as lock:
        return _run(folder, settings, rows, seeds, jobs, evaluate_only, lock, console, note)


def _run(
    folder: Path, settings: Settings, rows: Sequence[str], seeds: Sequence[int], jobs: int,
    evaluate_only: bool, lock: Lock, console: Console | None, note: bool,
) -> dict[str, Any]:  # fmt: skip
    """Train and test in a folder that is held."""
    path = folder / "results.json"
    if path.is_file():
        read_results(path)  # a damaged one is found before hours of training
    began, asked = time.monotonic(), _write_run_card(folder, settings, rows, seeds)
    todo = []
    for before, seed in zip([None, *seeds], seeds, strict=False):
        if not evaluate_only:
            todo += _training(folder, settings, rows, seed, before)
        todo += _testing(folder, settings, rows, seed, again=evaluate_only)
    done = all(job.done for job in todo)
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    shown = {"rows": [r["key"] for r in results.get("rows", [])], "seeds": results.get("seeds")}
    if done and shown == asked:
        return results
    with recorded_run(folder, settings, asked, wanted=note):
        side_by_side(todo, jobs, console, lock)
        spent = (time.monotonic() - began) * (not evaluate_only)
        results = _gather(folder, asked, settings, results.get("wall_seconds", 0.0) + spent)
        write_json(path, results)
        write_report(folder)
    return results


def _write_run_card(
    folder: Path, settings: Settings, rows: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Write ``run.json``: the settings, and the rows and seeds of all commands so far."""
    path, asked = folder / "run.json", {"rows": list(rows), "seeds": list(seeds)}
    before: dict[str, Any] = {}
    if path.is_file():
        then, now = asdict(settings_of(folder)), asdict(settings)
        other = [name for name in now if then[name] != now[name] and name != "skip_bad"]
        begun = any(next(folder.glob(f"seed*/*/{n}"), None) for n in ("metrics.jsonl", "net.json"))
        if other and begun:
            differs = ", ".join(f"{name} {then[name]!r}, now {now[name]!r}" for name in other)
            raise CheckpointError(
                f"{folder} holds a run of other settings ({differs}); take another folder with "
                f"--run NAME, or delete this one with --fresh"
            )
        if other:  # no training has used the prepared data: prepare it again
            for home in folder.glob("seed*"):
                shutil.rmtree(home)
            if {"data", "features"}.intersection(other):
                (folder / "features.safetensors").unlink(missing_ok=True)
        else:
            before = read_json(path, what="a run's settings", remedy="Take --fresh")
            asked["rows"] = [r for r in ROWS if r in {*before["rows"], *rows}]
            asked["seeds"] = sorted({*before["seeds"], *seeds})
    card = {"settings": asdict(settings), **asked, "modgraft": mg.__version__}
    if card != before:
        write_json(path, card)
    return asked


def _training(
    folder: Path, settings: Settings, rows: Sequence[str], seed: int, before: int | None
) -> list[Job]:
    home, tag, nets = folder / f"seed{seed}", f"seed {seed}: ", nets_of(rows)
    text, eye = f"{seed}/text", f"{seed}/eye"
    # All seeds share the image features of a data folder: the first seed makes them.
    after = (text,) if before is None or settings.data == "digits" else (text, f"{before}/eye")
    made = [
        Job(
            text, f"{tag}questions", prepare_text, (folder, seed), home / "data",
            last_file=text_done_file(folder, seed, settings),
        )
    ]  # fmt: skip
    if needs_features(settings, nets):
        made.append(
            Job(
                eye, f"{tag}image features", prepare_images, (folder, seed), home / "eye",
                after=after, last_file=images_done_file(folder, seed, settings),
            )
        )  # fmt: skip
    for net in nets:
        ready = [eye if needs_features(settings, [net]) else text]
        ready += [f"{seed}/{net.base}"] if net.base else []
        made.append(
            Job(
                f"{seed}/{net.key}", f"{tag}{net.title}", train_net, (folder, seed, net.key),
                home / net.key, steps_of(net, settings),
                tuple(ready), home / net.key / "net.json",
            )
        )  # fmt: skip
    return made


def _testing(
    folder: Path, settings: Settings, rows: Sequence[str], seed: int, *, again: bool
) -> list[Job]:
    home = folder / f"seed{seed}"
    made = [
        Job(
            f"{seed}/row/{row}", f"seed {seed}: test, {ROWS[row].title}", evaluate_row,
            (folder, seed, row), home / row, after=tuple(f"{seed}/{n}" for n in ROWS[row].nets),
            last_file=None if again else home / row / "figures.json",
        )
        for row in rows
    ]  # fmt: skip
    asked = ("stage1", "stage2")
    if (
        settings.data == "digits"
        and settings.val
        and {net.key for net in nets_of(rows)}.issuperset(asked)
    ):
        made.append(
            Job(
                f"{seed}/ask", f"seed {seed}: what it can be asked", measure_depth,
                (folder, seed), home / "ask", after=tuple(f"{seed}/{n}" for n in asked),
                last_file=None if again else depth_file(folder, seed),
            )
        )  # fmt: skip
    return made


def evaluate_row(folder: Path, seed: int, key: str) -> None:
    """Test one row, and write predictions and figures into its folder."""
    settings, row, home = settings_of(folder), ROWS[key], folder / f"seed{seed}"
    sees = any(net.fusion for net in nets_of([key]))
    questions = load_questions(folder, seed, features=sees)
    questions = questions.split(tested_split(questions, settings))
    predictions = predict(folder, seed, row, questions, settings)
    digits = settings.data == "digits"
    figures = evaluate_predictions(
        predictions, questions, facts=facts if digits else None,
        columns=DIGITS_COLUMNS if digits else tuple(COLUMNS),
    )  # fmt: skip
    cards = {net: read_card(folder, seed, net) for net in row.nets}
    figures["nets"] = {net: {c: card.get(c) for c in COSTS} for net, card in cards.items()}
    write_predictions(home / key / "predictions.jsonl", predictions)
    if key == "fused":
        write_json(home / "gates.json", gates(folder, seed, questions, settings, predictions))
    write_json(home / key / "figures.json", figures)


def _gather(
    folder: Path, asked: dict[str, Any], settings: Settings, seconds: float
) -> dict[str, Any]:
    rows, images, first = [], {}, asked["seeds"][0]
    own = _own_nets(asked["rows"])
    for key in asked["rows"]:
        row, found = ROWS[key], {}
        for seed in asked["seeds"]:
            path = folder / f"seed{seed}" / key / "figures.json"
            if path.is_file():
                remedy = "Delete it, and run the same command again"
                figures = read_json(path, what="a row's figures", remedy=remedy)
                nets = figures.pop("nets", None)  # an older version gave all rows' costs
                found[str(seed)] = figures if nets is None else figures | _costs(nets, own[key])
        about = {"key": key, "title": row.title, "group": row.group, "note": row.note}
        rows.append({**about, "leak": row.forced, "seeds": found})
    questions = load_questions(folder, first, features=False)
    tested = tested_split(questions, settings)
    if settings.data == "digits":  # of the first seed, whose predictions the report shows
        for qid, strip in load_strips(folder, first).items():
            if qid.startswith(f"{tested}-"):
                images[qid] = np.round(strip.numpy(), 3).tolist()
    write_json(folder / "images.json", images)
    return {
        "name": folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": task(settings),
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "settings": asdict(settings),
        "split": tested,
        "scienceqa": settings.data != "digits",
        "not_shown": {} if settings.data == "digits" else {"gates": NO_GATES},
        "notes": notes(questions, settings),
        "skipped": load_skipped(folder, first),
        "titles": {net.key: net.title for net in nets_of(asked["rows"])},
        "seeds": asked["seeds"],
        "wall_seconds": round(seconds, 1),
        "rows": rows,
    }


def _own_nets(rows: Sequence[str]) -> dict[str, list[str]]:
    """Return row → the models that it is the first of ``rows`` to need, in the order of `ROWS`.

    Controls test the models of the main row: they have trained none.
    """
    own: dict[str, list[str]] = {}
    for key in (key for key in ROWS if key in rows):
        others = {net for nets in own.values() for net in nets}
        own[key] = [net for net in ROWS[key].nets if net not in others]
    return own


def _costs(nets: dict[str, dict[str, Any]], own: Sequence[str]) -> dict[str, Any]:
    """Add up what the training of a row's own models took; None for what is not known."""
    found = {cost: [nets[net][cost] for net in own] for cost in COSTS}
    return {c: sum(v) if v and None not in v else None for c, v in found.items()}
