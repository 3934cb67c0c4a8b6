"""The greedy soup: the average of those candidates that raise a score on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modgraft.core.errors import ModgraftError


@dataclass(frozen=True)
class Soup:
    """What was chosen.

    Attributes:
        chosen: the names of the ingredients, the best one first.
        score: that of their average.
        alone: the score of each candidate alone.
    """

    chosen: list[str]
    score: float
    alone: dict[str, float]


def greedy(names: Sequence[str], validate: Callable[[Sequence[str]], float]) -> Soup:
    """Choose ingredients: each joins, the best first, if the average does not get worse by it.

    Greedy soup (Wortsman et al. 2022, arXiv:2203.05482, recipe 1).

    Args:
        names: the candidates'.
        validate: the score of the average of some of them; higher is better.

    Raises:
        ModgraftError: for a score that is no finite number.
    """

    def score(some: Sequence[str]) -> float:
        found = validate(some)
        if not isinstance(found, int | float) or math.isnan(found):
            raise ModgraftError(
                f"validate gave {found!r:.80} for {', '.join(some)}; it returns a number, higher "
                f"where the model is better"
            )
        return found

    alone = {name: score([name]) for name in names}
    best, *others = sorted(names, key=lambda name: -alone[name])  # of equal ones the first
    chosen, now = [best], alone[best]
    for name in others:
        if (found := score([*chosen, name])) >= now:
            chosen, now = [*chosen, name], found
    return Soup(chosen, now, alone)
