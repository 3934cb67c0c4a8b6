"""An answer: what was asked, the lines that support it, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["structured", "backlink", "temporal", "free"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """A line of a note, re-read from the file before it is shown; ``quote`` is exactly it."""

    note: str
    line: int
    quote: str
    when: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its evidence, or a refusal with its reason.

    ``text`` says it in words; every line of ``evidence`` was verified. ``refused`` is None, or the
    reason why nothing is answered; then ``text`` is that reason too. ``remarks`` say how it was
    found: that vectors are off, which server phrased it, what a phrasing was rejected for.
    """

    question: str
    kind: Kind
    text: str
    evidence: tuple[Evidence, ...] = ()
    refused: str | None = None
    remarks: tuple[str, ...] = ()
