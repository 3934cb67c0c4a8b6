"""Two ways of doing one thing, timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
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


def side_by_side(a: Callable[[], object], b: Callable[[], object], rounds: int = 7) -> Pair:
    """Time two functions in turn, after one uncounted call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    a(), b()
    for _ in range(rounds):
        for function, out in ((a, times[0]), (b, times[1])):
            start = time.perf_counter()
            function()
            out.append(time.perf_counter() - start)
    return Pair(tuple(times[0]), tuple(times[1]))
