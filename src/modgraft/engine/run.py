"""Algorithm 1 of the survey at one site: y = g(r(x), {f(x; θ, φ_j)}).

A site's forward runs in stages: tokens before the host's input, a shift of the residual, the layer
(with its changed weights where that is all there is), then what the composition makes of its
output. Compiled code takes the same way with every resident module in it, each behind a switch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import (
    Computation,
    FunctionComposition,
)
from modgraft.core.context import Call, Context, missing_side
from modgraft.core.errors import CompositionError, ModgraftError
from modgraft.core.expression import Expression, Weight, weighted
from modgraft.core.layers import feature_axis, weight_matrix
from modgraft.core.per_example import Each
from modgraft.core.tensors import first_tensor, replaced, tensor_input, tensor_of, with_tensor
from modgraft.engine import shared_input as together
from modgraft.engine.inputs.tokens import active_inputs, call_with_tokens
from modgraft.engine.kernels.batched import Batched
from modgraft.engine.kernels.functional_call import run as run_changed
from modgraft.engine.kernels.linear import Change, Merged, one_product
from modgraft.engine.plan import Entry, Group, Plan, groups, remembered
from modgraft.engine.residual import Step, shifted
from modgraft.routing.mixture import Routed

STATE = "_modgraft_state"


@dataclass
class State:
    """What is implanted at one site."""

    path: str
    context: Context
    named: dict[str, list[Entry]] = field(default_factory=dict)
    attended: int = 0  # how often its attention function has run with keys and values of modules
    planned: dict[int, Plan] = field(default_factory=dict)
    merged: Merged | None = None  # the weight that is kept
    beside: tuple[nn.Module, ...] = ()  # the sites that share this one's input, itself with them

    def add(self, entry: Entry) -> None:
        """Put in a module."""
        self.named.setdefault(entry.name, []).append(entry)
        self.planned.clear()

    def drop(self, name: str) -> list[Entry]:
        """Take a module out."""
        self.planned.clear()
        self.merged = None
        return self.named.pop(name, [])

    def of(self, kind: type[Computation]) -> list[Entry]:
        """The entries of one kind."""
        return [e for some in self.named.values() for e in some if isinstance(e.module, kind)]

    def plan(self, composition: Expression) -> list[Group]:
        """What ``composition`` comes to here."""
        if torch.compiler.is_compiling():
            return groups(self.named, composition, stacks=False)
        return self.remembered(composition).groups

    def remembered(self, composition: Expression) -> Plan:
        """The plan of ``composition``, made once and kept for the compositions used last."""
        return remembered(self.planned, self.named, composition)


def run(host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """The site ``host`` with what acts there.

    Args:
        host: the grafted sub-module.
        forward: its own, of the class it had.
        args: what it is called with.
        kwargs: and by name.
    """
    state: State = host.__dict__[STATE]
    call = state.context.now()
    composition = call.composition
    if composition is None:
        return forward(host, *args, **kwargs)
    plan = state.plan(composition)
    if not plan:
        return forward(host, *args, **kwargs)
    inputs = active_inputs(state, state.context.token_modules_in(composition))
    if inputs and not call.spliced:
        run_inside = partial(run, host, forward)
        return call_with_tokens(host, state, call, inputs, run_inside, args, kwargs)

    site = SiteCall(host, state, call, forward)
    if any(group.shifts for group in plan):
        args, kwargs = _shifted(site, composition, args, kwargs)
    x = first_tensor(args, kwargs)
    attended = _attended(state)
    whole = None if isinstance(composition, Each) else plan[0]
    out: Any = None
    left: Expression | None = None  # of the composition, once the layer has run
    if whole is not None:
        out, left = site.with_changes(whole, x)
    if out is None:
        inner = site.inside(plan, composition)
        out = run_changed(host, forward, inner, args, kwargs)
        left = None if whole is None else whole.expression
    _check_bypass(host, state, plan, attended)

    relayed = bool(inputs) and call.relay is not None
    if not relayed and not any(group.changes_output for group in plan):
        return out

    y = before = tensor_of(out)
    if relayed:
        y = call.relay(state.path, y)  # type: ignore[misc]
    if whole is None:
        y = site.each(plan, composition, x, y)
    elif left is not None:
        bare = y if left is whole.expression else None
        y = left.apply(Applier(site, whole.entries, x, bare=bare), y)
    return out if y is before else with_tensor(out, y)


@dataclass
class SiteCall:
    """One site in one call."""

    host: nn.Module
    state: State
    call: Call
    forward: Callable[..., Any]

    def with_changes(self, group: Group, x: Tensor | None) -> tuple[Any, Expression | None]:
        """The layer with a group's changed weights, and what of the composition is left.

        None for the first where all of it is to be done on what the layer itself puts out.
        """
        changes = group.changes
        if not changes or any(change.parameter is not None for change in changes):
            return None, None
        x = tensor_input(x, self.state.path)
        if self.state.beside:
            y = together.computed(self, group, x)
            if y is not None:
                return y, group.rest
        kept = group.merged  # however it is given, so that no bit of a result depends on that
        if kept is not None:
            if self.state.merged not in (None, kept):  # one site keeps one weight
                self.state.merged.drop()  # type: ignore[union-attr]
            self.state.merged = kept
        return one_product(self.host, self.forward, x, changes, kept), group.rest

    def inside(self, plan: Sequence[Group], composition: Expression) -> list[Change]:
        """The changes of weights that only the layer itself can run with."""
        inner = [entry for group in plan for entry in group.inner]
        if not inner:
            return []
        weights = composition.weights()
        if isinstance(composition, Each) or any(
            isinstance(w := weights.get(e.name), Tensor) and w.dim() > 0 for e in inner
        ):
            raise CompositionError(
                f"{inner[0].name!r} changes weights inside {self.state.path}, a "
                f"{type(self.host).__name__}, which runs with one set of weights a call; call the "
                f"host once for each composition"
            )
        return [
            Change(e.module, weights.get(e.name, 0.0), e.part, e.parameter)  # type: ignore[arg-type]
            for e in inner
        ]

    def each(
        self, plan: Sequence[Group], composition: Expression, x: Tensor | None, y: Tensor
    ) -> Tensor:
        """``y`` with each group's composition on its own examples."""
        assert isinstance(composition, Each)  # noqa: S101
        times = self._times(len(composition.rows), y)
        fresh = not (self.call.relay or torch.is_grad_enabled() or y.shape[0] == 1)
        if y.shape[0] != times * len(composition.rows):  # what is one for all examples
            y = y.expand(len(composition.rows), *y.shape[1:])
            x = None if x is None or len(x) > 1 else x.expand(len(composition.rows), *x.shape[1:])
        new = y
        for group in plan:
            if group.before_output:
                continue
            if group.rows is None:
                at = Applier(self, group.entries, x, bare=y, writes=fresh and group.alone)
                return group.expression.apply(at, y)
            rows = group.index(y, times)
            own = y[rows]
            at = Applier(self, group.entries, _rows(x, rows), rows, own, y.shape[0])
            result = group.expression.apply(at, own)
            if result is not own:
                new = new.index_copy(0, rows, result)
        return new

    def following(self, weight: Weight, y: Tensor) -> Weight:
        """``weight`` ``[B]`` for the rows of ``y``: an example's beams have its weight."""
        if not isinstance(weight, Tensor) or not weight.dim():
            return weight
        times = self._times(len(weight), y, "mg.Weighted gives {} rows of weights")
        return weight if times == 1 else weight.repeat_interleave(times)

    def _times(self, have: int, y: Tensor, given: str = "modules=[…] gives {} compositions") -> int:
        """How many rows of ``y`` each of ``have`` examples has: its beams follow it."""
        rows = y.shape[0]
        if rows == 1:
            return 1
        if rows == have or (self.call.generating and rows % have == 0):
            return rows // have
        raise CompositionError(
            f"{given.format(have)} where {self.state.path or 'the host'} works on {rows} examples; "
            f"pass one for each example of the batch"
        )


