"""Successive halving: many candidates take a few steps, the best of them more, few all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modgraft.core.errors import ModgraftError


@dataclass(frozen=True)
class Round:
    """A round: how many candidates are trained in it, and until which step."""

    candidates: int
    until: int


def schedule(candidates: int, steps: int, *, eta: int = 3, keep: int = 5) -> list[Round]:
    """Plan the rounds of successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943).

    Each round goes on with one of ``eta`` candidates of the one before, from where they are, to
    ``eta`` times as many steps; the last round ends at ``steps``. ``keep`` candidates, or all if
    there are fewer, are in the last round.

    Raises:
        ModgraftError: for no candidate or no step, or an ``eta`` or ``keep`` that means nothing.
    """
    for name, value, least in (
        ("candidates", candidates, 1), ("steps", steps, 1), ("eta", eta, 2), ("keep", keep, 1)
    ):  # fmt: skip
        if type(value) is not int or value < least:
            raise ModgraftError(f"{name}={value!r}: it must be a whole number, {least} or more")
    sizes = [candidates]
    while sizes[-1] > keep and steps // eta ** len(sizes) >= 1:
        sizes.append(max(keep, -(-sizes[-1] // eta)))
    last = len(sizes) - 1
    return [Round(size, steps // eta ** (last - i)) for i, size in enumerate(sizes)]


def total(rounds: Sequence[Round]) -> int:
    """Return the steps that all rounds take together."""
    before = [0, *(each.until for each in rounds)]
    return sum(r.candidates * (r.until - b) for r, b in zip(rounds, before, strict=False))
