"""Routing that is fixed, not learned."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, final

import torch
from torch import Tensor

from modgraft.core.errors import ModgraftError, UnknownNameError
from modgraft.routing.base import Level, Router, Routing


@final
class Fixed(Router):
    """α_j = 1/|K| for j in the given set K, else 0.

    Expert knowledge, as in multitask adapters or hard parameter sharing (the survey's section 4.1):
    one set of modules for all inputs, or one for each task.

    Args:
        among: the names of the modules that act; None: all of the mixture's. A dictionary
            ``{"qa": ("math", "law"), …}`` gives a set for each task.

    Raises:
        ModgraftError: for an empty set, or a name that is not in the mixture.
    """

    levels: ClassVar[tuple[Level, ...]] = ("task",)
    only_levels: ClassVar[str] = "a given set is the same for every example and token"

    level: Level = field(default="task", kw_only=True)
    among: tuple[str, ...] | dict[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.among, dict):
            self.tasks = tuple(self.among)
        self.check()

    @property
    def sparse(self) -> bool:
        return True

    def build(self, names: tuple[str, ...], width: int) -> None:
        self.names = names
        among = self.among
        sets = [*among.values()] if isinstance(among, dict) else [names if among is None else among]
        rows = torch.zeros(len(sets), len(names))
        for row, chosen in zip(rows, sets, strict=True):
            unknown = [n for n in chosen if n not in names]
            if unknown:
                raise UnknownNameError(
                    f"Fixed(among={self.among!r}): {unknown[0]!r} is none of the mixture's "
                    f"modules {', '.join(names)}"
                )
            if not chosen:
                raise ModgraftError(
                    f"Fixed(among={self.among!r}): a set of no modules routes nowhere"
                )
            for name in chosen:
                row[names.index(name)] = 1 / len(chosen)
        self.register_buffer("rows", rows, persistent=False)

    def logits(self, query: Tensor) -> Tensor:
        return self.get_buffer("rows")[query]

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        return Routing(logits, logits)
