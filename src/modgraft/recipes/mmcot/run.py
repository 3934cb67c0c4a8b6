"""Runs of the recipe: data, nets and rows as jobs on disk, resumable, reported.

A run folder holds ``run.json`` (what was asked for), ``results.json``, the report, and for each
seed ``data/`` in ScienceQA's own layout, one folder a net, and one folder of predictions a row.
Whatever the data was, everything after it was prepared reads the same files.
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
from modgraft.core.files import read_json, write_json
from modgraft.data.digits import facts
from modgraft.recipes.mmcot.data import (
    check,
    images_made,
    load_questions,
    load_skipped,
    load_strips,
    notes,
    prepare_images,
    prepare_text,
    reads_features,
    sees,
    settings_of,
    tested_split,
    text_made,
)
from modgraft.recipes.mmcot.metrics import evaluate_predictions, write_predictions
from modgraft.recipes.mmcot.nets import card_of, gates, predict, train_net
from modgraft.recipes.mmcot.note import noted
from modgraft.recipes.mmcot.recipe import ROWS, Settings, nets_of
from modgraft.recipes.workers import Job, side_by_side
from modgraft.report.page import write as write_report


def run(
    folder: Path,
    settings: Settings,
    rows: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int = 2,
    evaluate_only: bool = False,
    console: Console | None = None,
    note: bool = True,
) -> dict[str, Any]:
    """Train what is not trained yet, evaluate every row, write ``results.json`` and the report.

    The same command goes on where an interrupted one stopped, and does nothing once all is done.
    More rows or seeds may be added to a run; other settings are refused once a net has begun to
    train (``skip_bad`` alone may change at any time).

    Unless ``note`` is false, the run writes what was run and what came out into ``note.md``.

    Returns:
        The results, as in ``results.json``.

    Raises:
        UnknownNameError: a row that there is not.
        DataError: data that cannot be used; nothing is written.
        CheckpointError: the folder holds a run of other settings.
        ModgraftError: a job failed; what is done is kept.
    """
    for row in rows:
        if row not in ROWS:
            raise UnknownNameError.among("row", row, ROWS)
    check(settings, rows)
    if evaluate_only:
        for seed in seeds:
            for net in nets_of(rows):
                card_of(folder, seed, net.key)
    began, asked = time.monotonic(), _note(folder, settings, rows, seeds)
    todo = []
    for before, seed in zip([None, *seeds], seeds, strict=False):
        if not evaluate_only:
            todo += _training(folder, settings, rows, seed, before)
        todo += _testing(folder, rows, seed, again=evaluate_only)
    path, done = folder / "results.json", all(job.done for job in todo)
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    shown = {"rows": [r["key"] for r in results.get("rows", [])], "seeds": results.get("seeds")}
    if done and shown == asked:
        return results
    with noted(folder, settings, asked, wanted=note):
        side_by_side(todo, jobs, console)
        spent = (time.monotonic() - began) * (not evaluate_only)
        results = _gather(folder, asked, settings, results.get("wall_seconds", 0.0) + spent)
        write_json(path, results)
        write_report(folder)
    return results


def _note(
    folder: Path, settings: Settings, rows: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Write ``run.json``: what this folder was asked for, all commands together."""
    path, asked = folder / "run.json", {"rows": list(rows), "seeds": list(seeds)}
    before: dict[str, Any] = {}
    if path.is_file():
        then, now = asdict(settings_of(folder)), asdict(settings)
        other = [name for name in now if then[name] != now[name] and name != "skip_bad"]
        if other and _begun(folder):
            differs = ", ".join(f"{name} {then[name]!r}, now {now[name]!r}" for name in other)
            raise CheckpointError(
                f"{folder} holds a run of other settings ({differs}); take another folder with "
                f"--run NAME, or delete this one with --fresh"
            )
        if other:  # nothing was learned from what was prepared
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


def _begun(folder: Path) -> bool:
    """Whether any net has begun to train."""
    return any(folder.glob("seed*/*/metrics.jsonl")) or any(folder.glob("seed*/*/net.json"))


