"""A layer's weights as matrices, and how the layers that are linear in a weight apply it.

A weight is seen as a matrix [out, in] whatever its layout; a convolution's is
[out, in/groups · k…], and that of a layer of experts a stack of matrices [experts, out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.core.errors import SiteError
from modgraft.core.offloaded import brought
from modgraft.core.parts import Part, share
from modgraft.core.patterns import joined

STATE = "_modgraft_state"
"""The attribute of a layer under which the engine keeps what is implanted there; it is no child."""

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED = (*LINEAR, nn.Embedding, *CONVOLUTIONS)
"""The layers that are linear in one weight: there the sub-module and its weight are one site."""

_POINTWISE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def open_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the sub-modules of ``model`` with their paths, but for what TorchScript has compiled.

    That runs as one program, in which nothing can be put.
    """
    named = model.named_modules()
    return ((path, module) for path, module in named if not isinstance(module, ScriptModule))


def stored(layer: nn.Module, name: str | None) -> Tensor:
    """Return the parameter called ``name`` (None: the weight), as ``layer`` stores it.

    A layer with modules answers whoever else asks with its changed weight. One that is offloaded
    has what its hook keeps.
    """
    name = name or "weight"
    own = layer._parameters.get(name)
    if own is not None:
        return brought(layer, name, own) if own.is_meta else own
    above, _, last = name.rpartition(".")
    owner: Any = layer
    for each in above.split(".") if above else ():
        owner = _own(owner, each)
    value = _own(owner, last)
    return brought(owner, last, value) if isinstance(value, Tensor) and value.is_meta else value


def _own(layer: nn.Module, name: str) -> Any:
    for place in (layer._parameters, layer._buffers, layer.__dict__):
        if name in place:
            return place[name]
    for kind in type(layer).__mro__:  # a parametrised layer computes it
        if type(found := kind.__dict__.get(name)) is property:
            return found.fget(layer)  # type: ignore[misc]
    return layer.__getattr__(name)


def computed(layer: nn.Module) -> dict[str, Any]:
    """Return what computes tensors of ``layer`` before each forward, by the tensor's name.

    These are hooks of ``torch.nn.utils``: pruning, and the former weight and spectral norm.
    """
    hooks = (
        h for h in layer._forward_pre_hooks.values() if type(h).__module__.startswith("torch.")
    )
    named = ((getattr(h, "name", None) or getattr(h, "_tensor_name", None), h) for h in hooks)
    return {name: hook for name, hook in named if isinstance(name, str)}


def compute_now(layer: nn.Module) -> None:
    """Compute the tensors that are :func:`computed`, as a forward in evaluation does."""
    training, layer.__dict__["training"] = layer.training, False
    for hook in computed(layer).values():
        hook(layer, ())
    layer.__dict__["training"] = training


