"""DigitsQA: questions about real scanned digits, in ScienceQA's format, with nothing to download.

The images are scikit-learn's 1,797 real 8 x 8 scans (`sklearn.datasets.load_digits`), split
1197 / 300 / 300 in their order: neighbours share a writer, so shuffling would put the handwriting
of one person into training and test. A question shows a strip of three digits, left, middle and
right, from its own split.

The text of a question, with its options and table, is drawn first; then which option is right,
uniformly; then digits that make it right. So every option is equally likely given the text: a model
that does not look at the image cannot beat 1 / (number of options). The family `text` has no image
and can be answered from the text.

That is the published form, of `val` and `test`. A share of the training questions can be varied:
two to eight options, strips of one to four digits. So are all of the split `reworded`, which are
worded as people do besides (`modgraft.data.digit_wordings`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from modgraft.data.digit_wordings import PLACES, free_words, own_words

POSITIONS = PLACES[3]
"""The places of a strip of three, from left to right."""

CUT = {"train": slice(0, 1197), "val": slice(1197, 1497), "test": slice(1497, 1797)}
"""Split -> its part of scikit-learn's scans."""

COUNTS = {1: 0.06, 2: 0.12, 3: 0.7, 4: 0.12}
"""Count of digits -> the share of the varied questions whose strip shows as many."""

FAMILIES = ("read", "compare", "add", "lookup", "even", "text")
"""The kinds of questions, a record's `category`. All but the last show an image."""

CODES = "FGHJKLMNPQRSTVWXYZ"
"""The letters of code tables, without the letters of options (A to E), I and O."""


@dataclass(frozen=True)
class _Kind:
    """ScienceQA's descriptive fields, which all records of one family share."""

    subject: str
    topic: str
    grade: str
    skill: str
    lecture: str


WEIGHTS = {"read": 0.5, "compare": 1.0, "add": 2.0, "lookup": 1.5, "even": 1.5, "text": 1.5}
"""How often each family is drawn for training: families with more reasoning steps more often."""

