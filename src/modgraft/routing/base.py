"""The routing function α = r(x, t): a weight for each module, 0 for those that do not act.

A router is given by its hyper-parameters alone; a mixture makes a copy for each of its sites and
calls the copy's ``build``. It never sees the host. To add one, subclass :class:`Router`, call
``self.check()`` in ``__post_init__``, and override ``choose``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from modgraft.core.config import Configured
from modgraft.core.errors import ModgraftError
from modgraft.core.parts import Part

Level = Literal["task", "example", "token"]
LEVELS: tuple[Level, ...] = ("task", "example", "token")


@dataclass(frozen=True)
class Routing:
    """A router's choice.

    Attributes:
        weights: ``[…, N]``, exactly 0 where a module does not act.
        probabilities: ``[…, N]``, from which the choice was made: a distribution, or independent
            probabilities.
        score: ``[…]``, the log-probability of a sampled choice (times its importance weight), for a
            score-function estimator; None if the weights carry the gradient.
        balance: the router's load-balancing loss, a scalar; None if it has none.
    """

    weights: Tensor
    probabilities: Tensor
    score: Tensor | None = None
    balance: Tensor | None = None

    @property
    def adds_to_loss(self) -> bool:
        """Whether it learns by a loss of its own."""
        return self.score is not None or self.balance is not None


class Member(NamedTuple):
    """A module built for one site, and the part of a fused projection that it acts on."""

    module: nn.Module
    part: Part | None


class Router(Configured):
    """One way to choose among N modules.

    ``level`` says what is routed: a task (by a trained row of logits for each of ``tasks``), or an
    example or a token (by logits that are linear in its query, W_r q + b_r).
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "looks": "inspects", "prepare": "inspect", "admits": "objection",
    }  # fmt: skip

    levels: ClassVar[tuple[Level, ...]] = LEVELS
    """The levels that it can route."""

    only_levels: ClassVar[str] = ""
    """Why it has no other levels, for the error that refuses them."""

    level: Level = field(default="example", kw_only=True)
    tasks: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def sparse(self) -> bool:
        """Return whether a module of weight 0 need not run, since its weight has no gradient."""
        return not (self.training and torch.is_grad_enabled())

    @property
    def inspects(self) -> bool:
        """Return whether the choice depends on the modules themselves, by :meth:`inspect`."""
        return type(self).inspect is not Router.inspect

    def check(self) -> None:
        """Check ``level`` and ``tasks``; every ``__post_init__`` calls it.

        Raises:
            ModgraftError: for a level that is unknown or not in ``levels``, or tasks that are named
                twice or at another level.
        """
        name = type(self).__name__
        if self.level not in LEVELS:
            raise ModgraftError(f"{name}(level={self.level!r}): one of {', '.join(LEVELS)}")
        if self.level not in self.levels:
            raise ModgraftError(
                f"{name}(level={self.level!r}): {self.only_levels}; "
                f"level={' or '.join(map(repr, self.levels))}"
            )
        self.tasks = tuple(self.tasks)
        if self.tasks and self.level != "task":
            raise ModgraftError(
                f"{name}(level={self.level!r}, tasks={self.tasks!r}): tasks have logits of their "
                f"own with level='task'; {self.level}s are routed by what they are"
            )
        if len(set(self.tasks)) != len(self.tasks):
            raise ModgraftError(f"{name}(tasks={self.tasks!r}): a task is named twice")

    def fresh(self, names: tuple[str, ...], width: int) -> Self:
        """Return a copy built for a choice among ``names``, by queries ``[…, width]``."""
        built = type(self)(**self.config())
        built.build(names, width)
        return built

    def build(self, names: tuple[str, ...], width: int) -> None:
        """Create the parameters: a table ``[T, N]``, or W_r ``[N, width]`` and b_r ``[N]``.

        They start near zero, so that weights are nearly equal, but not at zero, where every tie
        would go to the first module.
        """
        self.names = names
        if self.level == "task":
            self.table = nn.Parameter(1e-3 * torch.randn(max(1, len(self.tasks)), len(names)))
        else:
            self.map = nn.Linear(width, len(names))
            nn.init.normal_(self.map.weight, std=1e-3)
            nn.init.zeros_(self.map.bias)

    def objection(self, member: Member, layer: nn.Module) -> str | None:
        """Return why ``member`` cannot be chosen at ``layer``, None if it can.

        Override it where :meth:`inspect` does not work for every module.
        """
        return None

    def inspect(self, members: Sequence[Sequence[Member]], layer: nn.Module) -> None:
        """Look at the modules themselves, before every choice at a site.

        Override it where the choice depends on them.

        Args:
            members: for each module, what is built at the site: nothing if it does not act there,
                several at the parts of a fused projection.
            layer: the layer that they act on.
        """

    def logits(self, query: Tensor) -> Tensor:
        """Return ``[…, N]`` for queries ``[…, width]``, or for task numbers ``[…]`` (int64)."""
        if self.level == "task":
            return self.table[query]
        return self.map(query)

    def forward(self, query: Tensor) -> Routing:
        """Choose for queries ``[…, width]``, or for task numbers ``[…]`` at level ``task``."""
        return self.choose(self.logits(query), query)

    @abstractmethod
    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        """Choose by ``logits`` ``[…, N]``; ``query`` is what they were computed from."""


def one_hot_like(logits: Tensor, index: Tensor) -> Tensor:
    """Return zeros like ``logits`` ``[…, N]`` with 1 at ``index`` ``[…]`` or ``[…, k]``."""
    index = index if index.dim() == logits.dim() else index.unsqueeze(-1)
    return torch.zeros_like(logits).scatter(-1, index, 1.0)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of ``hard`` with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


def softmax_of_best(logits: Tensor, k: int) -> Tensor:
    """Return the softmax of the ``k`` largest of ``logits`` ``[…, N]``, exactly 0 elsewhere."""
    best = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))


def check_positive(router: Router, **values: float) -> None:
    """Check that options are finite and above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ModgraftError(f"{type(router).__name__}({name}={value}): finite and above 0")


def check_k(router: Router, k: int, names: tuple[str, ...] | None = None) -> None:
    """Check that at least one module is chosen, and not more than there are."""
    if k < 1:
        raise ModgraftError(f"{type(router).__name__}(k={k}): k is at least 1")
    if names is not None and k > len(names):
        raise ModgraftError(
            f"{type(router).__name__}(k={k}) over {len(names)} modules ({', '.join(names)}): k is "
            f"at most {len(names)}"
        )
