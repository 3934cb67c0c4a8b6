"""What a DigitsQA rationale says, and which step of a wrong answer failed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

POSITIONS = ("left", "middle", "right")
"""The places of a strip, from left to right."""

ERRORS = ("perception", "reasoning", "mapping", "format")
"""The ways to be wrong; see `error_class`."""

_STATED = re.compile(rf"\b({'|'.join(POSITIONS)}) (\d+)\b")
_CONCLUSION = re.compile(r"\bso (\w+)")


@dataclass(frozen=True)
class Facts:
    """What a rationale states.

    Attributes:
        digits: place -> digit, from the rationale's first sentence (empty where it states none).
        used: place -> digit, those the question turns on, which the second sentence repeats.
        conclusion: the value it ends in (`so 7` gives "7"), or None.
    """

    digits: Mapping[str, int]
    used: Mapping[str, int]
    conclusion: str | None


def facts(rationale: str) -> Facts:
    """Read a rationale such as `left 3, middle 7, right 1. middle 7, row 7 K, so K.`

    It never raises: a model writes anything. A place that is stated twice in one sentence counts as
    first stated.
    """
    first, _, rest = rationale.partition(".")
    digits, used = ({p: int(d) for p, d in reversed(_STATED.findall(s))} for s in (first, rest))
    found = _CONCLUSION.findall(rationale)
    return Facts(digits, used, found[-1] if found else None)


def error_class(gold: str, written: str, answer: int, choice: int | None) -> str | None:
    """Which step failed: one of `ERRORS`, or None where the chosen option is right.

    Args:
        gold: the true rationale.
        written: the model's rationale.
        answer: the right option's index.
        choice: the chosen option's index, or None where no option could be read from the answer.

    `perception`: a digit that the question turns on is misread. `reasoning`: the digits are right,
    the conclusion is not. `mapping`: the conclusion is right, the option is not. `format`: no
    conclusion, or no option, can be read.
    """
    if choice == answer:
        return None
    true, said = facts(gold), facts(written)
    if said.conclusion is None:
        return "format"
    turns_on = true.used or true.digits
    if any(said.digits.get(place) != digit for place, digit in turns_on.items()):
        return "perception"
    if said.conclusion != true.conclusion:
        return "reasoning"
    return "format" if choice is None else "mapping"
