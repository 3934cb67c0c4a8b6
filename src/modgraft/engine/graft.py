"""The one file that changes a host, and changes it back.

A layer's class is swapped for a subclass made on the fly, whose ``forward`` is the engine's. Keys,
tensors and ``isinstance`` stay as they were, and the subclass carries the original's name, so that
whatever asks a class for its name gets the same answer. The modules are kept outside the layer's
registered children.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn

from modgraft.computation.base import (
    Computation,
    InputComposition,
    KeyValueComposition,
    ParameterComposition,
    TokenComposition,
)
from modgraft.core.context import Context
from modgraft.core.embeddings import Reading, reading_of
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import WEIGHTED, feature_axis
from modgraft.core.sites import Site, one_input
from modgraft.engine.copies import Hooked, hook_again, hooks_in, reduced
from modgraft.engine.inputs.generation import processors
from modgraft.engine.inputs.tokens import generate_with_tokens
from modgraft.engine.own_forward import PATCHED, by_weight, original, runs_changed
from modgraft.engine.plan import Entry
from modgraft.engine.run import run
from modgraft.engine.served_weight import SERVED, is_serving, served, shown_by_name
from modgraft.engine.state import STATE, State


def graft_everywhere(
    name: str,
    method: Computation,
    places: Sequence[tuple[Site, Computation]],
    device: torch.device,
    context: Context,
) -> None:
    """Let a module act under ``name``: graft it at its sites, and register it with the host.

    Args:
        name: what compositions call it.
        method: the computation as the user wrote it.
        places: each site, and the computation built for it.
        device: the host's.
        context: the host's.
    """
    for site, place in places:
        graft(site, name, place, context)
    inner = method.unwrapped
    additive, inputs = (isinstance(inner, k) for k in (ParameterComposition, InputComposition))
    context.add(
        name,
        device,
        inner.side_source,
        additive=additive,
        inputs=inputs,
        keys_values=isinstance(inner, KeyValueComposition)
        or not context.keys_values.isdisjoint(inner.members),
        routed=bool(inner.members),
        by_example=not (additive or inputs or (inner.side_source is None and inner.by_token)),
    )


def graft(site: Site, name: str, module: Computation, context: Context) -> None:
    """Add ``module`` to the modules of ``site``, under ``name``."""
    layer = site.module
    state = _state_of(layer, site.path, context)
    state.axis = int(site.time_first)
    axis = feature_axis(layer)
    entry = Entry(name, module, site.part, site.residual, site.parameter, axis)
    entry.inside = _is_inside(entry, layer)
    state.add(entry)
    layer.__class__ = _grafted(original(layer), _served_names(layer, state))
    if isinstance(module, TokenComposition) and not site.path:
        context.token_modules.add(name)
        state.relink = partial(_link_tokens, layer)
        _link_tokens(layer)


def _state_of(layer: nn.Module, path: str, context: Context) -> State:
    """Return the state of a layer, grafted if it was not."""
    state: State | None = layer.__dict__.get(STATE)
    if state is None:
        state = State(path, context)
        _put(layer, state)
        state.by_weight = by_weight(layer)
    return state


def _put(layer: nn.Module, state: State) -> None:
    """Swap the class of a layer; :func:`restore` undoes it."""
    kind = _grafted(type(layer), _served_names(layer, state))
    layer.__dict__[STATE] = state
    layer.__class__ = kind
    if "forward" in layer.__dict__:
        layer.__dict__[PATCHED] = layer.__dict__.pop("forward")


def _link_tokens(host: nn.Module) -> Reading:
    """Graft the layers of ``host`` where the tokens of its modules come in or leave.

    Returns:
        What the host reads, which says where these layers are.
    """
    state: State = host.__dict__[STATE]
    reading = state.reading = reading_of(host)
    names = [entry.name for entry in state.of_kind(TokenComposition)]
    for path in reading.paths:
        _state_of(host.get_submodule(path), path, state.context).relays.update(names)
    return reading


def divide(model: nn.Module, path: str, inside: State, context: Context) -> None:
    """Let the part at ``path`` run once for each composition of a batch, for a layer inside it."""
    state = _state_of(model.get_submodule(path), path, context)
    if not any(each is inside for each in state.divides):
        state.divides = (*state.divides, inside)


def undivide(model: nn.Module) -> None:
    """Undo every :func:`divide`."""
    for layer in model.modules():
        state: State | None = layer.__dict__.get(STATE)
        if state is not None and state.divides:
            state.divides = ()
            if not (state.entries or state.relays):
                restore(layer)


def ungraft(layer: nn.Module, name: str) -> None:
    """Undo :func:`graft` for one name; the last module to leave restores the layer's class."""
    state: State | None = layer.__dict__.get(STATE)
    if state is None:
        return
    gone = state.remove(name)
    if not state.path and any(isinstance(e.module, TokenComposition) for e in gone):
        state.context.token_modules.discard(name)
    if not (state.entries or state.relays):
        restore(layer)


