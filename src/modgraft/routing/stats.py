"""Statistics of a router's choices: usage of each module, entropy, dead modules, collapse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from modgraft.routing.base import Routing


@dataclass(frozen=True)
class Usage:
    """Statistics of one router's choices since counting began.

    Attributes:
        path: the site, or ``""`` if one choice holds for the whole network.
        names: the names of the N modules.
        choices: how many choices were counted.
        share: ``[N]``, each module's share of all weight.
        picked: ``[N]``, the share of choices in which its weight was not 0.
        entropy: the mean entropy of a choice's probabilities, in bits, from 0 (certain) to log₂ N.
        spread: the entropy of ``share``, in bits, from 0 (collapse) to log₂ N (even).
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
        """Return the names of the modules that no choice picked."""
        return tuple(n for n, p in zip(self.names, self.picked, strict=True) if p == 0)

    @property
    def collapsed(self) -> bool:
        """Return whether one of two or more modules has more than 95 % of the weight."""
        return len(self.share) > 1 and max(self.share) > 0.95


class UsageCounter:
    """Counts the choices of one router; compiled code is not counted."""

    def __init__(self, count: int) -> None:
        self.size = count
        self.reset()

    def reset(self) -> None:
        """Start counting again from zero."""
        self.choices = 0
        self.weight = torch.zeros(self.size, dtype=torch.float64)
        self.picked = torch.zeros(self.size, dtype=torch.float64)
        self.entropy = 0.0

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Count the choices of ``routing``."""
        if torch.compiler.is_dynamo_compiling():
            return
        weights = routing.weights.detach().reshape(-1, self.size).double().cpu()
        probabilities = routing.probabilities.detach().reshape(-1, self.size).double().cpu()
        probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp_min(1e-300)
        self.choices += len(weights)
        self.weight += weights.sum(0)
        self.picked += weights.ne(0).sum(0)
        self.entropy += float(torch.special.entr(probabilities).sum()) / math.log(2)

    def usage(self, path: str, names: tuple[str, ...]) -> Usage:
        """Return the statistics of the choices counted so far."""
        many = max(1, self.choices)
        share = self.weight / self.weight.sum().clamp_min(1e-300)
        spread = float(torch.special.entr(share).sum()) / math.log(2)
        return Usage(
            path, names, self.choices, tuple(share.tolist()),
            tuple((self.picked / many).tolist()), self.entropy / many, spread,
        )  # fmt: skip
