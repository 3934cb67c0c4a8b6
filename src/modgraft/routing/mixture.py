"""Mixtures: a router and an aggregation over named modules, itself a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Self, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modgraft.aggregation.base import Aggregation
from modgraft.aggregation.representation import Average
from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import (
    Computation,
    KeyValueComposition,
    TokenComposition,
    distinct_names,
)
from modgraft.core.context import EXAMPLE, Call
from modgraft.core.embeddings import token_width
from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.sites import Site
from modgraft.routing.base import Router, Routing
from modgraft.routing.learned import Soft
from modgraft.routing.stats import Tally

ROUTINGS = "routings"
"""Where a call remembers what routers chose in it, for their losses."""


@final
class Mixture(Computation):
    """y = g(α, {h_j}), α = r(x): a router chooses among modules, an aggregation makes one of them.

    Its sites are those of its modules; at each the modules that are there act as they would by
    themselves, weighted. Routed by ``"task"`` (a row of weights for each of the router's tasks,
    said in the composition as ``skills['qa']``) or by ``"example"``, one choice holds for the whole
    network; by ``"token"`` each site has a router of its own and chooses for each position.

    A token is routed by what its layer reads: x at a linear layer, elsewhere the output y that the
    modules act on. An example is routed by the mean of its input embeddings: an encoder's text, for
    a decoder the prompt (where ``labels`` are −100, so that no answer chooses its own module;
    everything, in ``generate``). ``side={"example": mg.Side(v[:, None])}`` gives another query.

    Args:
        over: the modules' names, or tasks as ``"h['fr']"``; mixtures among them.
        router: Soft over examples if none is given.
        aggregate: Average if none is given; one that finds its own weights, as Fuse, takes no
            router.
        width: of the query that examples are routed by; None: the host's embeddings'.

    Raises:
        ModgraftError: for fewer than one module or one named twice, a router with an aggregation
            that takes none, modules of attention weights, of a residual or of the input, or a
            token's choice where the output is no ``[B, n, d]`` or a module looks at other tokens.
    """

    over: Sequence[str]
    # a default in the class would stand before what nn.Module keeps apart as a child
    router: Router | None = field(default_factory=lambda: None)
    aggregate: Aggregation = field(default_factory=Average)
    width: int | None = None

    def __post_init__(self) -> None:
        example = ", as Mixture(['math', 'code'])"
        self.over = distinct_names(self.over, f"Mixture({self.over!r})", example)
        if self.router is None and self.aggregate.routed:
            self.router = Soft()
        if self.router is not None and not self.aggregate.routed:
            raise ModgraftError(
                f"Mixture(…, router={self.router!r}, aggregate={self.aggregate!r}): "
                f"{type(self.aggregate).__name__} finds its own weights; leave the router out"
            )

    @property
    def level(self) -> str:
        """What is routed: ``task``, ``example`` or ``token``, without a router each token."""
        return "token" if self.router is None else self.router.level

    @property
    def side_source(self) -> str | None:
        return EXAMPLE if self.level == "example" else None

    @property
    def by_token(self) -> bool:
        return self.level != "example"

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.over)

    def task_names(self, name: str) -> list[str]:
        tasks = () if self.router is None else self.router.tasks
        return [f"{name}[{task!r}]" for task in tasks] or [name]

    def per_task(self) -> list[Computation]:
        tasks = () if self.router is None else self.router.tasks
        return [Routed(self, task) for task in range(max(1, len(tasks)))]  # type: ignore[misc]

    def check(self, members: Sequence[tuple[str, Computation]]) -> None:
        """Refuse modules that cannot be mixed in this way.

        Args:
            members: the name and the method of each.

        Raises:
            ModgraftError: with what can be done instead.
        """
        for name, method in members:
            if isinstance(method, TokenComposition):
                raise ModgraftError(
                    f"Mixture({list(self.over)}): {name!r} puts tokens before the input, where "
                    f"no site's router weighs them; stack it, as 'skills >> {name}', or attend to "
                    f"prompts by mg.Attempt(over=[{name!r}, …])"
                )
            if not self.aggregate.routed and isinstance(method, KeyValueComposition):
                raise ModgraftError(
                    f"Mixture({list(self.over)}, aggregate={self.aggregate!r}): {name!r} puts "
                    f"keys and values into attention, and has no result of its own to look at"
                )
            if self.level == "token" and not method.by_token:
                raise ModgraftError(
                    f"Mixture({list(self.over)}) routes tokens, and {name!r}, a "
                    f"{type(method).__name__}, looks at other tokens or at a side input; route "
                    f"examples, router=Soft(level='example')"
                )

    def build(self, site: Site) -> None:
        reads = isinstance(site.module, nn.Linear | Conv1D)
        if self.level == "token" and (site.channels_first or site.time_first):
            raise SiteError(
                f"Mixture(level='token') at {site.label}: a token's choice needs an output "
                f"[B, n, d], and a {type(site.module).__name__} puts out another; "
                f"level='example' chooses for the whole of it"
            )
        self._reads, self._path = reads, site.path
        self.tally = Tally(len(self.over))
        self.baseline: float | None = None  # the running mean of losses, for a sampled choice
        wide = 0 if self.aggregate.routed else site.width
        self.combine = self.aggregate.fresh(len(self.over), wide)
        if self.router is None:
            return
        width = 1  # unused: a task has a row of weights, and no query
        if self.level == "token":
            width = _in_width(site.module) if reads else site.width
        elif self.level == "example":
            assert site.root is not None  # noqa: S101
            width = self.width or token_width(site.root)
        self.route = self.router.fresh(tuple(self.over), width)

    def share_with(self, first: Computation) -> None:
        """Share the first site's router, where one choice holds for the whole network."""
        assert isinstance(first, Mixture)  # noqa: S101
        if self.router is not None and self.level != "token":
            self._first = (first,)
            redirect(self.route, self.route.state_dict(), ModuleTensors(first.route))

    def at(self, site: Site) -> Self:
        if site.residual or site.parameter is not None:
            raise SiteError(
                f"Mixture at {site.label}: its modules there change weights inside the layer or "
                f"its residual, which cannot be weighed example by example; mix modules at a "
                f"layer's output"
            )
        return super().at(site)

    def choose(self, call: Call, x: Tensor | None, y: Tensor, task: int) -> Routing:
        """Route: weigh the modules at a site, ``[N]`` for a task, ``[B, N]`` or ``[B, n, N]``.

        Raises:
            SiteError: for tokens where the output ``y`` has none.
        """
        (first,) = self.__dict__.get("_first", (self,))
        key = (id(first), task)
        if self.level != "token" and key in call.memo:  # one choice a call, at all sites
            return call.memo[key]
        if self.level == "task":
            made = first.route(torch.tensor(task, device=y.device))
        elif self.level == "example":
            side = call.side[EXAMPLE]
            seen = side.seen().to(side.tensor.dtype)[..., None]  # [B, m, 1]
            query = (side.tensor * seen).sum(1) / seen.sum(1).clamp_min(1)  # [B, d]
            made = first.route(query.to(y.dtype))
        else:
            query = x if self._reads and x is not None else y
            if y.dim() < 3 or query.shape[:-1] != y.shape[:-1]:
                raise SiteError(
                    f"Mixture at {self._path}: tokens are routed, and this site puts out "
                    f"{list(y.shape)} for {list(query.shape)}, which has none; route examples, "
                    f"router=Soft(level='example'), or implant its modules elsewhere"
                )
            made = self.route(query)
        if self.level != "token":
            call.memo[key] = made
        if self.training and torch.is_grad_enabled():
            call.memo.setdefault(ROUTINGS, []).append((first, made))
        first.tally.count(made)
        return made


class Routed:
    """A mixture at one site for one of its tasks: what is in force under that task's name.

    Attributes:
        mixture: the mixture, built for the site.
        task: the number of the task; 0 where it has none.
        members: the names of the modules that it is over.
        side_source: the side input that it is routed by, if any.
    """

    def __init__(self, mixture: Mixture, task: int) -> None:
        self.mixture, self.task = mixture, task
        self.members = tuple(mixture.over)
        self.side_source = mixture.side_source

    def weights(self, call: Call, like: Tensor, rows: Tensor | None) -> list[Tensor]:
        """Return each module's weight, a number or ``[B]``, for the examples of ``like``.

        Args:
            call: the call under way.
            like: ``[B, …]``, of the layer; beams have their example's weights.
            rows: some of the examples; None: all.
        """
        chosen = self.mixture.choose(call, None, like, self.task).weights
        if chosen.dim() == 2:
            times = like.shape[0] // chosen.shape[0]
            chosen = chosen if times <= 1 else chosen.repeat_interleave(times, dim=0)
            chosen = chosen if rows is None else chosen[rows]
        return list(chosen.unbind(-1))


def _in_width(layer: nn.Module) -> int:
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features  # type: ignore[return-value]