KINDS = {
    "read": _Kind(
        "language science", "reading", "grade1", "Read a handwritten digit",
        "A strip shows three handwritten digits: left, middle and right.",
    ),
    "compare": _Kind(
        "natural science", "number sense", "grade2", "Compare two handwritten digits",
        "Of two numbers, the one further along the number line is larger.",
    ),
    "even": _Kind(
        "natural science", "number sense", "grade3", "Count even digits",
        "A number is even if it can be split into two equal whole numbers.",
    ),
    "add": _Kind(
        "natural science", "arithmetic", "grade5", "Add two handwritten digits",
        "The sum of two numbers is what they make together.",
    ),
    "lookup": _Kind(
        "social science", "maps and keys", "grade8", "Look a handwritten digit up in a code table",
        "A code table gives each number a code. Find the row of the number, then read its code.",
    ),
    "text": _Kind(
        "language science", "reading", "grade7", "Answer from the text",
        "Everything that is needed is in the text.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DigitsQA:
    """Questions about strips of digits.

    `problems[qid]` is a raw record in ScienceQA's format (`problems.json`), `splits[name]` the ids
    of a split in order (`pid_splits.json`), `strips[qid]` the image, float32 [8, 8n] in 0..1, ink
    high, for the questions that have one, and `digits[qid]` its n true digits.
    """

    problems: dict[str, dict[str, Any]]
    splits: dict[str, list[str]]
    strips: dict[str, np.ndarray]
    digits: dict[str, tuple[int, ...]]


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """Return all scans, float32 [1797, 8, 8] in 0..1 (1 is ink), and their digits, int64 [1797]."""
    flat, target = load_digits(return_X_y=True)
    images = np.asarray(flat, np.float32).reshape(-1, 8, 8) / 16.0
    return images, np.asarray(target, np.int64)


def digits_qa(
    train: int = 12_000,
    val: int = 480,
    test: int = 900,
    seed: int = 0,
    *,
    weights: Mapping[str, float] | None = None,
    varied: float = 0.0,
    reworded: int = 0,
) -> DigitsQA:
    """Draw DigitsQA.

    Args:
        train, val, test: The number of questions. In `val` and `test`, families take turns.
        seed: The random seed; a split does not depend on the sizes of the others.
        weights: How often each family is drawn for `train`, in place of `WEIGHTS`.
        varied: The share of `train` that is varied.
        reworded: The number of questions of a split `reworded`, all of them varied and freely
            worded, about the scans of `val`; 0 leaves the split out.

    Raises:
        ValueError: A negative number of questions, a share that is none, or weights for a family
            that does not exist.
    """
    share = WEIGHTS | dict(weights or {})
    if unknown := sorted(set(share) - set(FAMILIES)):
        raise ValueError(f"weights: no family {unknown}; the families are {list(FAMILIES)}")
    images, labels = scans()
    if not 0 <= varied <= 1:
        raise ValueError(f"varied={varied}: a share is between 0 and 1")
    out = DigitsQA({}, {}, {}, {})
    sizes = {"train": train, "val": val, "test": test} | (
        {"reworded": reworded} if reworded else {}
    )
    for number, (split, count) in enumerate(sizes.items()):
        if count < 0:
            raise ValueError(
                f"{split}: {count} questions asked for; the number must not be negative"
            )
        rng = np.random.default_rng([seed, number])
        where = np.arange(len(labels))[CUT["val" if split == "reworded" else split]]
        rows = [where[labels[where] == digit] for digit in range(10)]
        out.splits[split] = []
        odds = np.array([share[family] for family in FAMILIES])
        for index in range(count):
            form = _Form()
            if split == "train":
                family = FAMILIES[rng.choice(len(FAMILIES), p=odds / odds.sum())]
            else:
                family = FAMILIES[index % len(FAMILIES)]
            if split == "reworded" or (split == "train" and varied and rng.random() < varied):
                form = _varied(rng, family, free=split == "reworded")
            qid = f"{split}-{index:05d}"
            drawn = _DRAW[family](rng, form)
            out.problems[qid] = _record(family, split, drawn, form)
            out.splits[split].append(qid)
            if drawn.digits is not None:
                chosen = [rng.choice(rows[digit]) for digit in drawn.digits]
                out.strips[qid] = np.concatenate([images[i] for i in chosen], axis=1)
                out.digits[qid] = drawn.digits
    return out


@dataclass(frozen=True)
class _Form:
    """How a question is put: the places of its strip, how many options, and whether freely worded,
    and not in DigitsQA's own words."""

    places: tuple[str, ...] = POSITIONS
    fewest: int = 3
    most: int = 5
    free: bool = False

    def word(
        self, rng: np.random.Generator, family: str, asked: Sequence[int | str] = (),
        compared: str = "larger",
    ) -> str:  # fmt: skip
        """Word a question about places, by number from the left, or about numbers, as text."""
        if self.free:
            return free_words(rng, family, asked, len(self.places), compared)
        names = [self.places[a] if isinstance(a, int) else a for a in asked]
        return own_words(family, names, compared)

    def order(self, rng: np.random.Generator, pair: tuple[int, int]) -> tuple[int, int]:
        """Return two places as the question names them: from left to right, or in any order."""
        return pair if not self.free or rng.random() < 0.5 else (pair[1], pair[0])


def _varied(rng: np.random.Generator, family: str, *, free: bool) -> _Form:
    fits = {n: odds for n, odds in COUNTS.items() if n > 1 or family in ("read", "lookup", "even")}
    odds = np.array(list(fits.values()))
    count = int(rng.choice(list(fits), p=odds / odds.sum()))
    return _Form(PLACES[count], fewest=2, most=8, free=free)


@dataclass(frozen=True)
class _Drawn:
    """A drawn question; its record's rationale first states all digits, if there are any."""

    question: str
    choices: list[Any]
    answer: int
    rationale: str
    hint: str = ""
    digits: tuple[int, ...] | None = None


def _record(family: str, split: str, drawn: _Drawn, form: _Form) -> dict[str, Any]:
    kind, stated = KINDS[family], ""
    if drawn.digits is not None:
        places = zip(form.places, drawn.digits, strict=True)
        stated = ", ".join(f"{place} {digit}" for place, digit in places) + ". "
    return {
        "question": drawn.question,
        "choices": [str(choice) for choice in drawn.choices],
        "answer": drawn.answer,
        "hint": drawn.hint,
        "image": "image.png" if drawn.digits is not None else None,
        "task": "closed choice",
        **vars(kind),
        "category": family,
        "solution": stated + drawn.rationale,
        "split": split,
    }


def _some(
    rng: np.random.Generator, values: range | str, count: int, odds: np.ndarray | None = None
) -> list[Any]:
    """Draw `count` different values, in random order."""
    return [values[i] for i in rng.permutation(rng.choice(len(values), count, False, odds))]


def _options(
    rng: np.random.Generator, form: _Form, values: range | str, odds: np.ndarray | None = None
) -> tuple[list[Any], int]:
    """Draw the form's number of different options and, uniformly, which of them is right.

    `odds` make some values more likely to be options.
    """
    most = min(form.most, len(values))
    options = _some(rng, values, int(rng.integers(form.fewest, most + 1)), odds)
    return options, int(rng.integers(len(options)))


def _places(rng: np.random.Generator, form: _Form, count: int) -> list[int]:
    """Draw `count` different places of the strip, from left to right."""
    return sorted(int(i) for i in rng.choice(len(form.places), size=count, replace=False))


def _pair(rng: np.random.Generator, form: _Form) -> tuple[int, int]:
    first, second = _places(rng, form, 2)
    return form.order(rng, (first, second))


def _strip(rng: np.random.Generator, form: _Form, known: Mapping[int, int]) -> tuple[int, ...]:
    """Complete `known` (place -> digit) to a strip at random."""
    return tuple(known.get(i, int(rng.integers(10))) for i in range(len(form.places)))


def _read(rng: np.random.Generator, form: _Form) -> _Drawn:
    (place,) = _places(rng, form, 1)
    options, answer = _options(rng, form, range(10))
    digits = _strip(rng, form, {place: options[answer]})
    question = form.word(rng, "single" if len(form.places) == 1 else "read", [place])
    rationale = f"{form.places[place]} {digits[place]}, so {digits[place]}."
    return _Drawn(question, options, answer, rationale, digits=digits)


def _compare(rng: np.random.Generator, form: _Form) -> _Drawn:
    first, second = _pair(rng, form)
    word = ("larger", "smaller")[int(rng.integers(2))]
    options, answer = _options(rng, form, range(1, 10) if word == "larger" else range(9))
    best = options[answer]
    other = int(rng.integers(best) if word == "larger" else rng.integers(best + 1, 10))
    swap = rng.random() < 0.5
    digits = _strip(rng, form, {first: other if swap else best, second: best if swap else other})
    a, b = form.places[first], form.places[second]
    question = form.word(rng, "compare", [first, second], word)
    rationale = f"{a} {digits[first]}, {b} {digits[second]}, {word} {best}, so {best}."
    return _Drawn(question, options, answer, rationale, digits=digits)


def _add(rng: np.random.Generator, form: _Form) -> _Drawn:
    first, second = _pair(rng, form)
    # as often as two digits make them, so that all pairs of digits come about equally often
    ways = 10.0 - np.abs(np.arange(19) - 9)
    options, answer = _options(rng, form, range(19), ways / ways.sum())
    total = options[answer]
    one = int(rng.integers(max(0, total - 9), min(9, total) + 1))
    digits = _strip(rng, form, {first: one, second: total - one})
    a, b = form.places[first], form.places[second]
    question = form.word(rng, "add", [first, second])
    rationale = f"{a} {one} plus {b} {total - one} is {total}, so {total}."
    return _Drawn(question, options, answer, rationale, digits=digits)


def _even(rng: np.random.Generator, form: _Form) -> _Drawn:
    places = form.places
    most = len(places) + 1
    count = most if form.fewest == 3 else int(rng.integers(2, most + 1))
    options = _some(rng, range(most), count)
    answer = int(rng.integers(count))
    even = set(_some(rng, range(len(places)), options[answer]))
    digits = tuple(2 * int(rng.integers(5)) + (i not in even) for i in range(len(places)))
    parity = ", ".join(
        f"{place} {digit} {'odd' if digit % 2 else 'even'}"
        for place, digit in zip(places, digits, strict=True)
    )
    question = form.word(rng, "even")
    rationale = f"{parity}, so {options[answer]}."
    return _Drawn(question, options, answer, rationale, digits=digits)


def _table(rng: np.random.Generator) -> tuple[dict[int, str], str]:
    """Draw a code table of six rows, and write the hint that shows it."""
    rows = dict(zip(_some(rng, range(10), 6), _some(rng, CODES, 6), strict=True))
    return rows, "Code table: " + ", ".join(f"{d} {code}" for d, code in rows.items()) + "."


def _lookup(rng: np.random.Generator, form: _Form) -> _Drawn:
    (place,) = _places(rng, form, 1)
    rows, hint = _table(rng)
    options, answer = _options(rng, form, "".join(rows.values()))
    code = options[answer]
    digit = next(d for d, c in rows.items() if c == code)
    digits = _strip(rng, form, {place: digit})
    question = form.word(rng, "lookup", [place])
    rationale = f"{form.places[place]} {digit}, row {digit} {code}, so {code}."
    return _Drawn(question, options, answer, rationale, hint, digits)


def _text(rng: np.random.Generator, form: _Form) -> _Drawn:
    kind = ("lookup", "add", "compare")[int(rng.integers(3))]
    if kind == "lookup":
        rows, hint = _table(rng)
        options, answer = _options(rng, form, "".join(rows.values()))
        digit = next(d for d, c in rows.items() if c == options[answer])
        rationale = f"row {digit} {options[answer]}, so {options[answer]}."
        question = form.word(rng, "lookup", [str(digit)])
        return _Drawn(question, options, answer, rationale, hint)
    if kind == "add":
        a, b = (int(rng.integers(10)) for _ in range(2))
        question, right = form.word(rng, "add", [str(a), str(b)]), a + b
        rationale = f"{a} plus {b} is {right}, so {right}."
        values = range(19)
    else:
        a, b = _some(rng, range(10), 2)
        word = ("larger", "smaller")[int(rng.integers(2))]
        right = max(a, b) if word == "larger" else min(a, b)
        question = form.word(rng, "compare", [str(a), str(b)], word)
        rationale = f"{a}, {b}, {word} {right}, so {right}."
        values = range(10)
    options, answer = _options(rng, form, values)
    if right in options:
        answer = options.index(right)
    options[answer] = right
    return _Drawn(question, options, answer, rationale)


_DRAW: dict[str, Callable[[np.random.Generator, _Form], _Drawn]] = {
    "read": _read,
    "compare": _compare,
    "add": _add,
    "lookup": _lookup,
    "even": _even,
    "text": _text,
}


# -- rationales read back --------------------------------------------------------------------

_NAMED = "|".join(dict.fromkeys(place for places in PLACES.values() for place in places))
_STATED = re.compile(rf"\b({_NAMED}) (\d+)\b")
_CONCLUSION = re.compile(r"\bso (\w+)")


@dataclass(frozen=True)
class Facts:
    """The facts that a rationale states.

    Attributes:
        digits: Place -> digit, from the rationale's first sentence.
        used: Place -> digit, from its second sentence: the digits that the question needs.
        conclusion: The value at its end (`so 7` gives "7"), or None.
    """

    digits: Mapping[str, int]
    used: Mapping[str, int]
    conclusion: str | None


def facts(rationale: str) -> Facts:
    """Read the facts of a rationale such as `left 3, middle 7, right 1. middle 7, row 7 K, so K.`

    Any text can be read. Of a place that one sentence states twice, the first digit counts.
    """
    first, _, rest = rationale.partition(".")
    digits, used = ({p: int(d) for p, d in reversed(_STATED.findall(s))} for s in (first, rest))
    found = _CONCLUSION.findall(rationale)
    return Facts(digits, used, found[-1] if found else None)


_SUM = re.compile(r"(\d+) plus (?:[a-z]+ )?(\d+) is (\d+)")
_BEST = re.compile(r"(\d+), (?:[a-z]+ )?(\d+), (larger|smaller) (\d+)")
_PARITY = re.compile(r"(\d+) (even|odd)\b")
_ROW = re.compile(r"\brow (\d+) (\w+)")
_READ = re.compile(r"^[a-z]+ (\d+), so (\w+)")


def false_steps(rationale: str, hint: str = "") -> list[str]:
    """Return the steps of a rationale that do not hold: a sum, a comparison, a parity, a row, and
    a digit that is read and another one concluded.

    Args:
        rationale: Any text; what is no step of DigitsQA's rationales is passed over.
        hint: The question's context, in which a row must stand.
    """
    conclusion, false = facts(rationale).conclusion, []
    _, _, rest = rationale.rpartition(". ")
    for a, b, total in _SUM.findall(rest):
        if int(a) + int(b) != int(total) or total != conclusion:
            false.append(f"{a} plus {b} is {total}, so {conclusion}")
    for a, b, word, best in _BEST.findall(rest):
        right = (max if word == "larger" else min)(int(a), int(b))
        if int(best) != right or best != conclusion:
            false.append(f"{a}, {b}, {word} {best}, so {conclusion}")
    false += [f"{digit}, so {so}" for digit, so in _READ.findall(rest) if digit != so]
    parities = _PARITY.findall(rest)
    false += [f"{d} is {p}" for d, p in parities if (int(d) % 2 == 0) != (p == "even")]
    if parities and conclusion != str(sum(p == "even" for _, p in parities)):
        false.append(f"{conclusion} of {len(parities)} are even")
    for row, code in _ROW.findall(rest):
        if not re.search(rf"\b{row} {code}\b", hint) or code != conclusion:
            false.append(f"row {row} {code}, so {conclusion}")
    return false
