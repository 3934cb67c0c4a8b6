"""f(x; θ + Δ) where f is not linear in θ: run the layer itself, with other weights.

Attention and RNNs read several parameters in one computation, so an effect cannot be added to
their output. What runs is a shallow copy that shares everything with the layer but the changed
tensors. The layer itself is never touched, so that no other thread sees them; gradients reach Δ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from modgraft.core.errors import ModgraftError
from modgraft.core.layers import add_to_bias, add_to_weight, bias_vector, stored, weight_matrix
from modgraft.core.patterns import joined
from modgraft.core.precision import wide
from modgraft.engine.kernels.linear import Change
from modgraft.engine.served_weight import COPIED

_OWN = vars(nn.Module()).keys()


def with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a shallow copy of ``module`` with ``tensors`` for the parameters and buffers so named.

    The copy shares everything else with the module, which is never touched.
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    forget(copy)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    buffers = {k: own.pop(k, v) for k, v in module._buffers.items()}
    copy.__dict__["_parameters"] = {**module._parameters, **own}
    copy.__dict__["_buffers"] = buffers
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            inner.setdefault(child, {})[rest] = tensor
    if inner:
        children = {
            name: with_tensors(module.get_submodule(name), of) for name, of in inner.items()
        }
        copy.__dict__["_modules"] = {**module._modules, **children}
    if isinstance(module, nn.RNNBase):  # it keeps a list, and compares it with what it had
        names = module._flat_weights_names
        copy.__dict__["_flat_weights"] = [copy._parameters[name] for name in names]
        copy.__dict__["_flat_weight_refs"] = [None] * len(names)
    return copy


def forget(layer: nn.Module) -> None:
    """Let ``layer`` forget the tensors in its dictionaries, which it has made of its weights.

    LeViT keeps its attention's biases so.
    """
    for name, value in layer.__dict__.items():
        if type(value) is dict and name not in _OWN:
            layer.__dict__[name] = {k: v for k, v in value.items() if not isinstance(v, Tensor)}


def new_weights(layer: nn.Module, changes: Sequence[Change]) -> dict[str, Tensor]:
    """Return θ + Σ w·Δ by the name of the parameter; every Δ is that of the layer's own θ.

    In half precision the sum is float32's, rounded once, see :mod:`modgraft.core.precision`.
    """
    new: dict[str, Tensor] = {}
    for each in changes:
        at, name = (each.part, each.parameter), each.parameter or "weight"
        own = new[name] if name in new else wide(stored(layer, name))
        delta = each.weight * each.module.delta(wide(weight_matrix(layer, *at)))
        new[name] = add_to_weight(own, delta, layer, *at)
        change = each.module.bias_delta(bias_vector(layer, *at))
        if change is not None:
            add_to_bias(layer, *at, wide(each.weight * change), new)
    return {name: value.to(stored(layer, name).dtype) for name, value in new.items()}


def run(
    layer: nn.Module,
    forward: Callable[..., Any],
    changes: Sequence[Change],
    args: tuple,
    kwargs: dict,
) -> Any:
    """Run ``forward`` of ``layer`` with changed weights."""
    changed = with_tensors(layer, new_weights(layer, changes))
    changed.__dict__[COPIED] = True
    if torch.compiler.is_dynamo_compiling():
        return forward(changed, *args, **kwargs)
    pairs = [(changed.__dict__, layer.__dict__)]
    pairs += [
        (changed.__dict__[kind], layer.__dict__[kind]) for kind in ("_buffers", "_parameters")
    ]
    before = [dict(new) for new, _ in pairs]
    out = forward(changed, *args, **kwargs)
    for (new, own), was in zip(pairs, before, strict=True):
        for name, value in new.items():
            if name not in was or was[name] is not value:  # what a layer sets as it runs is its own
                own[name] = value
    return out


def write(model: nn.Module, path: str, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` into the parameters of the layer at ``path``, for good.

    A weight that is computed, by a parametrisation or by a hook such as pruning's, becomes an
    ordinary one.

    Raises:
        ModgraftError: for a parameter that other layers share.
    """
    for name, tensor in tensors.items():
        inner, _, last = name.rpartition(".")
        _make_ordinary(model.get_submodule(joined(path, inner)), last)
        own = model.get_submodule(path).get_parameter(name)
        users = [
            joined(at, each).removesuffix(".weight")
            for at, module in model.named_modules()
            for each, value in module._parameters.items()
            if value is own
        ]
        if len(users) > 1:
            raise ModgraftError(
                f"{joined(path, name)} cannot be merged into: {', '.join(users)} share it, and "
                f"what is changed for {path} would change for all of them; keep it implanted"
            )
        own.copy_(tensor)
    forget(model.get_submodule(path))


def _make_ordinary(layer: nn.Module, name: str) -> None:
    """Make a tensor that ``layer``, a copy of the host's, computes a parameter of it."""
    if name in layer._parameters:
        return
    value = stored(layer, name).detach().clone()
    if is_parametrized(layer, name):  # torch's own function would change the class of both layers
        kind: Any = type(layer)
        others: Any = layer.parametrizations
        del others[name]
        body = {k: v for k, v in vars(kind).items() if k not in (name, "__dict__", "__weakref__")}
        base = kind.__bases__[0]
        layer.__class__ = type(kind.__name__, (base,), body) if others else base
        if not others:
            del layer.parametrizations
    for key, hook in list(layer._forward_pre_hooks.items()):  # weight_norm, spectral_norm, pruning
        if name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            hook.remove(layer)  # type: ignore[attr-defined]
            del layer._forward_pre_hooks[key]
    for place in (layer.__dict__, layer._buffers, layer._parameters):
        place.pop(name, None)
    layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