@dataclass
class Applier:
    """Runs the modules of a group at a site: what an expression folds over the output.

    Attributes:
        entries: by name.
        x: the site's input, of the group's examples.
        rows: which examples, None for all.
        bare: what the layer itself put out for them, where that is known.
        whole: how many examples there are, of which they are some.
        writes: whether what the layer put out may be written to: nobody else reads it.
    """

    site: SiteCall
    entries: dict[str, list[Entry]]
    x: Tensor | None
    rows: Tensor | None = None
    bare: Tensor | None = None
    whole: int | None = None
    writes: bool = False

    def __call__(self, name: str, y: Tensor, total: Tensor, weight: Weight) -> Tensor:
        """``total`` + weight · (the module's result on ``y`` − ``y``)."""
        weight = self.site.following(weight, y)
        if not isinstance(weight, Tensor) and weight == 0.0:
            return total
        for entry in self.entries.get(name, ()):
            if entry.residual or entry.parameter is not None:
                continue
            module = entry.module
            if isinstance(module, Routed):
                total = module.run(self, y, total, weight)
            elif entry.changes_weight:
                total = self._changed(entry, total, weight)
            elif isinstance(module, FunctionComposition | Batched):
                total = self._applied(entry, y, total, weight)
        return total

    def where(self, name: str, y: Tensor, total: Tensor, weight: Tensor) -> Tensor:
        """The same for a weight ``[B]`` or ``[B, n]``, run on the rows where it is not 0 alone."""
        x, bare, rows, whole = self.x, self.bare, self.rows, self.whole
        shape = total.shape
        if weight.dim() == 2:  # each token is an example of one token
            y, total = y.reshape(-1, 1, y.shape[-1]), total.reshape(-1, 1, shape[-1])
            x = None if x is None else x.reshape(-1, 1, x.shape[-1])
            bare = None if bare is None else bare.reshape(-1, 1, bare.shape[-1])
            rows, whole, weight = None, None, weight.reshape(-1)
        chosen = weight.detach().nonzero()[:, 0]
        if len(chosen) == len(weight):
            some = Applier(self.site, self.entries, x, rows, bare, whole)
            return some(name, y, total, weight).view(shape)
        if whole is None and len(shape) > 0 and weight.shape[0] == shape[0]:
            whole = shape[0]
        picked = chosen if rows is None else rows[chosen]
        some = Applier(
            self.site, self.entries, _rows(x, chosen), picked, _rows(bare, chosen), whole
        )
        new = some(name, y[chosen], total[chosen], weight[chosen])
        return total.index_copy(0, chosen, new).view(shape)

    def side(self, entry: Entry, rows: int) -> Any:
        """The side input of a module."""
        needs = entry.module.side_source
        if needs is None:
            return None
        side = self.site.call.side_input(needs, self.whole or rows)
        if side is not None and self.rows is not None:
            side = side.picked(self.rows)
        if side is None:
            if torch.compiler.is_compiling() and not _named_now(self.site.state, entry.name):
                return None
            raise missing_side(entry.name, needs)
        return side

    def _changed(self, entry: Entry, total: Tensor, weight: Weight) -> Tensor:
        """``total`` + w·(f(x; θ + Δ) − f(x; θ)), on one part where the module acts on a part."""
        host, part, module = self.site.host, entry.part, entry.module
        x = tensor_input(self.x, self.site.state.path)
        bare = self.bare
        once = part is None and not isinstance(weight, Tensor) and weight == 1.0
        if once and isinstance(module, Batched) and module.has_factors(host):
            return module.added(total, x, self.writes)
        axis = feature_axis(host)
        if bare is not None and part is not None:
            bare = bare.chunk(part[1], dim=axis)[part[0]]
        effect = module.effect(x, host, weight_matrix(host, part), bare)  # type: ignore[union-attr]
        effect = weighted(weight, effect)
        if part is None:
            return total + effect
        return replaced(total, part, axis, lambda own: own + effect)

    def _applied(self, entry: Entry, y: Tensor, total: Tensor, weight: Weight) -> Tensor:
        module, part = entry.module, entry.part
        side = None
        if module.side_source is not None:
            side = self.side(entry, y.shape[0])
            if side is None:
                return total
        own = y if part is None else y.chunk(part[1], dim=entry.axis)[part[0]]
        new = module(own, self.x, side)  # type: ignore[operator]
        if total is y and not isinstance(weight, Tensor) and weight == 1.0:
            return new if part is None else replaced(y, part, entry.axis, lambda _: new)
        effect = weighted(weight, new - own)
        if part is None:
            return total + effect
        return replaced(total, part, entry.axis, lambda of_total: of_total + effect)