def check_computed(layer: nn.Module, path: str, parameter: str | None) -> None:
    """Refuse to change what a tensor is computed from, or one of several tensors of a layer.

    Raises:
        SiteError: with the remedy.
    """
    of = next((name for name in computed(layer) if parameter and parameter != name), None)
    if of is not None:
        kind = type(computed(layer)[of]).__name__
        plain = isinstance(layer, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
        instead = f"at={path!r} changes the {of} itself, or m" if plain else "m"
        raise SiteError(
            f"{joined(path, parameter or '')}: a hook of torch.nn.utils ({kind}) computes this "
            f"{type(layer).__name__}'s {of} before each call, and a module has no effect there; "
            f"{instead}ake it an ordinary one first, as torch.nn.utils.prune.remove, "
            f"remove_weight_norm and remove_spectral_norm do"
        )


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
    if weight is None or weight.dim() != 3:
        return False
    counts = [value for said, value in layer.__dict__.items() if "experts" in said]
    return weight.shape[0] in counts and _inputs_first(layer, name) is not None


def _inputs_first(layer: nn.Module, name: str) -> bool | None:
    """Return whether experts store ``[E, in, out]``, None where that cannot be told.

    Most classes say so (transformers' ``is_transposed``). Of others, the width of the model tells:
    all weights but the last one read it. A square weight lies as the others of its layer.
    """
    said = getattr(layer, "is_transposed", None)
    if isinstance(said, bool):
        return said
    hidden = getattr(layer, "hidden_size", getattr(layer, "hidden_dim", None))
    others = [n for n, p in layer._parameters.items() if p is not None and p.dim() == 3]
    for each in (name, *others):
        one, two = stored(layer, each).shape[1:]
        if one != two:
            return (hidden == one) != each.startswith("down") if hidden in (one, two) else None
    return None


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


def weight_matrix(
    layer: nn.Module, part: Part | None = None, parameter: str | None = None
) -> Tensor:
    """Return a weight of ``layer`` as ``[out, in]``, or the rows of one part of a fused one.

    The weights of experts are ``[experts, out, in]``.

    Raises:
        SiteError: where there is no such weight.
    """
    if parameter is None and not isinstance(layer, WEIGHTED):
        raise SiteError(f"a {type(layer).__name__} is not linear in one weight")
    weight = stored(layer, parameter)
    if keeps_inputs_first(layer, parameter):
        matrix = weight.mT
    elif parameter is None:
        matrix = weight.flatten(1)  # [out, in/groups, k…] → [out, in/groups · k…]
    else:
        matrix = weight
    return share(matrix, part, -2)


def bias_vector(
    layer: nn.Module, part: Part | None = None, parameter: str | None = None
) -> Tensor | None:
    """Return the bias ``[out]`` of a weight of ``layer``, or a part of it.

    None if there is none.
    """
    place = _bias_place(layer, parameter)
    if place is None:
        return None
    return share(stored(layer, place[0])[place[1] : place[2]], part, -1)


def add_to_weight(
    weight: Tensor, delta: Tensor, layer: nn.Module, part: Part | None, parameter: str | None
) -> Tensor:
    """Return ``weight``, as ``layer`` stores it, plus ``delta`` ``[…, out, in]`` of it or of a
    part."""
    if part is not None:
        delta = part.padded(delta, -2)
    if keeps_inputs_first(layer, parameter):
        delta = delta.mT
    return weight + delta.reshape(weight.shape)


def add_to_bias(
    layer: nn.Module,
    part: Part | None,
    parameter: str | None,
    change: Tensor,
    new: dict[str, Tensor],
) -> None:
    """Add ``change`` to the bias of a weight; the result is put into ``new`` by its name."""
    place = _bias_place(layer, parameter)
    if place is not None:
        name, start, end = place
        bias = new.get(name, stored(layer, name))
        change = change if part is None else part.padded(change, -1)
        new[name] = bias + F.pad(change, (start, bias.shape[0] - end))


def linear_map(layer: nn.Module, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply ``layer`` with ``matrix`` as its weight and ``bias`` as its bias."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # with its padding mode, stride, …
        kernel = matrix.reshape(-1, *stored(layer, None).shape[1:])  # [out, in/groups, k…]
        return layer._conv_forward(x, kernel, bias)
    y = F.embedding(x, matrix) if isinstance(layer, nn.Embedding) else F.linear(x, matrix)
    return y if bias is None else y + bias


def low_rank_map(layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Apply ``layer`` with BA as its weight, without computing the product.

    A is ``[r, in]`` and B ``[out, r]`` for the weight as a matrix; of an embedding, ``[r, width]``
    and ``[entries, r]``.
    """
    if isinstance(layer, nn.Embedding):
        return F.linear(F.embedding(x, B), A.T)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return F.linear(F.linear(x, A), B)
    groups = layer.groups  # each applies A to its channels, and its rows of B to the result
    hidden = linear_map(layer, x, A.repeat(groups, 1))  # [B, groups · r, …]
    point = next(run for kind, run in _POINTWISE.items() if isinstance(layer, kind))
    return point(hidden, over_output(layer, B), groups=groups)  # 1×1


def with_own_gradient(layer: nn.Module, x: Tensor, change: Tensor) -> Tensor:
    """Return ``change``, what a change of the layer's weight adds to its output for ``x``, with the
    gradient that the layer's weight has: a table gives none to what it looks up as padding."""
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
        return change
    return torch.where((x == layer.padding_idx)[..., None], change.detach(), change)


def over_output(layer: nn.Module, values: Tensor) -> Tensor:
    """Shape ``values`` ``[…, out]`` so that they broadcast over the layer's output."""
    return values[(..., *[None] * (-1 - feature_axis(layer)))]


def feature_axis(layer: nn.Module) -> int:
    """Return the axis of the features in the layer's output: the last, except for convolutions."""
    return next((-k - 2 for k, kind in enumerate(_POINTWISE) if isinstance(layer, kind)), -1)


def linear_forward(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Tensor] | None:
    """Return what computes a layer by its weight, None where that is not linear in the weight.

    It takes the layer, its input, a weight as the layer stores it, and a bias. There is none for a
    class with a ``forward`` of its own, as scaled embeddings, position tables and standardised
    convolutions have, nor for a table that writes to its weight or divides its gradient.

    Args:
        layer: a layer of one weight.
        forward: its class's ``forward``.
    """
    if forward not in _BY_WEIGHT or getattr(layer, "max_norm", None) is not None:
        return None
    if getattr(layer, "scale_grad_by_freq", False):
        return None
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind = next(kind for kind in _POINTWISE if isinstance(layer, kind))
        if type(layer)._conv_forward is not kind._conv_forward:  # type: ignore[attr-defined]
            return None
    return _BY_WEIGHT[forward]


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _conv1d_of_gpt2(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], layer.nf)


def _embedding(layer: Any, x: Tensor, weight: Tensor, bias: None) -> Tensor:
    return F.embedding(
        x, weight, layer.padding_idx, None, layer.norm_type, layer.scale_grad_by_freq, layer.sparse
    )


def _convolution(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layer._conv_forward(x, weight, bias)


_BY_WEIGHT: dict[Callable[..., Any], Callable[..., Tensor]] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _conv1d_of_gpt2,
    nn.Embedding.forward: _embedding,
    **{kind.forward: _convolution for kind in _POINTWISE},
}


def _bias_place(layer: nn.Module, parameter: str | None) -> tuple[str, int, int] | None:
    """Return the parameter that holds the bias of a weight, with its first row and the one after
    it."""
    weight = parameter or "weight"
    name, start = weight.replace("weight", "bias"), 0
    if isinstance(layer, nn.MultiheadAttention) and weight[:6] in ("q_proj", "k_proj", "v_proj"):
        name, start = "in_proj_bias", "qkv".index(weight[0]) * layer.embed_dim
    try:
        bias = stored(layer, name)
    except AttributeError:
        return None
    matrix = weight_matrix(layer, None, parameter)
    if name == weight or not isinstance(bias, Tensor) or bias.dim() != 1 or matrix.dim() != 2:
        return None
    return name, start, start + matrix.shape[0]
