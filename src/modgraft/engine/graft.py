"""The one file that changes a host, and changes it back.

A layer's class is swapped for a subclass made on the fly, whose ``forward`` is the engine's. Keys,
tensors and ``isinstance`` stay as they were, and the subclass carries the original's name, so that
whatever asks a class for its name gets the same answer. The modules are kept outside the layer's
registered children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from modgraft.computation.base import Computation, ParameterComposition, TokenComposition
from modgraft.core.context import Context
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import feature_axis
from modgraft.core.pickling import reduced_by
from modgraft.core.sites import Site, one_input
from modgraft.engine.inputs.tokens import generate_with_tokens, inner_sites
from modgraft.engine.plan import Entry
from modgraft.engine.run import run
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
    additive = isinstance(inner, ParameterComposition)
    context.add(name, device, additive, inner.side_source, bool(inner.members))


def graft(site: Site, name: str, module: Computation, context: Context) -> None:
    """Add ``module`` to the modules of ``site``, under ``name``."""
    layer = site.module
    state: State | None = layer.__dict__.get(STATE)
    if state is None:
        state = State(site.path, context)
        layer.__dict__[STATE] = state
        layer.__class__ = _grafted(type(layer))
    axis = feature_axis(layer)
    state.add(Entry(name, module, site.part, site.residual, site.parameter, axis))
    if isinstance(module, TokenComposition) and not site.path:
        context.token_modules.add(name)
        for inner in inner_sites(site):
            graft(inner, name, module, context)


def ungraft(layer: nn.Module, name: str) -> None:
    """Undo :func:`graft` for one name; the last module to leave restores the layer's class."""
    state: State | None = layer.__dict__.get(STATE)
    if state is None:
        return
    gone = state.remove(name)
    if not state.path and any(isinstance(e.module, TokenComposition) for e in gone):
        state.context.token_modules.discard(name)
        for inner in inner_sites(Site("", layer, None, layer)):
            ungraft(inner.module, name)
    if not state.entries:
        layer.__class__ = type(layer).__mro__[1]
        del layer.__dict__[STATE]


def ungraft_all(model: nn.Module) -> nn.Module:
    """Remove every module from ``model``, and return it."""
    for layer in model.modules():
        while (state := layer.__dict__.get(STATE)) is not None:
            ungraft(layer, next(iter(state.entries)))
    return model


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


@cache
def _grafted(original: type[nn.Module]) -> type[nn.Module]:
    """Make the subclass that runs a layer of class ``original`` with its modules."""
    forward = original.forward

    @wraps(forward)  # transformers inspects the signature, which has to be the original's
    def grafted_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, forward, args, kwargs)

    body: dict[str, Any] = {
        "forward": grafted_forward,
        "__reduce_ex__": reduced_by(_grafted, original),
        "_replicate_for_data_parallel": _refuse_replicas,
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
    if not inputs or call.spliced:
        return generate(host, *args, **kwargs)
    return generate_with_tokens(host, state, call, inputs, generate, args, kwargs)
