"""A run folder as the recipe writes it, with made-up results over real DigitsQA questions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modgraft.data.digits import digits_qa, facts
from modgraft.data.records import Record
from modgraft.recipes.mmcot.metrics import classify_error

# key, title, group, note, accuracy by family (read, compare, add, lookup, even, text)
ROWS: list[tuple[str, str, str, str, tuple[int, ...]]] = [
    ("fused", "Two stages, fused", "main", "", (96, 91, 88, 71, 94, 100)),
    ("one_stage", "One stage, answer only", "main", "QCM→A", (88, 74, 41, 30, 72, 99)),
    ("rationale_first", "One stage, rationale first", "main", "QCM→EA", (90, 80, 60, 32, 81, 99)),
    ("released", "Fusion as released", "ablation", "gate over [H; A]", (95, 92, 86, 70, 94, 100)),
    ("modular", "Modular: text model frozen", "ablation", "fusion and LoRA trained, 12 % of all",
     (90, 80, 70, 44, 83, 99)),
    ("shuffled", "Images shuffled", "control", "must fall to chance", (27, 29, 26, 28, 25, 100)),
    ("text_only", "Text only", "control", "must fall to chance", (28, 26, 27, 25, 28, 100)),
    ("gold", "Gold rationale", "control", "stage 2 alone: a ceiling", (100, 100, 99, 99, 100, 100)),
    ("teacher_forced", "Teacher-forced rationale", "control", "decoded from the gold tokens",
     (99, 98, 97, 96, 98, 100)),
]  # fmt: skip
FAMILIES = ("read", "compare", "add", "lookup", "even", "text")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")


def make_run(folder: Path, *, seeds: int = 3, questions: int = 240, gates: int = 4) -> Path:
    """Write a complete run folder; everything in it is drawn from one generator."""
    rng = random.Random(0)
    data = digits_qa(train=0, val=0, test=questions)
    problems = {qid: data.problems[qid] for qid in data.splits["test"]}
    rows = []
    for key, title, group, note, skill in ROWS:
        measured = {}
        for seed in range(seeds):
            shift = rng.gauss(0, 1.2)
            predictions = [
                _predict(rng, qid, raw, skill[FAMILIES.index(raw["category"])] + shift, data)
                for qid, raw in problems.items()
            ]
            write_lines(folder / f"seed{seed}" / key / "predictions.jsonl", predictions)
            measured[str(seed)] = _metrics(predictions, key)
        rows.append({"key": key, "title": title, "group": group, "note": note, "seeds": measured})
    write_json(folder / "results.json", {
        "name": "mmcot-digits", "created": "2026-03-14T15:09:26Z", "seeds": list(range(seeds)),
        "task": "Questions about three digits.", "command": "modgraft mmcot train --run 'a b'",
        "commit": "0123456789ab, tree clean", "versions": "Python 3.11.2, torch 2.13.0",
        "settings": {"d_model": 192, "layers": [3, 3], "lr": 1e-3, "batch": 32,
                     "steps": {"rationale": 2200, "answer": 1500}, "form": "paper",
                     "data": "DigitsQA, seed 0"},
        "rows": rows,
    })  # fmt: skip
    for seed in range(seeds):
        for model, steps in (("rationale", 2200), ("answer", 1500), ("one_stage", 1500)):
            write_lines(folder / f"seed{seed}" / model / "metrics.jsonl", _curve(rng, steps))
    seen = [qid for qid, raw in problems.items() if raw["image"]][:gates]
    looked = [_gate(rng, qid, problems[qid], data.strips[qid]) for qid in seen]
    write_json(folder / "seed0" / "gates.json", looked)
    write_json(folder / "images.json", {q: np.round(s, 3).tolist() for q, s in data.strips.items()})
    return folder


def _predict(rng: random.Random, qid: str, raw: dict, skill: float, data: Any) -> dict[str, Any]:
    gold, choice, answer = raw["solution"], raw["answer"], raw["answer"]
    written: str = gold
    if rng.random() * 100 >= skill:
        wrong = [i for i in range(len(raw["choices"])) if i != answer]
        choice = rng.choice([*wrong, *wrong, *wrong, None])
        digits = [place for place, mark in enumerate(written) if mark.isdigit()]
        if rng.random() < 0.7 and digits:
            at = rng.choice(digits)
            written = written[:at] + str((int(written[at]) + 3) % 10) + written[at + 1 :]
    error = classify_error(Record.from_json(qid, raw), gold, written, choice, facts)
    text = "The answer" if choice is None else f"The answer is ({'ABCDE'[choice]})."
    return {
        "id": qid, "category": raw["category"], "question": raw["question"],
        "choices": raw["choices"], "answer": answer, "image": qid in data.strips,
        "gold_rationale": gold, "rationale": written, "text": text, "choice": choice,
        "correct": choice == answer, "error": error,
    }  # fmt: skip


def _metrics(predictions: list[dict[str, Any]], key: str) -> dict[str, Any]:
    def share(some: list[dict[str, Any]]) -> float | None:
        return 100 * sum(p["correct"] for p in some) / len(some) if some else None

    errors: dict[str, int] = {}
    for p in predictions:
        if p["error"]:
            errors[p["error"]] = errors.get(p["error"], 0) + 1
    families = {f: share([p for p in predictions if p["category"] == f]) for f in FAMILIES}
    image = share([p for p in predictions if p["image"]])
    written = key not in {"one_stage", "gold"}
    guess = 100 * sum(1 / len(p["choices"]) for p in predictions) / len(predictions)
    reused = key in {"shuffled", "gold", "teacher_forced"}  # they test the models of "fused"
    costs = {"parameters": 2_770_000, "trained": 330_000 if key == "modular" else 2_770_000,
             "fusion": 0 if key == "text_only" else 130_000, "seconds": 430.0}  # fmt: skip
    return {
        "accuracy": share(predictions), "image": image, "families": families,
        "columns": {
            "NAT": share([p for p in predictions if p["category"] in {"compare", "add", "even"}]),
            "SOC": families["lookup"],
            "LAN": share([p for p in predictions if p["category"] in {"read", "text"}]),
            "TXT": families["lookup"], "IMG": image, "NO": families["text"],
            "G1-6": share([p for p in predictions if p["category"] not in {"lookup", "text"}]),
            "G7-12": None, "Avg": share(predictions),
        },
        "rouge_l": 97.2 if written else None, "exact": 81.0 if written else None,
        "facts": 95.5 if written else None, "errors": errors, "n": len(predictions),
        "chance": {"NAT": 31.5, "G7-12": None, "Avg": guess},
        **(dict.fromkeys(costs) if reused else costs),
    }  # fmt: skip


def _curve(rng: random.Random, steps: int) -> list[dict[str, Any]]:
    points = []
    for step in range(10, steps + 1, 10):
        loss = 0.02 + 3.5 * 2.0 ** (-step / (steps / 7)) * (1 + rng.gauss(0, 0.12))
        points.append({"step": step, "split": "train", "loss": abs(loss), "lr": 1e-3})
        if step % 200 == 0:
            points.append({"step": step, "split": "eval", "loss": abs(loss) * 1.15 + 0.01})
    return points


def _gate(rng: random.Random, qid: str, raw: dict[str, Any], strip: np.ndarray) -> dict[str, Any]:
    options = " ".join(f"({'ABCDE'[i]}) {c}" for i, c in enumerate(raw["choices"]))
    context = raw["hint"] or "N/A"
    text = f"Question: {raw['question']} Context: {context} Options: {options} Solution:"
    tokens = ["▁" + word for word in text.split()] + ["</s>"]
    attention, gate = [], []
    for token in tokens:
        place = next((i for i, w in enumerate(("left", "middle", "right")) if w in token), None)
        weight = [1 + rng.random() for _ in range(12)]
        if place is not None:
            for patch in (2 * place, 2 * place + 1, 2 * place + 6, 2 * place + 7):
                weight[patch] += 12 * rng.random()
        attention.append([w / sum(weight) for w in weight])
        gate.append(min(0.95, 0.08 + (0.45 if place is not None else 0) + 0.2 * rng.random()))
    return {
        "id": qid, "question": raw["question"], "choices": raw["choices"],
        "image": strip.tolist(), "tokens": tokens, "attention": attention, "gate": gate,
        "rationale": raw["solution"], "text": "The answer is (A).", "correct": raw["answer"] == 0,
    }  # fmt: skip


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three seeds. Shared: copy it before changing it."""
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """A run of one seed and few questions, to spoil."""
    return make_run(tmp_path / "small", seeds=1, questions=24, gates=1)


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Draw few pixels where nobody looks at them."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr("modgraft.report.figures.SCALE", 50)
