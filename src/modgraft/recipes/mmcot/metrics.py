"""Score predictions: accuracy, rationales, facts, and the classes of wrong answers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rouge_score.rouge_scorer import RougeScorer

from modgraft.core.errors import DataError
from modgraft.core.files import write_text
from modgraft.data.digits import Facts
from modgraft.data.records import Record
from modgraft.data.text import extract_answer, squeeze
from modgraft.report.run import Prediction

ErrorClass = Literal["perception", "reasoning", "option mapping", "format"]
ERRORS: tuple[ErrorClass, ...] = ("perception", "reasoning", "option mapping", "format")
"""The steps at which an answer can go wrong, in order."""


ReadFacts = Callable[[str], Facts]
"""Reads what a rationale states, as `modgraft.data.digits.facts` does for DigitsQA."""


def grade_answer(
    record: Record, text: str, *, rationale: str | None = None, gold_rationale: str | None = None,
    facts: ReadFacts | None = None,
) -> Prediction:  # fmt: skip
    """Read the answer from what a model wrote, and grade it.

    Args:
        record: The question.
        text: What the answering stage wrote.
        rationale: The rationale that the answering stage read, or wrote before its answer.
        gold_rationale: The true rationale in the same text form.
        facts: Reads a rationale's facts; with it, a wrong answer is classified.
    """
    choice = extract_answer(text, record.choices)
    return Prediction(
        id=record.id, category=record.category, question=record.question,
        choices=list(record.choices), answer=record.answer, image=record.image is not None,
        gold_rationale=gold_rationale, rationale=rationale, text=text, choice=choice,
        correct=choice == record.answer,
        error=classify_error(record, gold_rationale, rationale, choice, facts),
    )  # fmt: skip


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write `predictions.jsonl`: one JSON object a line, the whole file or nothing."""
    lines = [json.dumps(p.model_dump(), ensure_ascii=False, allow_nan=False) for p in predictions]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _school_grade(record: Record) -> int | None:
    found = re.fullmatch(r"grade\s?(\d+)", record.grade)
    return int(found[1]) if found else None


COLUMNS: dict[str, Callable[[Record], bool]] = {
    "NAT": lambda r: r.subject == "natural science",
    "SOC": lambda r: r.subject == "social science",
    "LAN": lambda r: r.subject == "language science",
    "TXT": lambda r: bool(r.hint),
    "IMG": lambda r: r.image is not None,
    "NO": lambda r: not r.hint and r.image is None,
    "G1-6": lambda r: (_school_grade(r) or 0) in range(1, 7),
    "G7-12": lambda r: (_school_grade(r) or 0) in range(7, 13),
    "Avg": lambda r: True,
}
"""Column → its questions (Lu et al. 2022). TXT: with a hint, NO: with neither hint nor image."""

DIGITS_COLUMNS = ("TXT", "IMG", "NO", "Avg")
"""The columns that mean something on DigitsQA, whose subjects and grades only fill the format."""


def accuracy_by_column(
    records: Sequence[Record], correct: Mapping[str, bool]
) -> dict[str, float | None]:
    """Return ScienceQA's columns: the percentage of right answers, None without questions.

    Args:
        records: The questions.
        correct: Id → whether the question was answered correctly.

    Raises:
        DataError: A question has no prediction.
    """
    for record in records:
        if record.id not in correct:
            remedy = "Predict every question: the accuracy over a part is not the accuracy"
            raise DataError("the question has no prediction", id=record.id, remedy=remedy)
    return _by_column(records, lambda record: correct[record.id])


def _by_column(
    records: Sequence[Record], value: Callable[[Record], float]
) -> dict[str, float | None]:
    return {name: percent(value(r) for r in records if has(r)) for name, has in COLUMNS.items()}


def percent(hits: Iterable[bool | float]) -> float | None:
    """Return the mean times 100; None if there are no values."""
    values = [float(hit) for hit in hits]
    return 100 * math.fsum(values) / len(values) if values else None


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(gold: str, written: str) -> float:
    """ROUGE-L, the F-measure of the longest common subsequence of words, 0..1 (Lin 2004).

    This is the one of `rouge-score` without stemming: lower case, letters and digits only. mm-cot
    uses the package `rouge`, which splits at blanks and so counts punctuation and case; the two
    differ a little.
    """
    return _scorer().score(gold, written)["rougeL"].fmeasure


def bleu(gold: str, written: str, n: int) -> float:
    """BLEU-n = min(1, e^(1 − r/c)) · (Π_k≤n p_k)^(1/n), 0..1 (Papineni et al. 2002).

    p_k is the clipped k-gram precision, r and c are the lengths. As in mm-cot, it is computed for
    one text without smoothing, with words split at blanks and full stops.
    """
    reference, words = ([w for w in re.split(r"[\s.]", text) if w] for text in (gold, written))
    logs = 0.0
    for k in range(1, n + 1):
        want, have = _grams(reference, k), _grams(words, k)
        shared = sum((want & have).values())
        if shared == 0:
            return 0.0
        logs += math.log(shared / sum(have.values()))
    return min(1.0, math.exp(1 - len(reference) / len(words))) * math.exp(logs / n)


