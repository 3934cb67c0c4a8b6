"""Three questions of our own in ScienceQA's format, and where the real sample lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modgraft.data.records import Record

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "scienceqa"
needs_sample = pytest.mark.skipif(
    not (SAMPLE / "problems.json").is_file(), reason=f"no sample of ScienceQA at {SAMPLE}"
)

PROBLEMS: dict[str, dict[str, Any]] = {
    "11": {
        "question": "Which one\nfloats?",
        "choices": ["a stone", "a cork", "a nail"],
        "answer": 1,
        "hint": "Tom puts  three things in water.",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade3",
        "subject": "natural science",
        "topic": "physics",
        "category": "Materials",
        "skill": "Predict floating",
        "lecture": "Light things float.\nHeavy ones sink.",
        "solution": "A cork is light.",
        "split": "train",
    },
    "12": {
        "question": "Is this a verb: run?",
        "choices": ["yes", "no"],
        "answer": 0,
        "hint": "",
        "image": None,
        "task": "yes or no",
        "grade": "grade8",
        "subject": "language science",
        "topic": "verbs",
        "category": "Word study",
        "skill": "Identify verbs",
        "lecture": "",
        "solution": "To run is to do something.",
        "split": "train",
    },
    "13": {
        "question": "Which is further north?",
        "choices": ["Rome", "Oslo", "Cairo", "Lagos"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade11",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map",
        "lecture": "North is up on a map.",
        "solution": "",
        "split": "test",
    },
}
CAPTIONS = {"11": "A bowl of water.", "13": "A map of two continents."}
SPLITS = {"train": ["12", "11"], "val": [], "test": ["13"], "trainval": ["11", "12"]}


def record(qid: str = "11", **changes: Any) -> Record:
    """One of the three, with its caption, changed as asked."""
    raw = PROBLEMS[qid] | {k: v for k, v in changes.items() if k not in ("id", "caption")}
    caption = changes.get("caption", CAPTIONS.get(qid, ""))
    return Record.from_json(changes.get("id", qid), raw, caption=caption)


def write_folder(folder: Path, **files: Any) -> Path:
    """The three as ScienceQA's folder; a keyword replaces the value of the file of its name."""
    values = {
        "problems": PROBLEMS,
        "pid_splits": SPLITS,
        "captions": {"model": "none", "captions": CAPTIONS},
    }
    for name, value in (values | files).items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
