"""Runs a layer's own forward, f(x; θ) or f(x; θ + Δ), whatever that forward is.

A layer that is linear in its weight is computed by its weight. Any other layer runs itself: a
shallow copy of it that has the changed tensors, or, where its forward was replaced on the instance
(accelerate's hooks, a patched ``layer.forward``), the layer itself, which then reads its weight
through :mod:`~modgraft.engine.served_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.compiled import eagerly
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import STATE, WEIGHTED, linear_forward, stored
from modgraft.core.sharded import before_sharding
from modgraft.engine.kernels import functional_call
from modgraft.engine.kernels.linear import Change
from modgraft.engine.served_weight import serving

PATCHED = "_modgraft_forward"
"""The attribute of a grafted layer that holds the forward which was set on the instance."""


def original(layer: nn.Module) -> type[nn.Module]:
    """Return the layer's class as it is without modules."""
    kind = type(layer)
    return kind.__mro__[1] if STATE in layer.__dict__ else kind


def own_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class that the layer's model has written for it: without modules, not sharded."""
    return before_sharding(original(layer))


def by_weight(layer: nn.Module) -> Callable[..., Tensor] | None:
    """Return what computes the layer by its weight; None where it has to run itself."""
    if not isinstance(layer, WEIGHTED) or {PATCHED, "forward"} & layer.__dict__.keys():
        return None
    return linear_forward(layer, original(layer).forward)


def runs_changed(layer: nn.Module) -> bool:
    """Return whether a change of the weight has to be run by the layer itself.

    A quantised weight cannot be changed in place of θ; effects are added to its layer's output.
    """
    if not isinstance(layer, WEIGHTED) or by_weight(layer) is not None:
        return False
    weight = stored(layer, "weight")
    return weight.is_floating_point() and type(weight) in (Tensor, nn.Parameter)


def run(layer: nn.Module, changes: Sequence[Change], args: tuple, kwargs: dict) -> Any:
    """Run the layer with θ + Σ w·Δ for its weights, or with its own where nothing changes them.

    Args:
        layer: a grafted layer.
        changes: of its weights.
        args: what it is called with.
        kwargs: what it is called with by name.
    """
    if PATCHED in layer.__dict__:
        return (_run_patched_eagerly if changes else _run_patched)(layer, changes, args, kwargs)
    state, forward = layer.__dict__[STATE], original(layer).forward
    if changes:
        return functional_call.run(layer, forward, changes, args, kwargs)
    if state.by_weight is not None and len(args) == 1 and not kwargs:
        return state.by_weight(layer, args[0], stored(layer, "weight"), _bias(layer))
    if isinstance(layer, WEIGHTED) or state.serves:  # it would read its weight as others do
        return functional_call.run(layer, forward, (), args, kwargs)
    return forward(layer, *args, **kwargs)


def _run_patched(layer: nn.Module, changes: Sequence[Change], args: tuple, kwargs: dict) -> Any:
    """Run the forward that was set on a layer, which reads its weight as others do.

    What accelerate's hook reads when it moves the weights is the layer's own.
    """
    patched, hook = layer.__dict__[PATCHED], layer.__dict__.get("_hf_hook")
    function = getattr(patched, "func", None)  # of accelerate's functools.partial
    moves = getattr(function, "__module__", "") == "accelerate.hooks"
    if hook is None or not moves or torch.compiler.is_dynamo_compiling():
        with serving(layer, changes):
            return patched(*args, **kwargs)
    with serving(layer, ()):
        args, kwargs = hook.pre_forward(layer, *args, **kwargs)
        grad = torch.is_grad_enabled() and not hook.no_grad
        with serving(layer, changes), torch.set_grad_enabled(grad):
            out = layer.__dict__["_old_forward"](*args, **kwargs)
        return hook.post_forward(layer, out)


_run_patched_eagerly = eagerly(_run_patched)  # torch.compile cannot follow what is read so


def _bias(layer: nn.Module) -> Tensor | None:
    return None if isinstance(layer, nn.Embedding) else stored(layer, "bias")


def check_copies(model: nn.Module, changed: Collection[nn.Module]) -> None:
    """Refuse to copy a model of which a forward holds on to layers that are changed in the copy.

    Args:
        model: the host's.
        changed: the layers.

    Raises:
        ModgraftError: with the remedy.
    """
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch._dynamo."):  # makes its own anew
            _check_copies(path, module, changed)


def _check_copies(path: str, module: nn.Module, changed: Collection[nn.Module]) -> None:
    patched = module.__dict__.get(PATCHED, module.__dict__.get("forward"))
    function = getattr(patched, "__func__", patched)
    if not isinstance(function, FunctionType):  # functools.partial, as accelerate's, is copied
        return
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held += [function.__globals__.get(name) for name in function.__code__.co_names]
    owners = [getattr(value, "__self__", value) for value in held]
    inside = (m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules())
    if any(each in changed for each in inside):
        raise ModgraftError(
            f"{path or 'the model'} cannot be copied, as a merge does: its forward was set to "
            f"{function.__qualname__}, which holds on to this {type(module).__name__}, and would "
            f"in a copy; make it a method of a class, or keep the modules implanted"
        )
