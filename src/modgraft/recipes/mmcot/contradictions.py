"""What a run on DigitsQA writes, held against itself, against the question, and against the eye."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from modgraft.data.digit_wordings import PLACES
from modgraft.data.digits import facts, false_steps
from modgraft.data.records import Record

_PLACE = re.compile(
    rf"\b({'|'.join(dict.fromkeys(p for places in PLACES.values() for p in places))})\b"
)
_NUMBER = re.compile(r"\d+")
_ROW = re.compile(r"\b(\d) ([A-Z])\b")


def contradictions(
    record: Record, rationale: str, choice: int | None, seen: Sequence[int] | None
) -> Iterator[str]:
    """Yield what does not go together, a clause each.

    Args:
        record: The question, with its context and options.
        rationale: What stage 1 wrote.
        choice: The index of the option that stage 2 named, if any.
        seen: The digits that the eye reads in the picture, from left to right; None: no picture.
    """
    told, named = facts(rationale), None if choice is None else record.choices[choice]
    if told.conclusion is None:
        yield "the rationale comes to no value"
    elif told.conclusion not in record.choices:
        yield f"the rationale comes to {told.conclusion}, which is none of the options"
    elif named is not None and told.conclusion != named:
        yield f"the rationale comes to {told.conclusion}, the option named is {named}"
    if seen is None and told.digits:
        yield "the rationale tells of digits, and there is no picture"
    if seen is not None:
        read = dict(zip(PLACES[len(seen)], seen, strict=True))
        if read != told.digits:
            yield f"the eye reads {_listed(read)}, the rationale says {_listed(told.digits)}"
    if not told.used.items() <= told.digits.items():
        yield f"the rationale uses {_listed(told.used)}, and has read {_listed(told.digits)}"
    if told.conclusion is not None:
        yield from _of_others(record.question, rationale, told.used)
    if twice := sorted(n for n, codes in _codes(record.hint).items() if len(codes) > 1):
        yield f"the table has several codes for {', '.join(twice)}"
    for step in false_steps(rationale, record.hint):
        yield f"a step of the rationale does not hold: {step}"


def _of_others(question: str, rationale: str, used: Mapping[str, int]) -> Iterator[str]:
    """Say that a rationale is of other places or numbers than the question."""
    places = set(_PLACE.findall(question))
    if places and places != set(used):
        named = " and ".join(sorted(places))
        yield f"the question is of {named}, the rationale uses {_listed(used)}"
    numbers = sorted(_NUMBER.findall(question))
    _, _, rest = rationale.rpartition(". ")
    if numbers and numbers != sorted(_NUMBER.findall(rest)[: len(numbers)]):
        yield f"the question is of {' and '.join(numbers)}, the rationale of others: {rest}"


def _codes(hint: str) -> dict[str, set[str]]:
    """Return a table's codes by row."""
    rows: dict[str, set[str]] = {}
    for row, code in _ROW.findall(hint):
        rows.setdefault(row, set()).add(code)
    return rows


def _listed(digits: Mapping[str, int]) -> str:
    order = ("left", "middle", "second", "third", "right")
    return ", ".join(f"{place} {digits[place]}" for place in order if place in digits) or "none"
