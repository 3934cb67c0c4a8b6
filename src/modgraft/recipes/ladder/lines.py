"""The lines of a ladder: what each rung costs, what it has reached, and which of them to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modgraft.core.errors import ModgraftError
from modgraft.recipes.ladder.pareto import frontier


@dataclass(frozen=True)
class Costs:
    """What a rung takes, whatever comes of it.

    Attributes:
        parameters: numbers that are trained, in the end.
        bytes: what is stored of them.
        memory: bytes in training: the weights, and the peak of what torch allocates in two steps.
    """

    parameters: int
    bytes: int
    memory: int


@dataclass(frozen=True)
class Score:
    """What a candidate had reached after a round.

    Attributes:
        rate: its learning rate.
        steps: those that it had taken.
        quality: the mean of its validation scores.
        error: the standard error of that mean; None where it is not known.
        seconds: of training until there.
    """

    rate: float
    steps: int
    quality: float
    error: float | None
    seconds: float


@dataclass(frozen=True)
class Line:
    """One rung of a ladder.

    Attributes:
        name: the rung's name.
        title: what people read.
        costs: None where the rung is not defined for the host.
        left_out: why it was not trained, "" if it was.
        scores: those of each of its learning rates after each round that it was in.
        failed: the errors of the learning rates that failed.
    """

    name: str
    title: str
    costs: Costs | None
    left_out: str = ""
    scores: tuple[Score, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def best(self) -> Score | None:
        """The best score among those with the most steps."""
        return max(self.scores, key=lambda s: (s.steps, s.quality), default=None)

    @property
    def curve(self) -> list[Score]:
        """The scores of the best learning rate, by steps."""
        best = self.best
        return [] if best is None else [s for s in self.scores if s.rate == best.rate]

    def cost(self, name: str) -> float:
        """Return a cost by its name: parameters, bytes, memory, steps or seconds."""
        best = self.best
        if self.costs is None or best is None:
            raise ModgraftError(f"{self.title} was not trained: {self.left_out or self.failed}")
        return getattr(best if name in ("steps", "seconds") else self.costs, name)


COSTS = tuple(Costs.__dataclass_fields__)
"""The costs that do not depend on how fast a machine is."""


def finalists(lines: Sequence[Line], steps: int) -> list[Line]:
    """Return the lines with all of the steps."""
    return [line for line in lines if line.best is not None and line.best.steps >= steps]


def top(lines: Sequence[Line]) -> Line:
    """Return the line of the best quality, of equal ones the first."""
    return max(lines, key=lambda line: line.best.quality if line.best else float("-inf"))


def choose(lines: Sequence[Line], by: str, tolerance: float | None) -> Line:
    """Return the cheapest line among those within the tolerance of the best.

    Args:
        lines: lines with scores, in their order, which decides between equal ones.
        by: the cost.
        tolerance: how far below the best quality; None: its standard error, 0 if that is unknown.
    """
    best = top(lines).best
    assert best is not None  # noqa: S101
    reach = (best.error or 0.0) if tolerance is None else tolerance
    near = [line for line in lines if line.best and line.best.quality >= best.quality - reach]
    return min(near, key=lambda line: (line.cost(by), -line.best.quality if line.best else 0.0))


def frontier_of(lines: Sequence[Line], cost: str) -> list[str]:
    """Return the names of the lines that no other one surpasses in quality at no higher cost."""
    points = [(line.best.quality, line.cost(cost)) for line in lines if line.best]
    return [lines[i].name for i in frontier(points)]
