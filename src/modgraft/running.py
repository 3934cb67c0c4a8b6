"""Algorithm 1 of the survey at one site: y = g(r(x), {f(x; θ, φ_j)}).

A site's forward runs in stages, each for the kind of module it belongs to: tokens before the
host's input, a shift of the residual, the layer with its changed weights, then effects on its
output. Compiled code takes the same way with every resident module in it, each behind a switch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.changed import Change, one_product
from modgraft.computation.base import (
    Computation,
    FunctionComposition,
    KeyValueComposition,
    ParameterComposition,
)
from modgraft.computation.layers import feature_axis, weight_matrix
from modgraft.context import Call, Context
from modgraft.errors import ModgraftError
from modgraft.expression import Expression
from modgraft.inlet import active_inputs, call_with_tokens, missing_side
from modgraft.replaced import run as run_changed
from modgraft.residual import Step, shifted
from modgraft.tensors import first_tensor, tensor_input, tensor_of, with_tensor

STATE = "_modgraft_state"


@dataclass
class Entry:
    """One module at one site."""

    name: str
    module: Computation
    part: tuple[int, int] | None
    residual: bool = False
    parameter: str | None = None
    axis: int = -1  # of the output's features


@dataclass
class State:
    """What is implanted at one site."""

    path: str
    context: Context
    entries: list[Entry] = field(default_factory=list)
    attended: int = 0  # how often its attention function has run with keys and values of modules

    def of(self, kind: type[Computation]) -> list[Entry]:
        """The entries of one kind."""
        return [e for e in self.entries if isinstance(e.module, kind)]

    def acting(self, call: Call, weights: Mapping[str, float | Tensor]) -> list[Entry]:
        """The entries that a call's composition gives a weight other than 0, or a switch."""
        compiling = torch.compiler.is_compiling()
        return [
            e
            for e in self.entries
            if _weighs(weights.get(e.name, 0.0)) and (not compiling or self._supplied(e, call))
        ]

    def _supplied(self, entry: Entry, call: Call) -> bool:
        """Whether a traced call has the side input that ``entry`` needs."""
        needs = entry.module.needs
        if needs is None or needs in call.side:
            return True
        # only here is the graph bound to a composition: nothing can be computed without it
        composition = self.context.mirrored
        if composition is not None and entry.name in composition.names():
            raise missing_side(entry.name, needs)
        return False


def _weighs(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0.0


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
    weights = composition.weights()
    acting = state.acting(call, weights)
    if not acting:
        return forward(host, *args, **kwargs)
    inputs = active_inputs(state, state.context.first_in(composition))
    if inputs and not call.spliced:
        run_inside = partial(run, host, forward)
        return call_with_tokens(host, state, call, inputs, run_inside, args, kwargs)

    if residual := [e for e in acting if e.residual]:
        args, kwargs = _shifted(host, state, call, composition, residual, forward, args, kwargs)
    changes = [
        Change(e.module, weights[e.name], e.part, e.parameter)
        for e in acting
        if isinstance(e.module, ParameterComposition)
    ]
    inner = [change for change in changes if change.parameter is not None]
    effects = [change for change in changes if change.parameter is None]
    x = first_tensor(args, kwargs)
    if effects:
        x = tensor_input(x, state.path)
    attended = _attended(state)
    out = None
    numbers = not any(isinstance(change.weight, Tensor) for change in effects)
    if effects and x is not None and numbers and not inner:
        out = one_product(host, forward, x, effects)
    if out is not None:
        effects = []
    else:
        out = run_changed(host, forward, inner, args, kwargs)
    _check_bypass(host, state, acting, attended)
    if len(inner) == len(acting):
        return out

    y = before = tensor_of(out)
    if inputs and call.relay is not None:
        y = call.relay(state.path, y)
    for change in effects:
        y = _add(y, change, tensor_input(x, state.path), host)
    functions = [e for e in acting if isinstance(e.module, FunctionComposition) and not e.residual]
    if functions:
        y = composition.apply(_by_name(functions, lambda e, y: _apply(e, y, x, call)), y)
    return out if y is before else with_tensor(out, y)


def _by_name(
    entries: list[Entry], one: Callable[[Entry, Tensor], Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """What ``Expression.apply`` asks for: a name that is none of ``entries`` changes nothing."""
    named = {e.name: e for e in entries}

    def run_one(name: str, value: Tensor) -> Tensor:
        entry = named.get(name)
        return value if entry is None else one(entry, value)

    return run_one


def _shifted(
    host: nn.Module,
    state: State,
    call: Call,
    composition: Expression,
    entries: list[Entry],
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict,
) -> tuple[tuple, dict]:
    """The site's arguments with what ``entries`` add to its residual input."""

    def f(args: tuple, kwargs: dict) -> Tensor:
        return tensor_of(forward(host, *args, **kwargs))

    def fold(step: Step, e: Tensor) -> Tensor:
        def one(entry: Entry, e: Tensor) -> Tensor:
            return step(lambda y, r: _apply(entry, y, r, call), e)

        return composition.apply(_by_name(entries, one), e)

    return shifted(f, args, kwargs, fold, state.path)


def _add(y: Tensor, change: Change, x: Tensor, host: nn.Module) -> Tensor:
    """y + w·(f(x; θ + Δ) − f(x; θ)), on one part of y where the module acts on a part."""
    part, weight = change.part, change.weight
    effect = change.module.effect(x, host, weight_matrix(host, part))
    if isinstance(weight, Tensor):
        effect = weight.to(y.dtype) * effect
    elif weight != 1.0:
        effect = weight * effect
    if part is None:
        return y + effect
    return _replaced(y, part, feature_axis(host), lambda own: own + effect)


def _apply(entry: Entry, y: Tensor, x: Tensor | None, call: Call) -> Tensor:
    module = entry.module
    assert isinstance(module, FunctionComposition)  # noqa: S101
    side = None
    if module.needs is not None:
        side = call.side_input(module.needs, y.shape[0])
        if side is None:
            raise missing_side(entry.name, module.needs)
    if entry.part is None:
        return module(y, x, side)
    return _replaced(y, entry.part, entry.axis, lambda own: module(own, x, side))


def _replaced(
    y: Tensor, part: tuple[int, int], axis: int, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """``y`` with one part of its features changed."""
    pieces = list(y.chunk(part[1], dim=axis))
    pieces[part[0]] = change(pieces[part[0]])
    return torch.cat(pieces, dim=axis)


def _attended(state: State) -> int:
    """How often the site's attention function has run with keys and values of modules."""
    if torch.compiler.is_compiling():  # written before it is read: no graph is bound to a count
        state.attended = 0
    return state.attended


def _check_bypass(host: nn.Module, state: State, active: list[Entry], attended: int) -> None:
    """Refuse a forward in which keys and values that act have met no attention function."""
    lost = [e.name for e in active if isinstance(e.module, KeyValueComposition)]
    if lost and state.attended == attended:
        raise ModgraftError(
            f"{', '.join(lost)} had no effect at {state.path}: this {type(host).__name__} did not "
            f"send its attention through transformers' registry of attention functions; "
            f"host.remove({lost[0]!r}), or set the option of the model's config that by-passes it"
        )
