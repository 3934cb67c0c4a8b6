"""Count wrong answers by class, and show them with their differences from the truth."""

from __future__ import annotations

import difflib
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modgraft.report.attention import enlarged
from modgraft.report.run import Prediction, Results, Row, Run

MEANINGS = {
    "perception": "a digit that the question turns on is misread",
    "reasoning": "the digits are right, the conclusion drawn from them is not",
    "option mapping": "the conclusion is right, the chosen option does not say it",
    "format": "no conclusion, or no option, can be read from what was written",
}
"""Class of error → its meaning; other classes are shown by name only."""

UNSORTED = "unclassified"
EXAMPLES = 3
"""The number of wrong answers of a class that stand open on the page."""

MOST = 500
"""The number of wrong answers of a class on the page at most; predictions.jsonl has all."""


@dataclass(frozen=True)
class Piece:
    """Words of a written rationale, and whether they differ from the gold one."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Example:
    """One wrong answer; `image` is a data URI, or None if the run does not hold the image."""

    prediction: Prediction
    image: str | None
    written: list[Piece]


@dataclass(frozen=True)
class ErrorClass:
    """One class of error: some `examples` of its `total` wrong answers, and the `others`."""

    name: str
    meaning: str
    total: int
    examples: list[Example]
    others: list[Example]


@dataclass(frozen=True)
class Counts:
    """Wrong answers by class for each row, mean over seeds; None for a row without classes."""

    classes: list[str]
    lines: list[tuple[Row, list[str] | None]]


def counts(run: Run, results: Results) -> Counts:
    """Count wrong answers from the metrics or, where they have no classes, from the predictions."""
    per_row = {row.key: _per_seed(run, row) for row in results.rows}
    names = list(MEANINGS)
    found = {name for seeds in per_row.values() for each in seeds for name in each}
    names = [n for n in names if n in found] + sorted(found - set(names))
    lines: list[tuple[Row, list[str] | None]] = []
    for row in results.rows:
        seeds = per_row[row.key]
        cells = None
        if seeds:
            means = [statistics.fmean(each.get(name, 0) for each in seeds) for name in names]
            digits = 0 if len(seeds) == 1 else 1
            cells = [f"{mean:.{digits}f}" for mean in means]
        lines.append((row, cells))
    return Counts(names, lines)


def _per_seed(run: Run, row: Row) -> Sequence[Mapping[str, int]]:
    kept = [m.errors for m in row.seeds.values() if m.errors is not None]
    if kept:
        return kept
    return [
        Counter(each.error or UNSORTED for each in predictions if not each.correct)
        for predictions in run.predictions.get(row.key, {}).values()
    ]


def examples(run: Run, predictions: Iterable[Prediction]) -> list[ErrorClass]:
    """Group wrong answers by class, the most frequent first; examples are of many categories."""
    grouped: dict[str, list[Prediction]] = {}
    for each in predictions:
        if not each.correct:
            grouped.setdefault(each.error or UNSORTED, []).append(each)
    classes = []
    for name, members in sorted(grouped.items(), key=lambda item: -len(item[1])):
        chosen = _diverse(members)
        rest = [each for each in members if each not in chosen][: MOST - len(chosen)]
        shown, others = ([_example(run, each) for each in some] for some in (chosen, rest))
        classes.append(ErrorClass(name, MEANINGS.get(name, ""), len(members), shown, others))
    return classes


def _diverse(members: list[Prediction]) -> list[Prediction]:
    """Choose examples of different categories, where there are any."""
    seen: Counter[str] = Counter()
    ranked = []
    for place, each in enumerate(members):
        ranked.append((seen[each.category], place, each))
        seen[each.category] += 1
    return [each for _, _, each in sorted(ranked, key=lambda item: item[:2])[:EXAMPLES]]


def _example(run: Run, each: Prediction) -> Example:
    image = run.images.get(each.id) if each.image else None
    return Example(
        each,
        enlarged(image) if image is not None else None,
        differences(each.gold_rationale or "", each.rationale or ""),
    )


def differences(gold: str, written: str) -> list[Piece]:
    """Split `written` into pieces, and mark those that differ word by word from `gold`."""
    a, b = gold.split(), written.split()
    matcher = difflib.SequenceMatcher(a=a, b=b, autojunk=False)
    return [
        Piece(" ".join(b[start:stop]), tag != "equal")
        for tag, _, _, start, stop in matcher.get_opcodes()
        if stop > start
    ]
