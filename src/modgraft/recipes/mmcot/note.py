"""The note that describes a run in the research log; see `modgraft.log.record.runs`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modgraft.core.errors import listed
from modgraft.core.files import read_json
from modgraft.log.record.runs import RunNote, code, plain, recorded, settings_row
from modgraft.recipes.mmcot.data import load_questions
from modgraft.recipes.mmcot.recipe import ROWS, Settings, nets_of
from modgraft.report.run import Results, check, read_run
from modgraft.report.statistics import chance_of, figure
from modgraft.report.table import Line, build

GROUP_LABELS = {"main": "", "ablation": " (ablation)", "control": " (control)"}
"""Group of a row → what is added to its label."""

LAYOUT_REMARKS = ("Bold", "No row is in bold", "Brackets", "“–”")
"""Beginnings of remarks on the table's layout, which the note leaves out."""

TOLD_ELSEWHERE = ("data", "features", "model", "train", "val", "test", "split")
"""Settings that other lines of the note already tell."""


def task(settings: Settings) -> str:
    """Say in full sentences what is asked of the models."""
    written = (
        "The model writes a rationale and then an answer, both decoded greedily, unless a row says "
        "otherwise; an answer that names none of the options is wrong."
    )
    if settings.data == "digits":
        return (
            "DigitsQA: multiple-choice questions about a strip of handwritten digits (real scans, "
            "8 × 8 pixels each), or about a text without a picture: read a digit, compare two, add "
            f"two, count the even ones, or look one up in a table. {written}"
        )
    seen = f" made with {settings.features}" if settings.features else ""
    return (
        f"Multiple-choice questions in ScienceQA's format, from {settings.data}; the model sees "
        f"pictures as features{seen}. {written}"
    )


def recorded_run(
    folder: Path, settings: Settings, asked: Mapping[str, Any], *, wanted: bool
) -> AbstractContextManager[None]:
    """Record the run in ``note.md`` of its folder."""
    return recorded(
        folder, "mmcot", lambda said: _describe(said, settings, asked),
        lambda said: _tell_results(said, folder, asked), wanted=wanted,
    )  # fmt: skip


def _describe(said: RunNote, settings: Settings, asked: Mapping[str, Any]) -> None:
    nets = nets_of(asked["rows"])
    forms = sorted({net.fusion for net in nets if net.fusion})
    modules = [f"gated fusion ({form})" for form in forms]
    modules += ["LoRA on a frozen text T5"] if any(net.base for net in nets) else []
    said.context |= {
        "Recipe": "multimodal chain of thought (mmcot)",
        "Host": _host(settings),
        "Modules": listed(modules) or "none",
        "Data": _data(settings),
        "Rows": "; ".join(ROWS[key].title for key in asked["rows"]),
        "Seeds": listed([str(seed) for seed in asked["seeds"]]),
        "Settings": settings_row(asdict(settings), TOLD_ELSEWHERE),
    }


def _tell_results(said: RunNote, folder: Path, asked: Mapping[str, Any]) -> None:
    raw = read_json(folder / "results.json", what="results", remedy="modgraft mmcot train")
    results, nets = check(raw), nets_of(asked["rows"])
    laid = build(results, chance_of(read_run(folder)))
    for _, lines in laid.groups:
        for line in lines:
            said.learned[plain(line.row.title) + _mark(line)] = _figures(laid.columns, line)
    if laid.chance is not None:
        pairs = zip(laid.columns, laid.chance, strict=True)
        said.learned["Chance"] = ", ".join(f"{c} {v}" for c, v in pairs if v != "–")
    remarks = [r for r in laid.remarks if not r.startswith(LAYOUT_REMARKS)]
    said.learned["How to read"] = plain(" ".join(remarks), longest=2000)
    said.done["Trained"] = f"under each seed: {'; '.join(net.title for net in nets)}"
    splits = load_questions(folder, asked["seeds"][0], features=False).splits or {}
    sizes = [f"{len(ids):,} {plain(name)}" for name, ids in splits.items()]
    said.done["Questions"] = ", ".join(sizes)
    said.done["Tested"] = f"{_tested(results)} of the {raw['split']} split, decoded freely"
    said.done["Report"] = "[report.html](report.html), figures in [results.json](results.json)"
    shown = {"results": "Accuracy", "columns": "All columns", "families": "By family"}
    shown |= {f"loss-{net.key}": f"Loss of {net.title}" for net in nets}
    said.figures |= {folder / f"{name}.png": what for name, what in shown.items()}
    said.headline = _headline(results, raw["split"])
    said.seconds = raw["wall_seconds"]


def _host(s: Settings) -> str:
    if s.model is not None:
        return f"a pretrained T5, {code(s.model)}"
    return f"a small T5 from scratch, d_model {s.d_model}, d_ff {s.d_ff}, layers {s.layers}"


def _data(s: Settings) -> str:
    if s.data == "digits":
        return (
            f"DigitsQA, questions: {s.train:,} to train, {s.val:,} to validate, {s.test:,} to test"
        )
    features = "" if s.features is None else f", features {code(s.features)}"
    return f"{code(s.data)} in ScienceQA's format{features}"


def _mark(line: Line) -> str:
    group = GROUP_LABELS[line.row.group]
    return group[:-1] + ", leak)" if group and line.row.leaks else group


def _figures(columns: list[str], line: Line) -> str:
    """Return a row's cells with their columns, without those that were not measured."""
    cells = [f"{name} {cell.text}" for name, cell in zip(columns, line.cells, strict=False)]
    few = [mark for mark in line.marks if mark != "leak"]
    return ", ".join([c for c in cells if not c.endswith(" –")] + few) or "nothing measured"


def _tested(results: Results) -> str:
    sizes = {m.n for row in results.rows for m in row.seeds.values() if m.n is not None}
    return " and ".join(f"{size:,}" for size in sorted(sizes)) + " questions"


def _headline(results: Results, split: str) -> str:
    """Return the accuracy of the main rows, and of two controls for comparison."""
    rows = [row for row in results.rows if row.seeds and not row.leaks]
    models = [row for row in rows if row.group == "main"] or rows[:1]
    beside = [row for row in rows if row.group == "control" and row not in models][:2]
    said = []
    for row in [*models, *beside]:
        every, image = figure(row, lambda m: m.accuracy), figure(row, lambda m: m.image)
        if row.group == "control":
            said.append(f"{row.title} (control): {every} %")
            continue
        part = f", {image} % of image questions" if image is not None else ""
        said.append(f"{row.title}: {every} % of all questions right{part}")
    seeds = f"{len(results.seeds)} seeds" if len(results.seeds) != 1 else "one seed"
    return f"{'; '.join(said)} ({split} split, {seeds})"