def restore(layer: nn.Module) -> nn.Module:
    """Make a layer what it was before its first module came, and return it."""
    layer.__class__ = original(layer)
    layer.__dict__.pop(STATE, None)
    if PATCHED in layer.__dict__:
        layer.__dict__["forward"] = layer.__dict__.pop(PATCHED)
    return layer


def _bare(layer: nn.Module) -> nn.Module:
    """Return a shallow copy of a grafted layer, restored."""
    bare = object.__new__(type(layer))
    bare.__dict__.update(layer.__dict__)
    return restore(bare)


def implanted_in(
    model: nn.Module, layers: Sequence[nn.Module]
) -> tuple[list[tuple[nn.Module, State]], Hooked]:
    """Return what a host has put into its model, which a copy of the model does not have.

    Args:
        model: the host's.
        layers: with modules, also those that are no part of the model any more.
    """
    found = {m: m.__dict__[STATE] for m in (*model.modules(), *layers) if STATE in m.__dict__}
    return list(found.items()), hooks_in(model)


def implant_again(grafts: Sequence[tuple[nn.Module, State]], hooks: Hooked) -> None:
    """Put into a copy of a model what :func:`implanted_in` has found in the model."""
    for layer, state in grafts:
        if STATE not in layer.__dict__:  # of a shallow copy it is the same layer
            _put(layer, state)
    hook_again(hooks)