def _training(
    folder: Path, settings: Settings, rows: Sequence[str], seed: int, before: int | None
) -> list[Job]:
    home, tag, nets = folder / f"seed{seed}", f"seed {seed}: ", nets_of(rows)
    text, eye = f"{seed}/text", f"{seed}/eye"
    # all seeds share the features of other data than digits: one makes them, the next finds them
    after = (text,) if before is None or settings.data == "digits" else (text, f"{before}/eye")
    made = [
        Job(
            text, f"{tag}questions", prepare_text, (folder, seed), home / "data",
            made=text_made(folder, seed, settings),
        )
    ]  # fmt: skip
    if sees(settings, nets):
        made.append(
            Job(
                eye, f"{tag}image features", prepare_images, (folder, seed), home / "eye",
                after=after, made=images_made(folder, seed, settings),
            )
        )  # fmt: skip
    for net in nets:
        answers = net.reads in ("answer", "direct")
        ready = [eye if sees(settings, [net]) else text]
        ready += [f"{seed}/{net.base}"] if net.base else []
        made.append(
            Job(
                f"{seed}/{net.key}", f"{tag}{net.title}", train_net, (folder, seed, net.key),
                home / net.key, settings.steps_answer if answers else settings.steps_rationale,
                tuple(ready), home / net.key / "net.json",
            )
        )  # fmt: skip
    return made


def _testing(folder: Path, rows: Sequence[str], seed: int, *, again: bool) -> list[Job]:
    home = folder / f"seed{seed}"
    return [
        Job(
            f"{seed}/row/{row}", f"seed {seed}: test, {ROWS[row].title}", evaluate_row,
            (folder, seed, row), home / row, after=tuple(f"{seed}/{n}" for n in ROWS[row].nets),
            made=None if again else home / row / "figures.json",
        )
        for row in rows
    ]  # fmt: skip


def evaluate_row(folder: Path, seed: int, key: str) -> None:
    """Test one row; predictions and figures go into its folder."""
    settings, row, home = settings_of(folder), ROWS[key], folder / f"seed{seed}"
    questions = load_questions(folder, seed, features=reads_features(settings, nets_of([key])))
    questions = questions.split(tested_split(questions, settings))
    predictions = predict(folder, seed, row, questions, settings)
    reader = facts if settings.data == "digits" else None
    cards = [card_of(folder, seed, n) for n in dict.fromkeys(row.nets)]
    figures = evaluate_predictions(
        predictions, questions, facts=reader,
        parameters=sum(c["parameters"] for c in cards), trained=sum(c["trained"] for c in cards),
        seconds=sum(c["seconds"] for c in cards),
    )  # fmt: skip
    write_predictions(home / key / "predictions.jsonl", predictions)
    if key == "fused":
        write_json(home / "gates.json", gates(folder, seed, questions, settings, predictions))
    write_json(home / key / "figures.json", figures)


def _gather(
    folder: Path, asked: dict[str, Any], settings: Settings, seconds: float
) -> dict[str, Any]:
    rows, images, first = [], {}, asked["seeds"][0]
    for key in asked["rows"]:
        row, found = ROWS[key], {}
        for seed in asked["seeds"]:
            path = folder / f"seed{seed}" / key / "figures.json"
            if path.is_file():
                found[str(seed)] = json.loads(path.read_text(encoding="utf-8"))
        about = {"key": key, "title": row.title, "group": row.group, "note": row.note}
        rows.append({**about, "leak": row.forced, "seeds": found})
    questions = load_questions(folder, first, features=False)
    tested = tested_split(questions, settings)
    if settings.data == "digits":  # of the first seed: its predictions are the report's examples
        for qid, strip in load_strips(folder, first).items():
            if qid.startswith(f"{tested}-"):
                images[qid] = np.round(strip.numpy(), 3).tolist()
    write_json(folder / "images.json", images)
    return {
        "name": folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "split": tested,
        "notes": notes(questions, settings),
        "skipped": load_skipped(folder, first),
        "titles": {net.key: net.title for net in nets_of(asked["rows"])},
        "seeds": asked["seeds"],
        "wall_seconds": round(seconds, 1),
        "rows": rows,
    }
