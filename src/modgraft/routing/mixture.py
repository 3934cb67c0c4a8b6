"""Mixtures: a module that combines named modules by a router and an aggregation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import field, replace
from itertools import chain
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modgraft.aggregation.base import Aggregation
from modgraft.aggregation.representation import Average
from modgraft.computation._checks import distinct_names
from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, KeyValueComposition, TokenComposition
from modgraft.core.call import Call
from modgraft.core.context import reentrant
from modgraft.core.embeddings import token_width
from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.precision import HALF, wide
from modgraft.core.side import EXAMPLE
from modgraft.core.sites import Site
from modgraft.routing.base import Router, Routing
from modgraft.routing.learned import Soft
from modgraft.routing.losses import score_function
from modgraft.routing.stats import UsageCounter

BASELINE_DECAY = 0.9  # for each step, of the running mean of losses


@final
class Mixture(Computation):
    """y = g(α, {h_j}), α = r(x): a router weighs modules, an aggregation combines them.

    A mixture acts at all sites of its modules. At a site the modules that are there act as they
    would by themselves, weighted. With ``level="task"`` (a row of weights for each of the router's
    tasks, named in the composition as ``skills['qa']``) or ``"example"``, one choice holds for the
    whole network; with ``"token"`` each site has a separate router, which chooses at each position.

    A token's query is the input x at a linear layer, elsewhere the output y that the modules act
    on. An example's query is the mean of its input embeddings: an encoder's text; in a decoder the
    prompt (where ``labels`` are −100, so that no answer chooses the module that writes it), or the
    whole input in ``generate``. ``side={"example": mg.Side(v[:, None])}`` gives another query. No
    module acts on an example that has nothing to be read.

    Args:
        over: the names of modules, mixtures among them, or of tasks as ``"h['fr']"``.
        router: a router; None: Soft over examples.
        aggregate: an aggregation, by default Average; one that computes weights itself, such as
            Fuse, has no router.
        width: the width of an example's query; None: that of the host's embeddings.

    Raises:
        ModgraftError: for no module or one named twice, a router with an aggregation that takes
            none, modules of attention weights or of the input, or of a residual under a router; at
            level ``token`` also for an output that is not ``[B, n, d]``, or a module that reads
            other tokens.
    """

    in_residual: ClassVar[bool] = True

    over: Sequence[str]
    # a class attribute None would hide the router, which nn.Module keeps among its children
    router: Router | None = field(default_factory=lambda: None)
    aggregate: Aggregation = field(default_factory=Average)
    width: int | None = None

    def __post_init__(self) -> None:
        example = ", as Mixture(['math', 'code'])"
        self.over = distinct_names(self.over, f"Mixture({self.over!r})", example)
        if self.router is None and self.aggregate.takes_weights:
            self.router = Soft()
        if self.router is not None and not self.aggregate.takes_weights:
            raise ModgraftError(
                f"Mixture(…, router={self.router!r}, aggregate={self.aggregate!r}): "
                f"{type(self.aggregate).__name__} finds its own weights; leave the router out"
            )

    @property
    def level(self) -> str:
        """Return what is routed: ``task``, ``example`` or ``token`` (also without a router)."""
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
        tasks = range(len(self.task_names("")))
        return [RoutedMixture(self, task) for task in tasks]  # type: ignore[misc]

    def check(self, members: Sequence[tuple[str, Computation]]) -> None:
        """Refuse modules that cannot be mixed in this way.

        Args:
            members: the name and the method of each module in ``over``.

        Raises:
            ModgraftError: with the remedy.
        """
        for name, method in members:
            if isinstance(method, TokenComposition):
                raise ModgraftError(
                    f"Mixture({list(self.over)}): {name!r} puts tokens before the input, where "
                    f"no site's router weighs them; stack it, as 'skills >> {name}', or attend to "
                    f"prompts by mg.Attempt(over=[{name!r}, …])"
                )
            if not self.aggregate.takes_weights and isinstance(method, KeyValueComposition):
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
        if self.level == "token" and (site.channels_first or site.time_first):
            raise SiteError(
                f"Mixture(level='token') at {site.label}: a token's choice needs an output "
                f"[B, n, d], and a {type(site.module).__name__} puts out another; "
                f"level='example' chooses for the whole of it"
            )
        self._path = site.path
        self._reads_input = isinstance(site.module, nn.Linear | Conv1D)
        self.counter = UsageCounter(len(self.over))
        self.baseline: float | None = None  # the running mean of losses, for sampled choices
        width = 0 if self.aggregate.takes_weights else site.width
        self.combine = self.aggregate.fresh(len(self.over), width)
        if self.router is None:
            return
        width = 1  # unused: a task has a row of weights, and no query
        if self.level == "token":
            width = site.in_width if self._reads_input else site.width
        elif self.level == "example":
            width = self.width or self._embedding_width(site)
        self.route = self.router.fresh(tuple(self.over), width)

    def _embedding_width(self, site: Site) -> int:
        """Return the width of an example's query, that of the host's embeddings.

        Raises:
            ModgraftError: for a host without any.
        """
        assert site.root is not None  # noqa: S101
        try:
            return token_width(site.root)
        except ModgraftError as error:
            raise ModgraftError(
                f"Mixture({list(self.over)}) routes examples by the embeddings of their text, and "
                f"{type(site.root).__name__} reads none; say Mixture(…, width=d) and pass "
                f"side={{'{EXAMPLE}': mg.Side(vectors[:, None])}}, [batch, 1, d], or route tokens "
                f"or tasks, router=Soft(level='token')"
            ) from error

    def share_with(self, first: Computation) -> None:
        """Read the first site's router, if one choice holds for the whole network."""
        assert isinstance(first, Mixture)  # noqa: S101
        if self.router is not None and self.level != "token":
            self._first = (first,)
            redirect(self.route, self.route.state_dict(), ModuleTensors(first.route))

    def at(self, site: Site) -> Self:
        routed = site.residual and self.router is not None
        if routed or site.parameter is not None:
            raise SiteError(
                f"Mixture at {site.label}: its modules there change weights inside the layer or "
                f"its residual, which cannot be weighed example by example; mix modules at a "
                f"layer's output"
            )
        return super().at(site)

    def key(self, task: int) -> Hashable:
        """Return what the call remembers the choice for the whole network by."""
        (first,) = self.__dict__.get("_first", (self,))
        return id(first), task

    def choose(self, call: Call, x: Tensor | None, y: Tensor, task: int) -> Routing:
        """Weigh the modules at a site: ``[N]`` for a task, ``[B, N]`` or ``[B, n, N]``.

        Args:
            call: the host's call, which remembers a choice for the whole network.
            x: the layer's input, None if it is not known.
            y: the layer's output ``[B, …, d]``.
            task: the number of the task, at level ``task``.

        Raises:
            SiteError: if tokens are routed and ``y`` has none.
        """
        (first,) = self.__dict__.get("_first", (self,))
        key = self.key(task)
        if self.level != "token" and key in call.choices:  # one choice a call, at all sites
            return call.choices[key]
        if self.level == "task":
            routing = first.route(torch.tensor(task, device=y.device))
        elif self.level == "example":
            side = call.side[EXAMPLE].shown()
            tensor = _as_router(first.route, side.tensor, y)
            count = side.seen().sum(1, keepdim=True)  # [B, 1]
            routing = first.route(tensor.sum(1) / count.clamp_min(1))  # [B, d]
            if side.mask is not None:
                weights = routing.weights.masked_fill(count == 0, 0.0)  # [B, N]
                routing = replace(routing, weights=weights)
        else:
            query = x if self._reads_input and x is not None else y
            if y.dim() < 3 or query.shape[:-1] != y.shape[:-1]:
                raise SiteError(
                    f"Mixture at {self._path}: tokens are routed, and this site puts out "
                    f"{list(y.shape)} for {list(query.shape)}, which has none; route examples, "
                    f"router=Soft(level='example'), or implant its modules elsewhere"
                )
            routing = self.route(_as_router(self.route, query, y))
        if self.level != "token":
            call.choices[key] = routing
        if self.training and reentrant.get() and routing.adds_to_loss:
            raise ModgraftError(
                f"Mixture({list(self.over)}) at {self._path}: its router adds to the loss, which "
                f"has no gradient out of a block that is checkpointed in the reentrant form; "
                f"checkpoint with use_reentrant=False"
            )
        if self.training and torch.is_grad_enabled():
            call.routings.append((first, routing))
        first.counter.add(routing)
        return routing

    def routing_loss(self, routing: Routing, losses: Tensor) -> Tensor:
        """Return what the router adds to the loss: its balance, and a sampled choice's score.

        The score function's baseline is a running mean of the losses of earlier batches, which
        does not depend on this batch's choices.

        Args:
            routing: the router's choice.
            losses: the loss of each example ``[B]``, or of the batch ``[1]``.
        """
        total = routing.weights.new_zeros(())
        if routing.balance is not None:
            total = total + routing.balance
        if routing.score is not None:
            score = routing.score
            score = score.flatten(1).sum(1) if score.dim() > 1 else score.reshape(-1)
            known = losses if len(losses) == len(score) else losses.mean().expand(len(score))
            baseline, mean = self.baseline, float(losses.mean())
            total = total + score_function(score, known, 0.0 if baseline is None else baseline)
            if baseline is None:
                self.baseline = mean
            else:
                self.baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * mean
        return total


