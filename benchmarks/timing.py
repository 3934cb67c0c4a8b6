"""Two ways of doing one thing, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Pair:
    """Seconds of A and B over rounds run A B A B …, so that a machine's drift meets both."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median over rounds of B's time by A's."""
        return median(b / a for a, b in zip(self.a, self.b, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a round."""
        ratios = [b / a for a, b in zip(self.a, self.b, strict=True)]
        return min(ratios), max(ratios)


def in_turn(
    functions: Sequence[Callable[[], object]],
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each function over rounds of all in turn, after one uncounted call of each."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, out in zip(functions, times, strict=True):
            start = clock()
            function()
            out.append(clock() - start)
    return times


def side_by_side(a: Callable[[], object], b: Callable[[], object], rounds: int = 7) -> Pair:
    """Time two functions in turn."""
    first, second = in_turn([a, b], rounds)
    return Pair(tuple(first), tuple(second))