def _grams(words: list[str], k: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + k]) for i in range(len(words) - k + 1))


def facts_right(gold: Facts, written: Facts) -> tuple[int, int]:
    """Count the gold rationale's facts: (those that the written one states too, all).

    A fact is a digit at its place, or the conclusion.
    """
    right = sum(written.digits.get(place) == digit for place, digit in gold.digits.items())
    total = len(gold.digits)
    if gold.conclusion is not None:
        right, total = right + (written.conclusion == gold.conclusion), total + 1
    return right, total


def classify_error(
    record: Record,
    gold_rationale: str | None,
    rationale: str | None,
    choice: int | None,
    facts: ReadFacts | None,
) -> ErrorClass | None:
    """Return the first step that failed on the way to a wrong answer; None for a right answer.

    `format`: no option can be read from the answer, or no conclusion from the rationale.
    `perception`: a digit that the question needs is misread. `reasoning`: the digits are right, but
    not the conclusion. `option mapping`: the conclusion is right, but the option is another one.
    Without rationales or `facts`, only `format` can be detected; other errors give None.
    """
    if choice == record.answer:
        return None
    if choice is None:
        return "format"
    if facts is None or rationale is None or gold_rationale is None:
        return None
    gold, written = facts(gold_rationale), facts(rationale)
    if written.conclusion is None:
        return "format"
    needed = gold.used or gold.digits
    if any(written.digits.get(place) != digit for place, digit in needed.items()):
        return "perception"
    return "option mapping" if written.conclusion == gold.conclusion else "reasoning"


def evaluate_predictions(
    predictions: Sequence[Prediction],
    records: Sequence[Record],
    *,
    facts: ReadFacts | None = None,
    columns: Iterable[str] = tuple(COLUMNS),
) -> dict[str, Any]:
    """Compute all figures of one model; a figure that cannot be measured is None, never 0.

    Args:
        predictions: One for each question, in any order.
        records: The questions.
        facts: Reads a rationale's facts; None leaves the accuracy of facts out.
        columns: The names of `COLUMNS` to give.

    Returns:
        accuracy (all questions), image and text (questions with and without an image), columns and
        families (by category), and chance (by column, a uniform guess among each question's own
        options), in percent; family_sizes (their numbers of questions); rouge_l, bleu_1, bleu_4
        (0..100), exact and facts (percent) over questions with both rationales; errors
        {class: count}; unclassified (wrong answers without a class); n (the number of questions).

    Raises:
        DataError: A question has no prediction or several, or a prediction has no question.
    """
    _check_complete(predictions, records)
    measured = accuracy_by_column(records, {p.id: p.correct for p in predictions})
    guessed = _by_column(records, lambda record: 1 / len(record.choices))
    families = Counter(record.category for record in records)
    wrong = [p for p in predictions if not p.correct]
    return {
        "accuracy": measured["Avg"],
        "image": measured["IMG"],
        "text": percent(p.correct for p in predictions if not p.image),
        "columns": {name: measured[name] for name in columns},
        "chance": {name: guessed[name] for name in columns},
        "families": {
            name: percent(p.correct for p in predictions if p.category == name) for name in families
        },
        "family_sizes": dict(families),
        **_rationale_scores(predictions, facts),
        "errors": {name: sum(p.error == name for p in wrong) for name in ERRORS},
        "unclassified": sum(p.error is None for p in wrong),
        "n": len(records),
    }


def _check_complete(predictions: Sequence[Prediction], records: Sequence[Record]) -> None:
    """Refuse predictions that are not exactly one for each question."""
    counts = Counter(p.id for p in predictions)
    known = {record.id for record in records}
    for qid, count in counts.items():
        if count > 1:
            raise DataError("the question has several predictions", id=qid, remedy="Keep one")
        if qid not in known:
            remedy = "Evaluate with the questions that were predicted"
            raise DataError("a prediction for an unknown question", id=qid, remedy=remedy)


def _without_blanks(text: str) -> str:
    """Remove all white space."""
    return "".join(text.split())


def _rationale_scores(
    predictions: Sequence[Prediction], facts: ReadFacts | None
) -> dict[str, float | None]:
    pairs = [
        (squeeze(p.gold_rationale), squeeze(p.rationale))
        for p in predictions
        # as published: a question without a gold rationale is left out, but an empty written
        # rationale counts, and scores 0
        if p.gold_rationale is not None and p.rationale is not None and p.gold_rationale.strip()
    ]
    counts = [] if facts is None else [facts_right(facts(a), facts(b)) for a, b in pairs]
    total = sum(n for _, n in counts)
    return {
        "rouge_l": percent(rouge_l(a, b) for a, b in pairs),
        "bleu_1": percent(bleu(a, b, 1) for a, b in pairs),
        "bleu_4": percent(bleu(a, b, 4) for a, b in pairs),
        # up to white space, which the tokenizer does not preserve around punctuation
        "exact": percent(_without_blanks(a) == _without_blanks(b) for a, b in pairs),
        "facts": 100 * sum(right for right, _ in counts) / total if total else None,
    }
