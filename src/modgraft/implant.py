"""The one place where a host is changed, and how it is changed back.

A site's class is swapped for a subclass made on the fly. Keys, tensors and ``isinstance`` stay what
they were; the subclass carries the original's name, so that whatever asks a class for its name gets
the same answer. What acts there is kept outside the module's registered children.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.changed import Change, one_product
from modgraft.computation.base import (
    Computation,
    FunctionComposition,
    KeyValueComposition,
    ParameterComposition,
    TokenComposition,
)
from modgraft.computation.layers import feature_axis, weight_matrix
from modgraft.context import Call, Context
from modgraft.errors import ModgraftError
from modgraft.inlet import (
    active_inputs,
    call_with_tokens,
    generate_with_tokens,
    inner_sites,
    missing_side,
)
from modgraft.replaced import run as run_changed
from modgraft.residual import Step, shifted
from modgraft.sites import Site
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


def graft(site: Site, name: str, module: Computation, context: Context) -> None:
    """Let ``module`` act at ``site`` under ``name``."""
    host = site.module
    state: State | None = host.__dict__.get(STATE)
    if state is None:
        state = State(site.path, context)
        host.__dict__[STATE] = state
        host.__class__ = _grafted(type(host))
    axis = feature_axis(host)
    state.entries.append(Entry(name, module, site.part, site.residual, site.parameter, axis))
    if isinstance(module, TokenComposition) and not site.path:
        context.first.add(name)
        for inner in inner_sites(site):
            graft(inner, name, module, context)


def prune(host: nn.Module, name: str) -> None:
    """Undo :func:`graft` where it was done; the last one out restores the class."""
    state: State | None = host.__dict__.get(STATE)
    if state is None:
        return
    gone = [entry for entry in state.entries if entry.name == name]
    state.entries = [entry for entry in state.entries if entry.name != name]
    if not state.path and any(isinstance(e.module, TokenComposition) for e in gone):
        state.context.first.discard(name)
        for inner in inner_sites(Site("", host, None, host)):
            prune(inner.module, name)
    if not state.entries:
        host.__class__ = type(host).__mro__[1]
        del host.__dict__[STATE]


def pruned(model: nn.Module) -> nn.Module:
    """``model`` itself, with everything that is implanted in it taken out."""
    for module in model.modules():
        while (state := module.__dict__.get(STATE)) is not None:
            prune(module, state.entries[0].name)
    return model


def foreign(model: nn.Module, context: Context) -> list[str]:
    """The sites of ``model`` in which another host has implanted something."""
    states = [m.__dict__[STATE] for m in model.modules() if STATE in m.__dict__]
    return [state.path for state in states if state.context is not context]


@cache
def _grafted(original: type[nn.Module]) -> type[nn.Module]:
    forward = original.forward

    @wraps(forward)  # the signature that transformers inspects is the original's
    def grafted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, forward, args, kwargs)

    body: dict[str, Any] = {
        "forward": grafted_forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    generate = getattr(original, "generate", None)
    if generate is not None:

        @wraps(generate)
        def grafted_generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _generate(self, generate, args, kwargs)

        body["generate"] = grafted_generate
    return type(original.__name__, (original,), body)


def _run(host: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """Algorithm 1 of the survey at one site: y = g(r(x), {f(x; θ, φ_j)})."""
    state: State = host.__dict__[STATE]
    if torch.compiler.is_compiling():
        call = state.context.traced
        if state.context.in_line:
            return _run_traced(host, state, call, forward, args, kwargs)
        call = replace(call, composition=state.context.mirrored)
    else:
        call = state.context.current()
    if call.composition is None:
        return forward(host, *args, **kwargs)

    weights = call.composition.weights()
    active = [e for e in state.entries if weights.get(e.name, 0.0) != 0.0]
    if not active:
        return forward(host, *args, **kwargs)
    inputs = active_inputs(state, call.composition.names())
    if inputs and not call.spliced:
        run_inside = partial(_run, host, forward)
        return call_with_tokens(host, state, call, inputs, run_inside, args, kwargs)

    if residual := {e.name: e for e in active if e.residual}:
        composition = call.composition

        def fold(step: Step, e: Tensor) -> Tensor:
            def one(name: str, e: Tensor) -> Tensor:
                entry = residual.get(name)
                return e if entry is None else step(lambda y, r: _apply(entry, y, r, call), e)

            return composition.apply(one, e)

        args, kwargs = _shifted(host, state, forward, args, kwargs, fold)

    x = first_tensor(args, kwargs)
    changes, inner = _changes(active, weights)
    changed = None
    if changes:
        x = tensor_input(x, state.path)
        changed = None if inner else one_product(host, forward, x, changes)
    attended = _attended(state)
    out = run_changed(host, forward, inner, args, kwargs) if changed is None else changed
    _check_bypass(host, state, active, attended)
    if len(inner) == len(active):
        return out
    y = before = tensor_of(out)
    if inputs and call.relay is not None:
        y = call.relay(state.path, y)
    if changed is None and x is not None:
        for change in changes:
            y = _add(y, change, change.weight, x, host)
    functions = {
        e.name: e for e in active if isinstance(e.module, FunctionComposition) and not e.residual
    }
    if functions:

        def run(name: str, value: Tensor) -> Tensor:
            entry = functions.get(name)
            return value if entry is None else _apply(entry, value, x, call)

        y = call.composition.apply(run, y)
    return out if y is before else with_tensor(out, y)


def _run_traced(
    host: nn.Module,
    state: State,
    call: Call,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict,
) -> Any:
    """The same under ``torch.compile``: every resident module, weighted by a tensor that a switch
    of composition writes into, so that the graph stays the same."""
    if state.of(TokenComposition) and not call.spliced:
        # tokens change the shapes: the graph is bound to which modules put some there
        inputs = active_inputs(state, state.context.leading)
        if inputs:
            run_inside = partial(_run, host, forward)
            return call_with_tokens(host, state, call, inputs, run_inside, args, kwargs)
    if any(entry.residual for entry in state.entries):

        def fold(step: Step, e: Tensor) -> Tensor:
            for entry in state.entries:
                if entry.residual and _can_act(entry, state, call):
                    after = step(lambda y, r, entry=entry: _apply(entry, y, r, call), e)
                    e = _mixed(e, after, state.context.weights[entry.name])
            return e

        args, kwargs = _shifted(host, state, forward, args, kwargs, fold)

    x = first_tensor(args, kwargs)
    changes, inner = _changes(state.entries, state.context.weights)
    attended = _attended(state)
    out = run_changed(host, forward, inner, args, kwargs)
    _check_bypass(host, state, state.entries, attended)
    if len(inner) == len(state.entries):
        return out
    y = before = tensor_of(out)
    if call.relay is not None and state.of(TokenComposition):
        y = call.relay(state.path, y)
    for change in changes:
        assert isinstance(change.weight, Tensor)  # noqa: S101
        y = _add(y, change, change.weight.to(y.dtype), tensor_input(x, state.path), host)
    for entry in state.entries:
        if not isinstance(entry.module, FunctionComposition) or entry.residual:
            continue
        if _can_act(entry, state, call):
            y = _mixed(y, _apply(entry, y, x, call), state.context.weights[entry.name])
    return out if y is before else with_tensor(out, y)


def _changes(
    entries: list[Entry], weights: Mapping[str, float] | Mapping[str, Tensor]
) -> tuple[list[Change], list[Change]]:
    """The changes of the weight of a layer that is linear in it, and those of other parameters."""
    changes: list[Change] = []
    for e in entries:
        if isinstance(e.module, ParameterComposition):
            changes.append(Change(e.module, weights[e.name], e.part, e.parameter))
    linear = [change for change in changes if change.parameter is None]
    return linear, [change for change in changes if change.parameter is not None]


def _can_act(entry: Entry, state: State, call: Call) -> bool:
    """Whether a traced call has the side input that ``entry`` needs."""
    needs = entry.module.needs
    if needs is None or needs in call.side:
        return True
    # only here is the graph bound to a composition: nothing can be computed without it
    composition = state.context.mirrored
    if composition is not None and entry.name in composition.names():
        raise missing_side(entry.name, needs)
    return False


def _mixed(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """before + w·(after − before), exactly one of them where w is 0 or 1."""
    weight = weight.to(before.dtype)
    mixed = torch.where(weight == 1, after, before + weight * (after - before))
    return torch.where(weight == 0, before, mixed)


def _shifted(
    host: nn.Module,
    state: State,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict,
    fold: Callable[[Step, Tensor], Tensor],
) -> tuple[tuple, dict]:
    def f(args: tuple, kwargs: dict) -> Tensor:
        return tensor_of(forward(host, *args, **kwargs))

    return shifted(f, args, kwargs, fold, state.path)


def _add(y: Tensor, change: Change, weight: float | Tensor, x: Tensor, host: nn.Module) -> Tensor:
    """y + w·(f(x; θ + Δ) − f(x; θ)), on one part of y where the module acts on a part."""
    part = change.part
    effect = change.module.effect(x, host, weight_matrix(host, part))
    if not (isinstance(weight, float) and weight == 1.0):
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


def _generate(host: nn.Module, generate: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    state: State = host.__dict__[STATE]
    call = state.context.current()
    names = () if call.composition is None else call.composition.names()
    inputs = active_inputs(state, names)
    if not inputs or call.spliced:
        return generate(host, *args, **kwargs)
    return generate_with_tokens(host, state, call, inputs, generate, args, kwargs)


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
