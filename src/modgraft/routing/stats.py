"""What a router has chosen: use of each module, entropy, dead modules, collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from modgraft.routing.base import Routing


@dataclass(frozen=True)
class Use:
    """What one router has chosen since its count began.

    Attributes:
        path: the site, or ``""`` where one choice holds for the whole network.
        choices: how many were counted.
        share: ``[N]``, the mean weight of each module by the sum of all.
        picked: ``[N]``, how often each had a weight other than 0.
        entropy: of a single choice's chances, mean, in bits: 0 is certain, log₂ N is no choice.
        spread: entropy of the mean chances, in bits: 0 is collapse, log₂ N is even use.
    """

    path: str
    names: tuple[str, ...]
    choices: int
    share: tuple[float, ...]
    picked: tuple[float, ...]
    entropy: float
    spread: float

    @property
    def dead(self) -> tuple[str, ...]:
        """The modules that no choice picked."""
        return tuple(n for n, p in zip(self.names, self.picked, strict=True) if p == 0)

    @property
    def collapsed(self) -> bool:
        """Whether one module has more than 95 % of the weight, of two or more."""
        return len(self.share) > 1 and max(self.share) > 0.95


class Tally:
    """Counts the choices of one router. TensorCache out of compiled code."""

    def __init__(self, count: int) -> None:
        self.size = count
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.choices = 0
        self.weight = torch.zeros(self.size, dtype=torch.float64)
        self.picked = torch.zeros(self.size, dtype=torch.float64)
        self.chance = torch.zeros(self.size, dtype=torch.float64)
        self.entropy = 0.0

    @torch.no_grad()
    def count(self, routing: Routing) -> None:
        """Add what was chosen."""
        if torch.compiler.is_compiling():
            return
        weights = routing.weights.detach().reshape(-1, self.size).double().cpu()
        chances = routing.chances.detach().reshape(-1, self.size).double().cpu()
        chances = chances / chances.sum(-1, keepdim=True).clamp_min(1e-300)
        self.choices += len(weights)
        self.weight += weights.sum(0)
        self.picked += weights.ne(0).sum(0)
        self.chance += chances.sum(0)
        self.entropy += float(torch.special.entr(chances).sum()) / math.log(2)

    def use(self, path: str, names: tuple[str, ...]) -> Use:
        """What has been counted."""
        many = max(1, self.choices)
        share = self.weight / self.weight.sum().clamp_min(1e-300)
        spread = float(torch.special.entr(self.chance / many).sum()) / math.log(2)
        return Use(
            path, names, self.choices, tuple(share.tolist()),
            tuple((self.picked / many).tolist()), self.entropy / many, spread,
        )  # fmt: skip
