"""Applies a composition to an output: y = g(r(x), {f(x; θ, φ_j)}), the survey's Algorithm 1.

An expression folds an :class:`Applier` over the output: it adds weight · (the module's result − y)
for one module after another, each measured against what came before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modgraft.computation.base import FunctionComposition
from modgraft.core.errors import SideError, SiteError
from modgraft.core.expression import Weight, weighted
from modgraft.core.layers import WEIGHTED, feature_axis, weight_matrix, with_own_gradient
from modgraft.core.parts import share
from modgraft.core.precision import as_the_layer
from modgraft.core.side import EXAMPLE
from modgraft.core.tensors import tensor_input
from modgraft.engine.kernels.batched import Batched
from modgraft.engine.kernels.linear import Change
from modgraft.engine.plan import Entry
from modgraft.engine.state import SiteCall, State
from modgraft.routing.base import Member
from modgraft.routing.mixture import RoutedMixture


@dataclass
class Applier:
    """Runs the modules of a group at a site.

    Attributes:
        site: the call of the layer.
        entries: the group's modules, by name.
        x: the layer's input, of the group's examples.
        rows: which examples these are; None: all.
        bare: what the layer itself put out for them, where that is known.
        batch: how many examples there are, if these are some of them.
        in_place: whether the layer's output may be written to, since nothing else reads it.
    """

    site: SiteCall
    entries: dict[str, list[Entry]]
    x: Tensor | None
    rows: Tensor | None = None
    bare: Tensor | None = None
    batch: int | None = None
    in_place: bool = False

    def __call__(
        self, name: str, y: Tensor, total: Tensor, weight: Weight, mixed: bool = False
    ) -> Tensor:
        """Return ``total`` + weight · (the module's result on ``y`` − ``y``).

        Args:
            name: the module's.
            y: what it acts on.
            total: what its effect is added to.
            weight: of the effect.
            mixed: whether a mixture applies it, and the layer has run without it.
        """
        weight = self.site.per_row(weight, y)
        if not isinstance(weight, Tensor) and weight == 0.0:
            return total
        for entry in self.entries.get(name, ()):
            if entry.residual:
                continue
            if entry.inside and not mixed and not (isinstance(weight, Tensor) and weight.dim()):
                continue  # the layer has run with its change
            module = entry.module
            if isinstance(module, RoutedMixture):
                total = _mix(self, name, module, y, total, weight)
            elif entry.changes_weight:
                total = self._changed_weight(entry, total, weight)
            elif isinstance(module, FunctionComposition | Batched):
                total = self._function(entry, y, total, weight)
        return total

    def where_used(self, name: str, y: Tensor, total: Tensor, weight: Tensor) -> Tensor:
        """Do the same for a weight ``[B]`` or ``[B, n]``, on the rows alone where it is not 0."""
        x, bare, rows, batch = self.x, self.bare, self.rows, self.batch
        if weight.dim() == 1 and total.shape[0] == 1 < len(weight):  # one row for all examples
            one = (len(weight), *[-1] * (total.dim() - 1))
            y, total = y.expand(one), total.expand(one)
            x = x if x is None or len(x) > 1 else x.expand(len(weight), *x.shape[1:])
            bare = None if bare is None else bare.expand(one)
        shape = total.shape
        if weight.dim() == 2:  # each token is an example of one token
            y, total = y.reshape(-1, 1, y.shape[-1]), total.reshape(-1, 1, shape[-1])
            x = None if x is None else x.reshape(-1, 1, *x.shape[2:])  # of ids, [B, n]
            bare = None if bare is None else bare.reshape(-1, 1, bare.shape[-1])
            rows, batch, weight = None, None, weight.reshape(-1)
        chosen = weight.detach().nonzero()[:, 0]
        if len(chosen) == len(weight):
            some = Applier(self.site, self.entries, x, rows, bare, batch)
            return some(name, y, total, weight, mixed=True).view(shape)
        if batch is None and len(shape) > 0 and weight.shape[0] == shape[0]:
            batch = shape[0]
        picked = chosen if rows is None else rows[chosen]
        some = Applier(self.site, self.entries, pick(x, chosen), picked, pick(bare, chosen), batch)
        new = some(name, y[chosen], total[chosen], weight[chosen], mixed=True)
        return total.index_copy(0, chosen, new).view(shape)

    def side(self, entry: Entry, rows: int) -> Any:
        """Return the side input of a module, None where the module does not act.

        Compiled code holds every module of the host behind a switch; one that is switched off has
        no effect, and needs no side input.

        Raises:
            SideError: where the call has none, or of another batch.
        """
        source, call = entry.module.side_source, self.site.call
        if source is None:
            return None
        absent = source not in call.side
        if (
            absent
            and torch.compiler.is_dynamo_compiling()
            and not _in_force(self.site.state, entry.name)
        ):
            return None
        several = self.site.layout.get(self.site.state.path) == 0
        return call.resolve(source, entry.name, self.batch or rows, self.rows, several)

    def _changed_weight(self, entry: Entry, total: Tensor, weight: Weight) -> Tensor:
        """Return ``total`` + w·(f(x; θ + Δ) − f(x; θ)), on the part that the module acts on."""
        layer, part, module = self.site.layer, entry.part, entry.module
        if entry.inside:
            effect = self._effect_inside(entry)
            return total + weighted(weight, effect if self.rows is None else effect[self.rows])
        x = tensor_input(self.x, self.site.state.path)
        bare = self.bare
        once = part is None and not isinstance(weight, Tensor) and weight == 1.0
        if once and isinstance(module, Batched) and module.has_factors(layer):
            return module.added(total, x, self.in_place)
        axis = feature_axis(layer)
        if bare is not None:
            bare = share(bare, part, axis)
        with as_the_layer(total):
            effect = module.effect(x, layer, weight_matrix(layer, part), bare)  # type: ignore[union-attr]
        effect = weighted(weight, with_own_gradient(layer, x, effect.to(total.dtype)))
        if part is None:
            return total + effect
        return part.replaced(total, axis, lambda own: own + effect)

    def _effect_inside(self, entry: Entry) -> Tensor:
        """Return f(x; θ + Δ) − f(x; θ) for the whole batch, from two runs of the layer."""
        change = Change(entry.module, 1.0, entry.part, entry.parameter)  # type: ignore[arg-type]
        return self.site.output([change]) - self.site.output([])

    def _function(self, entry: Entry, y: Tensor, total: Tensor, weight: Weight) -> Tensor:
        """Return ``total`` + w·(f(y, x) − y), on the part that the module acts on."""
        module, part = entry.module, entry.part
        side = None
        if module.side_source is not None:
            side = self.side(entry, y.shape[0])
            if side is None:
                return total
        if y.dim() == 4 and y.shape[1] == y.shape[3]:
            self._check_last(entry, y)
        own = y if part is None else part.take(y, entry.axis)
        with as_the_layer(own):
            new = module(own, self.x, side).to(own.dtype)  # type: ignore[operator]
        if total is y and not isinstance(weight, Tensor) and weight == 1.0:
            return new if part is None else part.replaced(y, entry.axis, lambda _: new)
        effect = weighted(weight, new - own)
        if part is None:
            return total + effect
        return part.replaced(total, entry.axis, lambda of_total: of_total + effect)

    def _check_last(self, entry: Entry, y: Tensor) -> None:
        """Refuse to take the last axis of a square ``[B, d, n, d]`` for that of the features.

        Raises:
            SiteError: where only a layer's width, and not its axis, is known.
        """
        layer, path = self.site.layer, self.site.state.path
        module = entry.module.like if isinstance(entry.module, Batched) else entry.module
        if isinstance(layer, WEIGHTED) or getattr(module, "over", None) == "map":
            return
        raise SiteError(
            f"{entry.name!r} acts on features, and {path}, a {type(layer).__name__}, puts out "
            f"{list(y.shape)}: as many on axis 1 as on the last, so which of them holds features "
            f"cannot be told; implant at a layer in it, or give images of another size"
        )


def pick(x: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return the given rows of x, if there is an x."""
    return None if x is None else x[rows]


def _in_force(state: State, name: str) -> bool:
    """Return whether a compiled call's composition names the module.

    This binds a graph to the answer: nothing can be computed without the module's side input.
    """
    composition = state.context.compiled.composition
    return composition is not None and name in composition.names()


# -- mixtures -------------------------------------------------------------------------------------


def _mix(
    at: Applier, name: str, routed: RoutedMixture, y: Tensor, total: Tensor, weight: Weight
) -> Tensor:
    """Return ``total`` + weight · (g(α, {h_j(y)}) − y), a mixture's effect.

    Raises:
        SideError: if examples are routed and this call has none to read.
    """
    mixture = routed.mixture
    if mixture.side_source == EXAMPLE and EXAMPLE not in at.site.call.side:
        if torch.compiler.is_dynamo_compiling() and not _in_force(at.site.state, name):
            return total  # compiled code holds every module of the host
        raise SideError(
            f"{name!r} goes by the text of each example, which host(...) reads, and this call has "
            f"none: call the host and not its model, or pass host(..., side={{'{EXAMPLE}': "
            f"mg.Side(vectors[:, None])}})"
        )
    members = [at.entries.get(name, ()) for name in routed.members]
    names, weights, sparse = list(routed.members), [], False
    if mixture.router is not None:
        sparse = mixture.route.sparse and not torch.compiler.is_dynamo_compiling()
        sparse = sparse and not any(entry.inside for some in members for entry in some)
        chosen = _choose(at, routed, members, y)
        if sparse and chosen.dim() > 1 and mixture.aggregate.is_weighted_sum and _few(chosen):
            batch = at.site.state.expert_batch(routed, members)
            if batch is not None and batch.takes(at.site.layer, chosen, at.x, y):
                return batch.add(at.site.layer, chosen, at.x, at.bare, y, total, weight)
        used = list(range(len(members)))
        if sparse:
            used = chosen.detach().reshape(-1, len(used)).ne(0).any(0).nonzero()[:, 0].tolist()
        names, weights = [names[j] for j in used], [chosen[..., j] for j in used]
    with as_the_layer(y):
        ran = at.site.call.alike and bool(weights) and mixture.aggregate.is_weighted_sum
        new = mixture.combine(_apply_module(at, names, sparse, ran), weights, y).to(y.dtype)
    if new is y:  # none of its modules acts on the output here
        return total
    if total is y and not isinstance(weight, Tensor) and weight == 1.0:
        return new
    return total + weighted(weight, new - y)


def _apply_module(at: Applier, names: Sequence[str], sparse: bool, ran: bool) -> Any:
    """Return the function by which an aggregation applies the j-th module, under its name.

    Args:
        at: the site.
        names: the modules'.
        sparse: whether one of weight 0 is left out.
        ran: whether the layer has run with the changes that only it can run with.
    """

    def apply(j: int, y: Tensor, total: Tensor, w: Weight) -> Tensor:
        name = names[j]
        if name not in at.entries:  # it has no site here
            return total
        if sparse and isinstance(w, Tensor) and w.dim():
            return at.where_used(name, y, total, w)
        return at(name, y, total, w, mixed=not ran)

    return apply


def _choose(
    at: Applier, routed: RoutedMixture, members: Sequence[Sequence[Entry]], y: Tensor
) -> Tensor:
    """Return the router's weights ``[N]``, ``[B, N]`` or ``[B, n, N]`` for the rows of ``y``."""
    route = routed.mixture.route
    if route.inspects:
        found = [[Member(e.module, e.part) for e in some] for some in members]  # type: ignore[arg-type]
        route.inspect(found, at.site.layer)
    return routed.weights(at.site.call, at.x, y, at.rows, at.batch)


def _few(chosen: Tensor) -> bool:
    """Return whether at most half of the weights are not 0: more are as well computed one by
    one."""
    return 2 * int(chosen.detach().count_nonzero()) <= chosen.numel()
