"""How transformers captures what layers put out, and how it is kept from capturing what we run.

``output_hidden_states=`` and its like put hooks on a model's layers at the first call that asks for
them, once: a mark on the model says that they are there. So a copy of a model with its mark needs
its hooks too. They add to the list of the call under way whatever a layer puts out, and a layer
that is run once more would be in that list twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_CAPTURING = "transformers.utils.output_capturing"


def captures(hook: Callable[..., Any]) -> bool:
    """Return whether ``hook`` is one by which transformers captures outputs."""
    return getattr(hook, "__module__", None) == _CAPTURING


@contextmanager
def captured_apart() -> Iterator[dict[str, list[Any]]]:
    """Collect what is captured in a ``with`` block by itself, and not in the call's own list.

    The block gets a dictionary, in which what was captured is by its name after the block.
    """
    found: dict[str, list[Any]] = {}
    collector = sys.modules[_CAPTURING]._active_collector if _CAPTURING in sys.modules else None
    outer = None if collector is None else collector.get()
    if collector is None or outer is None:
        yield found
        return
    own = {key: list(value) if type(value) is list else value for key, value in outer.items()}
    collector.set(own)
    try:
        yield found
    finally:
        collector.set(outer)
    found |= {key: own[key][len(value) :] for key, value in outer.items() if type(value) is list}


def add_captured(some: Mapping[str, list[Any]]) -> None:
    """Add to what the call has captured."""
    for key, values in some.items():
        sys.modules[_CAPTURING]._active_collector.get()[key].extend(values)


@contextmanager
def uncaptured() -> Iterator[None]:
    """Run layers in a ``with`` block without their outputs being captured."""
    if _CAPTURING not in sys.modules:
        yield
        return
    collector = sys.modules[_CAPTURING]._active_collector
    if torch.compiler.is_dynamo_compiling() and not collector.compiling:
        yield  # nothing is collected in this graph, which could not ask
        return
    collected = collector.get()
    collector.set(None)
    try:
        yield
    finally:
        collector.set(collected)