def _rows(x: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if x is None else x[rows]


def _named_now(state: State, name: str) -> bool:
    """Whether a compiled call's composition speaks of ``name``; only here is a graph bound to it:
    nothing can be computed without its side input."""
    composition = state.context.compiled.composition
    return composition is not None and name in composition.names()


def _shifted(
    site: SiteCall, composition: Expression, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The site's arguments with what modules add to its residual input."""
    state = site.state

    def f(args: tuple, kwargs: dict) -> Tensor:
        return tensor_of(site.forward(site.host, *args, **kwargs))

    def fold(step: Step, e: Tensor) -> Tensor:
        def one(name: str, base: Tensor, total: Tensor, weight: Weight) -> Tensor:
            for entry in state.named.get(name, ()):
                if entry.residual:
                    new = step(lambda y, r, own=entry: _in_residual(own, y, r), base)
                    weight = site.following(weight, base)
                    if total is base and not isinstance(weight, Tensor) and weight == 1.0:
                        total = new
                    else:
                        total = total + weighted(weight, new - base)
            return total

        for group in groups(state.named, composition, stacks=False):
            new = group.expression.apply(one, e)
            if group.rows is None or new is e:
                e = new
            else:  # every example has been through it; those of the group keep what came of it
                rows = group.index(e, max(1, e.shape[0] // len(composition.rows)))  # type: ignore[attr-defined]
                e = e.index_copy(0, rows, new[rows])
        return e

    def _in_residual(entry: Entry, y: Tensor, r: Tensor) -> Tensor:
        at = Applier(site, state.named, r)
        module = entry.module
        assert isinstance(module, FunctionComposition)  # noqa: S101
        side = None if module.side_source is None else at.side(entry, y.shape[0])
        if entry.part is None:
            return module(y, r, side)
        return replaced(y, entry.part, entry.axis, lambda own: module(own, r, side))

    return shifted(f, args, kwargs, fold, state.path)


def _attended(state: State) -> int:
    """How often the site's attention function has run with keys and values of modules."""
    if torch.compiler.is_compiling():  # written before it is read: no graph is bound to a count
        state.attended = 0
    return state.attended


def _check_bypass(host: nn.Module, state: State, plan: Sequence[Group], attended: int) -> None:
    """Refuse a forward in which keys and values that act have met no attention function."""
    lost = [name for group in plan for name in group.attends]
    if lost and state.attended == attended:
        raise ModgraftError(
            f"{', '.join(lost)} had no effect at {state.path}: this {type(host).__name__} did not "
            f"send its attention through transformers' registry of attention functions; "
            f"host.remove({lost[0]!r}), or set the option of the model's config that by-passes it"
        )
