"""f(x; θ + Δ) where f is not linear in θ: the layer itself is run, with other weights.

Attention and RNNs read several parameters in one computation, so an effect cannot be added to what
they put out. What runs is a twin that shares everything with the layer but the changed tensors:
the layer is never touched, so that no other thread sees them, and gradients reach Δ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.core.layers import (
    add_to_bias,
    add_to_weight,
    bias_vector,
    stored,
    weight_matrix,
)
from modgraft.core.sites import joined
from modgraft.engine.kernels.linear import Change
from modgraft.engine.kernels.twin import twin_with


def new_weights(layer: nn.Module, changes: Sequence[Change]) -> dict[str, Tensor]:
    """θ + Σ w·Δ by the name of the parameter, every Δ that of the layer's own θ."""
    new: dict[str, Tensor] = {}
    for each in changes:
        at, name = (each.part, each.parameter), each.parameter or "weight"
        own = new[name] if name in new else stored(layer, name)
        delta = each.weight * each.module.delta(weight_matrix(layer, *at))
        new[name] = add_to_weight(own, delta, layer, *at)
        change = each.module.bias_delta(bias_vector(layer, *at))
        if change is not None:
            add_to_bias(layer, *at, each.weight * change, new)
    return new


def run(
    layer: nn.Module,
    forward: Callable[..., Any],
    changes: Sequence[Change],
    args: tuple,
    kwargs: dict,
) -> Any:
    """``forward`` of ``layer`` with changed weights."""
    if not changes:
        return forward(layer, *args, **kwargs)
    twin = twin_with(layer, new_weights(layer, changes))
    before = dict(twin.__dict__)
    out = forward(twin, *args, **kwargs)
    if not torch.compiler.is_compiling():  # what a layer notes on itself while it runs is its own
        for name, value in twin.__dict__.items():
            if name not in before or before[name] is not value:
                layer.__dict__[name] = value
    return out


def write(model: nn.Module, path: str, tensors: dict[str, Tensor]) -> None:
    """Put ``tensors`` into the parameters of the layer at ``path``, for good.

    Raises:
        ModgraftError: for a parameter that other layers use too.
    """
    for name, tensor in tensors.items():
        own = model.get_submodule(path).get_parameter(name)
        users = [
            joined(at, each).removesuffix(".weight")
            for at, module in model.named_modules()
            for each, value in module._parameters.items()
            if value is own
        ]
        if len(users) > 1:
            raise ModgraftError(
                f"{joined(path, name)} cannot be merged into: {', '.join(users)} share it, and the "
                f"module changes one of them only; keep it implanted"
            )
        own.copy_(tensor)
