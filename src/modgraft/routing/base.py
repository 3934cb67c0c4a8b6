"""The routing function α = r(x, t): a weight for each of the modules, 0 for those that do not act.

A router is written once, by hyper-parameters alone; a mixture makes a fresh copy for each of its
sites and calls ``build``. It never sees the host.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from modgraft.core.config import Configured
from modgraft.core.errors import ModgraftError, UnknownNameError

Level = Literal["task", "example", "token"]
LEVELS: tuple[Level, ...] = ("task", "example", "token")


@dataclass(frozen=True)
class Routing:
    """What a router chose.

    Attributes:
        weights: ``[…, N]``, exactly 0 where a module does not act.
        chances: ``[…, N]``, the distribution (or, for independent choices, the probabilities) that
            the choice was made from.
        score: ``[…]``, what a score-function estimator differentiates: log-probability of a sampled
            choice (times its importance); None where the weights carry the gradient themselves.
        balance: the router's own balance loss, a scalar, None if it has none.
    """

    weights: Tensor
    chances: Tensor
    score: Tensor | None = None
    balance: Tensor | None = None


class Member(NamedTuple):
    """A module at one site: what was built there, and the part of a fused projection it acts on."""

    module: nn.Module
    part: tuple[int, int] | None


class Router(Configured):
    """One way to choose among N modules.

    ``level`` says what is routed: a task (a trained row of logits for each of ``tasks``), an
    example or a token (logits are linear in the query: W_r q + b_r).
    """

    level: Level = field(default="example", kw_only=True)
    tasks: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def sparse(self) -> bool:
        """Whether a module of weight 0 need not run: no gradient reaches its weight."""
        return not (self.training and torch.is_grad_enabled())

    @property
    def looks(self) -> bool:
        """Whether it goes by what its modules are."""
        return type(self).prepare is not Router.prepare

    def check(self) -> None:
        """Refuse a level or tasks that mean nothing; for ``__post_init__``.

        Raises:
            ModgraftError: for an unknown level, or tasks named twice or at another level.
        """
        name = type(self).__name__
        if self.level not in LEVELS:
            raise ModgraftError(f"{name}(level={self.level!r}): one of {', '.join(LEVELS)}")
        self.tasks = tuple(self.tasks)
        if self.tasks and self.level != "task":
            raise ModgraftError(
                f"{name}(level={self.level!r}, tasks={self.tasks!r}): tasks have logits of their "
                f"own with level='task'; an {self.level} is routed by what it is"
            )
        if len(set(self.tasks)) != len(self.tasks):
            raise ModgraftError(f"{name}(tasks={self.tasks!r}): a task is named twice")

    def fresh(self, names: tuple[str, ...], width: int) -> Self:
        """A copy built for a choice among ``names``, by queries ``[…, width]``."""
        built = type(self)(**self.config())
        built.build(names, width)
        return built

    def build(self, names: tuple[str, ...], width: int) -> None:
        """Make the parameters: a table ``[T, N]``, or W_r ``[N, width]`` and b_r ``[N]``.

        They start near zero: nearly equal weights, and no ties that always fall to the first.
        """
        self.names = names
        if self.level == "task":
            self.table = nn.Parameter(1e-3 * torch.randn(max(1, len(self.tasks)), len(names)))
        else:
            self.map = nn.Linear(width, len(names))
            nn.init.normal_(self.map.weight, std=1e-3)
            nn.init.zeros_(self.map.bias)

    def admits(self, member: Member, layer: nn.Module) -> str | None:
        """Why a module at ``layer`` cannot be among those it chooses from; None: it can.

        A router that goes by what its modules are says so here, and sees them in :meth:`prepare`.
        """
        return None

    def prepare(self, members: Sequence[Sequence[Member]], layer: nn.Module) -> None:
        """See what is chosen from, before every choice at a site; most routers do not look.

        Args:
            members: of each of the modules what it has there: nothing where it does not act,
                several at the parts of a fused projection.
            layer: what they act on.
        """

    def logits(self, query: Tensor) -> Tensor:
        """``[…, N]`` from queries ``[…, width]``, or from task numbers ``[…]`` (int64)."""
        if self.level == "task":
            return self.table[query]
        return self.map(query)

    def forward(self, query: Tensor) -> Routing:
        """Choose for queries ``[…, width]``, or task numbers ``[…]`` at level ``task``."""
        return self.choose(self.logits(query), query)

    @abstractmethod
    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        """Choose by ``logits`` ``[…, N]``."""

    def task_number(self, task: str | None) -> int:
        """The row of ``task``; None means the only one.

        Raises:
            ModgraftError: for a task that is not one of ``tasks``, or none where there are several.
        """
        if task is None and len(self.tasks) <= 1:
            return 0
        if task not in self.tasks:
            raise UnknownNameError(
                f"this {type(self).__name__} routes the tasks "
                f"{', '.join(self.tasks) or '(one without a name)'}, not {task!r}; write the "
                f"mixture's name with one of them, as skills[{(self.tasks or ('…',))[0]!r}]"
            )
        return self.tasks.index(task)


def one_hot_like(logits: Tensor, index: Tensor) -> Tensor:
    """Zeros like ``logits`` ``[…, N]`` with 1 at ``index`` ``[…]`` or ``[…, k]``."""
    index = index if index.dim() == logits.dim() else index.unsqueeze(-1)
    return torch.zeros_like(logits).scatter(-1, index, 1.0)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` in value, with the gradient of ``soft``."""
    return hard.detach() + (soft - soft.detach())


def softmax_of_best(logits: Tensor, k: int) -> Tensor:
    """The softmax of the ``k`` largest of ``logits`` ``[…, N]``, exactly 0 elsewhere."""
    best = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))


def check_positive(router: Router, **values: float) -> None:
    """Refuse options that are not finite and above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ModgraftError(f"{type(router).__name__}({name}={value}): finite and above 0")


def check_k(router: Router, k: int, names: tuple[str, ...] | None = None) -> None:
    """Refuse a choice of fewer than one module, or of more than there are."""
    if k < 1:
        raise ModgraftError(f"{type(router).__name__}(k={k}): k is at least 1")
    if names is not None and k > len(names):
        raise ModgraftError(
            f"{type(router).__name__}(k={k}) over {len(names)} modules ({', '.join(names)}): k is "
            f"at most {len(names)}"
        )