def _as_router(route: Router, query: Tensor, y: Tensor) -> Tensor:
    """Return ``query`` in the type that ``route`` chooses in: float32 beside half precision."""
    if y.dtype not in HALF:
        return query.to(y.dtype)
    like = next(chain(route.parameters(), route.buffers()), None)
    return wide(query) if like is None else query.to(like.dtype)


class RoutedMixture:
    """A mixture built for one site, routed for one of its tasks.

    Attributes:
        mixture: the mixture, built for the site.
        task: the number of the task; 0 if there are no tasks.
        members: the names of the modules that the mixture combines.
        side_source: the side input that it is routed by, if any.
    """

    def __init__(self, mixture: Mixture, task: int) -> None:
        self.mixture, self.task = mixture, task
        self.members = tuple(mixture.over)
        self.side_source = mixture.side_source

    @property
    def key(self) -> Hashable:
        """What a call remembers its choice by, where that holds for the whole network."""
        return self.mixture.key(self.task)

    def train(self, mode: bool) -> None:
        """Put the mixture into a mode, as a layer does with the modules that act in it."""
        self.mixture.train(mode)

    def weights(
        self, call: Call, x: Tensor | None, y: Tensor, rows: Tensor | None, batch: int | None = None
    ) -> Tensor:
        """Return the modules' weights for some examples: ``[N]``, ``[B, N]`` or ``[B, n, N]``.

        Args:
            call: the host's call.
            x: the layer's input, None if it is not known.
            y: the layer's output ``[B, …]``.
            rows: the positions of the examples in the batch; None: all.
            batch: how many examples the whole batch has, if not as many as ``y``; beams have the
                weights of their example.
        """
        weights = self.mixture.choose(call, x, y, self.task).weights
        if weights.dim() != 2:
            return weights
        batch = batch or y.shape[0]
        if weights.shape[0] != batch and batch % weights.shape[0] == 0:
            weights = weights.repeat_interleave(batch // weights.shape[0], dim=0)
        return weights if rows is None else weights[rows]
