"""The one place where a host is changed, and how it is changed back.

A site's class is swapped for a subclass made on the fly. Keys, tensors and ``isinstance`` stay what
they were; the subclass carries the original's name, so that whatever asks a class for its name gets
the same answer. What acts there is kept outside the module's registered children.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from torch import nn

from modgraft.computation.base import Computation, TokenComposition
from modgraft.core.context import Context
from modgraft.core.layers import feature_axis
from modgraft.core.sites import Site, one_input
from modgraft.engine.inputs.tokens import active_inputs, generate_with_tokens, inner_sites
from modgraft.engine.plan import Entry
from modgraft.engine.run import STATE, State, run


def graft(site: Site, name: str, module: Computation, context: Context) -> None:
    """Let ``module`` act at ``site`` under ``name``."""
    host = site.module
    state: State | None = host.__dict__.get(STATE)
    if state is None:
        state = State(site.path, context)
        host.__dict__[STATE] = state
        host.__class__ = _grafted(type(host))
    axis = feature_axis(host)
    state.add(Entry(name, module, site.part, site.residual, site.parameter, axis))
    if isinstance(module, TokenComposition) and not site.path:
        context.token_modules.add(name)
        for inner in inner_sites(site):
            graft(inner, name, module, context)


def prune(host: nn.Module, name: str) -> None:
    """Undo :func:`graft` where it was done; the last one out restores the class."""
    state: State | None = host.__dict__.get(STATE)
    if state is None:
        return
    gone = state.drop(name)
    if not state.path and any(isinstance(e.module, TokenComposition) for e in gone):
        state.context.token_modules.discard(name)
        for inner in inner_sites(Site("", host, None, host)):
            prune(inner.module, name)
    if not state.named:
        host.__class__ = type(host).__mro__[1]
        del host.__dict__[STATE]


def relate(model: nn.Module) -> None:
    """Tell each site of ``model`` which sites share its input."""
    for layers in one_input(model):
        grafted = tuple(layer for layer in layers if STATE in layer.__dict__)
        for layer in grafted:
            layer.__dict__[STATE].beside = grafted if len(grafted) > 1 else ()


def pruned(model: nn.Module) -> nn.Module:
    """``model`` itself, with everything that is implanted in it taken out."""
    for module in model.modules():
        while (state := module.__dict__.get(STATE)) is not None:
            prune(module, next(iter(state.named)))
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
        return run(self, forward, args, kwargs)

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


def _generate(host: nn.Module, generate: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    state: State = host.__dict__[STATE]
    call = state.context.current()
    names = () if call.composition is None else call.composition.names()
    inputs = active_inputs(state, names)
    if not inputs or call.spliced:
        return generate(host, *args, **kwargs)
    return generate_with_tokens(host, state, call, inputs, generate, args, kwargs)
