"""Finds the part of a host that can run once for each composition, around a layer that cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from modgraft.core.call import Call
from modgraft.core.context import Context
from modgraft.core.errors import UndividedError
from modgraft.core.patterns import starred
from modgraft.engine.divided import PART
from modgraft.engine.examples import ask_parts, signature
from modgraft.engine.graft import divide
from modgraft.engine.state import STATE, State


def divide_around(
    model: nn.Module,
    context: Context,
    error: UndividedError,
    call: Call,
    count: int | None,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Call:
    """Let the nearest part around a layer, and around its like, run once for each composition.

    Args:
        model: the host's.
        context: the host's.
        error: of the layer.
        call: of the host, in which it was raised.
        count: how many examples the call has, None where nothing says.
        args: what the host is called with.
        kwargs: what it is called with by name.

    Returns:
        The call, to be begun again.

    Raises:
        UndividedError: ``error``, where there is no such part.
    """
    kind, composition = signature(args, kwargs, count), call.composition
    if kind is None or composition is None or call.generating or call.spliced is not None:
        raise error
    if context.token_modules_in(composition):
        raise error
    known = {} if call.layout is None else call.layout
    around = {
        path: _around(model, path, known)
        for path, layer in model.named_modules()
        if STATE in layer.__dict__ and starred(path) == starred(error.path)
    }
    every = list(dict.fromkeys(part for parts in around.values() for part in parts))
    axes = ask_parts(model, args, kwargs, count, every)
    found = {path: next((p for p in parts if p in axes), None) for path, parts in around.items()}
    if found.get(error.path) is None:
        raise error
    new = {}
    for path, part in found.items():
        if part is not None:
            divide(model, part, _state(model, path), context)
            new[PART + part] = axes[part]
    layout = {**known, **new}
    if kind in context.layouts:  # what was found holds for calls that are alike
        context.remember(kind, layout)
    return replace(call, layout=layout)


def _around(model: nn.Module, path: str, layout: Mapping[str, Any]) -> list[str]:
    """Return the layer and the parts around it, the nearest first, beyond those that are divided
    for it already."""
    names = path.split(".") if path else []
    parts = [".".join(names[:n]) for n in range(len(names), -1, -1)]
    tried = [
        k
        for k, part in enumerate(parts)
        if PART + part in layout and _is_divided(model, part, path)
    ]
    return parts[max(tried, default=-1) + 1 :]


def _is_divided(model: nn.Module, part: str, path: str) -> bool:
    """Return whether ``part`` runs once for each composition for the layer at ``path``."""
    state: State | None = model.get_submodule(part).__dict__.get(STATE)
    return state is not None and any(each is _state(model, path) for each in state.divides)


def _state(model: nn.Module, path: str) -> State:
    return model.get_submodule(path).__dict__[STATE]
