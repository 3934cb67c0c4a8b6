"""Which weights of a transformers model are its head's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def asked(model: nn.Module, name: str) -> nn.Module | None:
    """Ask a transformers model for one of its layers, None where it has none."""
    ask: Callable[[], Any] | None = getattr(model, name, None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:
        return None


def head_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights of a head that is no table of words, such as a classifier's.

    The checkpoint of a base model has none of them, and ``from_pretrained`` makes them anew.
    """
    base = getattr(model, "base_model", model)
    if base is model or asked(model, "get_output_embeddings") is not None:
        return set()
    inside = {id(parameter) for parameter in base.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