@contextmanager
def restored(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let grafted layers be what they were before their first module came, in a ``with`` block."""
    states = [layer.__dict__[STATE] for layer in layers]
    for layer in layers:
        restore(layer)
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            _put(layer, state)


def link_shared_inputs(model: nn.Module) -> None:
    """Tell each grafted layer of ``model`` which others read the same input."""
    for layers in one_input(model):
        grafted = tuple(layer for layer in layers if STATE in layer.__dict__)
        for layer in grafted:
            layer.__dict__[STATE].same_input = grafted if len(grafted) > 1 else ()


def grafted_by_others(model: nn.Module, context: Context) -> list[str]:
    """Return the paths of ``model`` where another host has implanted modules."""
    states = [m.__dict__[STATE] for m in model.modules() if STATE in m.__dict__]
    return [state.path for state in states if state.context is not context]


def _served_names(layer: nn.Module, state: State) -> tuple[str, ...]:
    """Return the tensors that others may read of a layer, where modules change them.

    torch's own layers of several weights are read by nobody else, once no fast path is taken.
    """
    if isinstance(layer, WEIGHTED):
        return SERVED
    by_name = any(entry.parameter is not None for entry in state.every())
    state.serves = by_name and (
        isinstance(layer, nn.ParameterList | nn.ParameterDict)
        or not original(layer).__module__.startswith("torch.")
    )
    return tuple(layer._parameters) if state.serves else ()


@cache
def _grafted(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Make the subclass that runs a layer of class ``kind`` with its modules.

    Args:
        kind: the layer's own class.
        names: the tensors that it shows to others as modules change them.
    """
    forward = kind.forward

    @wraps(forward)  # transformers inspects the signature, which has to be the original's
    def grafted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = self.__dict__
        if STATE not in own or (PATCHED in own and is_serving(self)):
            return forward(self, *args, **kwargs)  # a patched forward calls the layer's
        return run(self, args, kwargs)

    def is_exchanged(self: nn.Module, name: str, value: Any) -> bool:
        """Return whether a parameter takes the place of one that modules change, and that
        ``nn.Module`` would read before: ``fully_shard`` does so while the host runs."""
        own = name in names and kind.__setattr__ is nn.Module.__setattr__
        return own and isinstance(value, nn.Parameter) and name in self._parameters

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name == "forward":
            _patch(self, value)
        elif is_exchanged(self, name, value):
            self._parameters[name] = value
        else:
            kind.__setattr__(self, name, value)
        if name == "training" and STATE in self.__dict__:  # the modules, no children, follow it
            for entry in self.__dict__[STATE].every():
                entry.module.train(value)

    body: dict[str, Any] = {
        "forward": grafted_forward,
        "__setattr__": set_attribute,
        "__reduce_ex__": lambda self, protocol: reduced(_bare(self), protocol),
        "_replicate_for_data_parallel": _refuse_replicas,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if (copied := getattr(kind, "__deepcopy__", None)) is not None:
        body["__deepcopy__"] = lambda self, memo: restore(copied(self, memo))
    for name in names:
        own = getattr(kind, name, None)
        body[name] = served(name, own if isinstance(own, property) else None)
    if names:
        body.update(shown_by_name(kind, names))
    generate = getattr(kind, "generate", None)
    if generate is not None:

        @wraps(generate)
        def grafted_generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _generate(self, generate, args, kwargs)

        body["generate"] = grafted_generate
    make_processors = getattr(kind, "_get_logits_processor", None)
    if make_processors is not None:

        @wraps(make_processors)
        def grafted_processors(self: nn.Module, **kwargs: Any) -> Any:
            call = self.__dict__[STATE].context.current()
            return processors(self, call, make_processors, kwargs)

        body["_get_logits_processor"] = grafted_processors
    made: Any = type(kind.__name__, (kind,), body)
    return made


def _is_inside(entry: Entry, layer: nn.Module) -> bool:
    """Return whether only the layer itself can run with the module's change of its weight."""
    return entry.parameter is not None or (entry.changes_weight and runs_changed(layer))


def _patch(layer: nn.Module, forward: Callable[..., Any]) -> None:
    """Let a grafted layer run ``forward``, which was set on it, as the layer's own."""
    kind, state = type(layer), layer.__dict__[STATE]
    function = getattr(forward, "__func__", None)
    if getattr(forward, "__self__", None) is layer and function in (
        kind.forward,
        original(layer).forward,
    ):  # its own, as when hooks are taken off
        layer.__dict__.pop(PATCHED, None)
    else:
        layer.__dict__[PATCHED] = forward
    state.by_weight = by_weight(layer)
    for entry in state.every():
        entry.inside = _is_inside(entry, layer)
    state.plans.clear()


def _refuse_replicas(layer: nn.Module) -> nn.Module:
    """Refuse to be copied by ``nn.DataParallel``.

    Raises:
        ModgraftError: with the remedy.
    """
    raise ModgraftError(
        f"nn.DataParallel copies {layer.__dict__[STATE].path or 'the model'} to several devices at "
        f"each call, and the modules in it stay on one; use DistributedDataParallel, a process for "
        f"each device, or let this process see one device (CUDA_VISIBLE_DEVICES)"
    )


def _generate(host: nn.Module, generate: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    state: State = host.__dict__[STATE]
    call = state.context.current()
    names = () if call.composition is None else call.composition.names()
    inputs = state.token_modules(names)
    if not inputs or call.spliced is not None:
        return generate(host, *args, **kwargs)
    return generate_with_tokens(host, state, call, inputs, generate, args, kwargs)
