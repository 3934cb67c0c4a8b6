"""Mixtures: a router and an aggregation over named modules, itself a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modgraft.aggregation.base import Aggregation
from modgraft.aggregation.representation import Average
from modgraft.computation._borrow import Owner, borrow
from modgraft.computation.base import Computation, KeyValueComposition, TokenComposition
from modgraft.core.context import EXAMPLE, Call
from modgraft.core.embeddings import token_width
from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.expression import Weight, weighted
from modgraft.core.sites import Site
from modgraft.engine.dispatch import ExpertBatch
from modgraft.routing.base import Member, Router, Routing
from modgraft.routing.learned import Soft
from modgraft.routing.stats import Tally

if TYPE_CHECKING:
    from modgraft.engine.plan import Entry
    from modgraft.engine.run import Applier

_training = attrgetter("training")


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
        self.over = () if isinstance(self.over, str) else tuple(self.over)
        if not self.over or len(set(self.over)) != len(self.over):
            raise ModgraftError(
                f"Mixture({self.over!r}): one or more different names, as Mixture(['math', 'code'])"
            )
        if self.router is None and self.aggregate.routed:
            self.router = Soft()
        if self.router is not None and not self.aggregate.routed:
            raise ModgraftError(
                f"Mixture(…, router={self.router!r}, aggregate={self.aggregate!r}): "
                f"{type(self.aggregate).__name__} finds its own weights; leave the router out"
            )

    @property
    def level(self) -> str:
        """``task``, ``example`` or ``token``; an attention's is the token."""
        return "token" if self.router is None else self.router.level

    @property
    def side_source(self) -> str | None:  # noqa: D102
        return EXAMPLE if self.level == "example" else None

    @property
    def by_token(self) -> bool:  # noqa: D102
        return self.level != "example"

    @property
    def members(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self.over)

    def task_names(self, name: str) -> list[str]:  # noqa: D102
        tasks = () if self.router is None else self.router.tasks
        return [f"{name}[{task!r}]" for task in tasks] or [name]

    def per_task(self) -> list[Computation]:  # noqa: D102
        tasks = () if self.router is None else self.router.tasks
        return [Routed(self, task) for task in range(max(1, len(tasks)))]  # type: ignore[misc]

    def check(self, members: Sequence[tuple[str, Computation]]) -> None:
        """Refuse modules that cannot be in it.

        Args:
            members: the method of each, under its name.
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

    def build(self, site: Site) -> None:  # noqa: D102
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
        width = 1  # of nothing: tasks have rows
        if self.level == "token":
            width = _in_width(site.module) if reads else site.width
        elif self.level == "example":
            assert site.root is not None  # noqa: S101
            width = self.width or token_width(site.root)
        self.route = self.router.fresh(tuple(self.over), width)

    def share_with(self, first: Computation) -> None:
        """Choose once for the network, where a task or an example is routed."""
        assert isinstance(first, Mixture)  # noqa: S101
        if self.router is not None and self.level != "token":
            self._first = (first,)
            borrow(self.route, self.route.state_dict(), Owner(first.route))

    def at(self, site: Site) -> Self:  # noqa: D102
        if site.residual or site.parameter is not None:
            raise SiteError(
                f"Mixture at {site.label}: its modules there change weights inside the layer or "
                f"its residual, which cannot be weighed example by example; mix modules at a "
                f"layer's output"
            )
        return super().at(site)

    def choose(self, call: Call, x: Tensor | None, y: Tensor, task: int) -> Routing:
        """The weights of the modules at a site: ``[N]`` of a task, ``[B, N]`` or ``[B, n, N]``.

        Raises:
            SiteError: for tokens where the output ``y`` has none.
        """
        (first,) = self.__dict__.get("_first", (self,))
        key = (id(first), task)
        if self.level != "token" and key in call.choices:  # one choice a call, at all sites
            return call.choices[key]
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
            call.choices[key] = made
        if self.training and torch.is_grad_enabled():
            call.routings.append((first, made))
        first.tally.count(made)
        return made


class Routed:
    """A mixture at one site, for one of its tasks: what acts under its name."""

    def __init__(self, mixture: Mixture, task: int) -> None:
        self.mixture, self.task = mixture, task
        self.members = tuple(mixture.over)
        self.side_source = mixture.side_source
        self._banked: tuple[Any, ExpertBatch | None] = (None, None)

    def weights(self, call: Call, like: Tensor, rows: Tensor | None) -> list[Tensor]:
        """Of each module, a number or ``[B]``, for the examples of ``like`` or some of them."""
        chosen = self.mixture.choose(call, None, like, self.task).weights
        if chosen.dim() == 2:
            times = like.shape[0] // chosen.shape[0]
            chosen = chosen if times <= 1 else chosen.repeat_interleave(times, dim=0)
            chosen = chosen if rows is None else chosen[rows]
        return list(chosen.unbind(-1))

    def run(self, at: Applier, y: Tensor, total: Tensor, weight: Weight) -> Tensor:
        """``total`` + weight · (g(α, {h_j(y)}) − y)."""
        mixture = self.mixture
        if mixture.side_source == EXAMPLE and EXAMPLE not in at.site.call.side:
            return total  # compiled code holds all that is resident: this is not in force
        used: list[int] = []
        weights: list[Tensor] = []
        sparse = mixture.router is not None and mixture.route.sparse
        sparse = sparse and not torch.compiler.is_compiling()
        if mixture.router is not None:
            members = [at.entries.get(name, ()) for name in self.members]
            if mixture.route.looks:
                found = [[Member(e.module, e.part) for e in some] for some in members]  # type: ignore[arg-type]
                mixture.route.prepare(found, at.site.host)
            routing = mixture.choose(at.site.call, at.x, y, self.task)
            chosen = _followed(routing.weights, at, y)
            if sparse and chosen.dim() > 1 and mixture.aggregate.adds and _few(chosen):
                bank = self.bank(members)
                if bank is not None and bank.takes(at, chosen, y):
                    return bank.add(at, chosen, y, total, weight)
            used = list(range(len(self.members)))
            if sparse:
                used = chosen.detach().reshape(-1, len(used)).ne(0).any(0).nonzero()[:, 0].tolist()
            weights = [chosen[..., j] for j in used]

        def member(j: int, y: Tensor, total: Tensor, w: Weight) -> Tensor:
            name = self.members[used[j] if used else j]
            if name not in at.entries:  # it has no site here
                return total
            if sparse and isinstance(w, Tensor) and w.dim():
                return at.where(name, y, total, w)
            return at(name, y, total, w)

        new = mixture.combine(member, weights, y)
        if new is y:  # none of its modules acts on the output here
            return total
        if total is y and not isinstance(weight, Tensor) and weight == 1.0:
            return new
        return total + weighted(weight, new - y)

    def bank(self, members: Sequence[Sequence[Entry]]) -> ExpertBatch | None:
        """The members over stacked tensors, made again once others are here, or train."""
        modules = [entry.module for some in members for entry in some]
        now = modules, list(map(_training, modules))
        if self._banked[0] != now:
            self._banked = now, ExpertBatch.of(members)
        return self._banked[1]


def _few(chosen: Tensor) -> bool:
    """Whether at most half of the weights are not 0: more are as well computed one by one."""
    return 2 * int(chosen.detach().count_nonzero()) <= chosen.numel()


def _followed(weights: Tensor, at: Applier, y: Tensor) -> Tensor:
    """Weights ``[N]`` or ``[B, N]`` for the rows of ``y``: beams follow their example."""
    if weights.dim() != 2:
        return weights
    whole = at.whole or y.shape[0]
    if weights.shape[0] != whole and whole % weights.shape[0] == 0:
        weights = weights.repeat_interleave(whole // weights.shape[0], dim=0)
    return weights if at.rows is None else weights[at.rows]


def _in_width(layer: nn.Module) -> int:
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features  # type: ignore[return-value]
