"""A module that shares everything with another but some of its tensors."""

from __future__ import annotations

from torch import Tensor, nn


def twin_with(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A twin of ``module`` that has ``tensors`` for its parameters and buffers of these names.

    The module itself is never touched, so that no other thread sees them.
    """
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    buffers = {k: own.pop(k, v) for k, v in module._buffers.items()}
    made.__dict__["_parameters"] = {**module._parameters, **own}
    made.__dict__["_buffers"] = buffers
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            inner.setdefault(child, {})[rest] = tensor
    if inner:
        children = {name: twin_with(module.get_submodule(name), of) for name, of in inner.items()}
        made.__dict__["_modules"] = {**module._modules, **children}
    if isinstance(module, nn.RNNBase):  # it keeps a list, and compares it with what it had
        names = module._flat_weights_names
        made.__dict__["_flat_weights"] = [made._parameters[name] for name in names]
        made.__dict__["_flat_weight_refs"] = [None] * len(names)
    return made
