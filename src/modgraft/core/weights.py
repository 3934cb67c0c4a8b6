"""Which parameters of a layer are weights: matrices [out, in], and stacks of them for experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modgraft.core.family import joined

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED = (*LINEAR, nn.Embedding, *CONVOLUTIONS)
"""The layers that are linear in one weight: there the sub-module and its weight are one site."""


def stored(layer: nn.Module, name: str | None) -> Tensor:
    """Return the parameter called ``name`` (None: the weight), as ``layer`` stores it.

    A layer with modules answers whoever else asks with its changed weight.
    """
    value: Any = layer
    for each in (name or "weight").split("."):
        value = _own(value, each)
    return value


def _own(layer: nn.Module, name: str) -> Any:
    for place in (layer._parameters, layer._buffers, layer.__dict__):
        if name in place:
            return place[name]
    for kind in type(layer).__mro__:  # a parametrised layer computes it
        if type(found := kind.__dict__.get(name)) is property:
            return found.__get__(layer)
    return layer.__getattr__(name)


def keeps_inputs_first(layer: nn.Module, name: str | None) -> bool:
    """Return whether ``layer`` stores a weight ``[…, in, out]`` rather than ``[…, out, in]``."""
    if name is None:
        return isinstance(layer, Conv1D)
    return is_stack(layer, name) and bool(_inputs_first(layer, name))


def is_stack(layer: nn.Module, name: str) -> bool:
    """Return whether the parameter ``name`` holds a matrix for each expert of ``layer``.

    False too where nothing says which of its axes is the output.
    """
    weight = layer._parameters.get(name)
    if weight is None or weight.dim() != 3 or weight.shape[0] != getattr(layer, "num_experts", 0):
        return False
    return _inputs_first(layer, name) is not None


def _inputs_first(layer: nn.Module, name: str) -> bool | None:
    """Return whether experts store ``[E, in, out]``, None where that cannot be told.

    Most classes say so (transformers' ``is_transposed``). Of others, the width of the model tells:
    all weights but the last one read it.
    """
    said = getattr(layer, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = getattr(layer, "hidden_size", getattr(layer, "hidden_dim", None))
    one, two = stored(layer, name).shape[1:]
    if one == two or hidden not in (one, two):
        return None
    return (hidden == one) != name.startswith("down")


def weight_labels(path: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return the selections of each weight of a layer with weights of its own, with the weight's
    role or ``""``."""
    own = {n: p for n, p in module._parameters.items() if p is not None and "bias" not in n}
    matrices = [n for n, p in own.items() if p.dim() == 2 or is_stack(module, n)]
    if not isinstance(module, nn.MultiheadAttention) or len(matrices) not in (1, 3):
        return [(joined(path, name), "") for name in matrices]
    names = [f"{matrices[0]}[{i}/3]" for i in range(3)] if len(matrices) == 1 else matrices
    said = zip([*names, "out_proj"], ["query", "key", "value", "output"], strict=True)
    return [(joined(path, name), what) for name, what in said]
