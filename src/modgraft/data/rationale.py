"""What a DigitsQA rationale says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

POSITIONS = ("left", "middle", "right")
"""The places of a strip, from left to right."""

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
