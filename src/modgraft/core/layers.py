"""A layer's weights as matrices, and how the layers that are linear in a weight apply it.

A weight is seen as a matrix [out, in] whatever its layout; a convolution's is
[out, in/groups · k…].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.core.errors import SiteError
from modgraft.core.sites import WEIGHTED, Site, weight_labels

STATE = "_modgraft_state"
"""The attribute of a layer under which the engine keeps what is implanted there; it is no child."""

_POINTWISE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}

Part = tuple[int, int] | None


def check_weight(method: str, site: Site) -> None:
    """Refuse a site that is not one weight matrix, or a part that its weight does not have.

    Raises:
        SiteError: with what to select instead, at a layer with several weights.
    """
    layer, kind = site.module, type(site.module).__name__
    if site.parameter is None and not isinstance(layer, WEIGHTED):
        raise _several(method, site)
    weight = stored(layer, site.parameter)
    if weight.dim() != 2 and site.parameter is not None:
        raise SiteError(
            f"{method} at {site.label}: this parameter is {list(weight.shape)}, and {method} "
            f"changes weights [out, in]"
        )
    if site.part is None:
        return
    rows, count = weight_matrix(layer, None, site.parameter).shape[0], site.part[1]
    whole = site.label.rpartition("[")[0]
    if isinstance(layer, nn.Embedding):
        raise SiteError(f"{method} at {site.label}: a table has no parts; write at={whole!r}")
    if rows % count:
        better = next((n for n in (3, 2) if rows % n == 0 and n != count), None)
        parts = f"at='{whole}[0/{better}]', or the whole, " if better else ""
        raise SiteError(
            f"{method} at {site.label}: this {kind} has {rows} outputs, which is not {count} equal "
            f"parts ({rows} / {count} = {rows / count:.4g}); write {parts}at={whole!r}"
        )
    if getattr(layer, "groups", 1) > 1:
        raise SiteError(
            f"{method} at {site.label}: a convolution of {layer.groups} groups is in parts "
            f"already; write at={whole!r}"
        )


def check_features(method: str, site: Site) -> None:
    """Refuse a site whose output has no features, or no such part of them.

    Raises:
        SiteError: with the corrected call.
    """
    kind = type(site.module).__name__
    if site.parameter is not None:
        raise SiteError(
            f"{method} at {site.label}: a {kind} reads this parameter itself, and no activation "
            f"passes there that {method} could change; act on the layer's output, "
            f"at={site.path!r}, or take a parameter module such as LoRA(rank=8)"
        )
    if site.part is None:
        return
    whole, count = site.label.rpartition("[")[0], site.part[1]
    full = replace(site, part=None).width
    if full % count or (site.channels_first and feature_axis(site.module) == -1):
        raise SiteError(
            f"{method} at {site.label}: this {kind} puts out {full} features, which is not {count} "
            f"equal parts; write at={whole!r}"
        )


def _several(method: str, site: Site) -> SiteError:
    kind, labels = type(site.module).__name__, weight_labels(site.path, site.module)
    if not labels:
        return SiteError(
            f"{method} at {site.label or 'the host itself'}: a {kind} has no weight that a "
            f"parameter module can change; it acts on "
            f"{', '.join(k.__name__ for k in WEIGHTED)}, and on parameters [out, in] by their names"
        )
    some = ", ".join(f"{label!r}{f' ({what})' if what else ''}" for label, what in labels[:8])
    return SiteError(
        f"{method} at {site.label or 'the host itself'}: a {kind} has several weights, "
        f"{some}{' …' if len(labels) > 8 else ''}; say which: at={labels[0][0]!r}"
    )


def weight_matrix(layer: nn.Module, part: Part = None, parameter: str | None = None) -> Tensor:
    """Return a weight of ``layer`` as ``[out, in]``, or the rows of one part of a fused one.

    Raises:
        SiteError: where there is no such weight; :func:`check_weight` says what to select instead.
    """
    if parameter is None and not isinstance(layer, WEIGHTED):
        raise SiteError(f"a {type(layer).__name__} is not linear in one weight")
    weight = stored(layer, parameter)
    if isinstance(layer, Conv1D) and parameter is None:
        weight = weight.T  # stored [in, out]
    matrix = weight.flatten(1)  # [out, in/groups, k…] → [out, in/groups · k…]
    return matrix if part is None else matrix.chunk(part[1])[part[0]]


def bias_vector(layer: nn.Module, part: Part = None, parameter: str | None = None) -> Tensor | None:
    """Return the bias ``[out]`` of a weight of ``layer``, or a part of it.

    None if there is none.
    """
    place = _bias_place(layer, part, parameter)
    return None if place is None else stored(layer, place[0])[place[1] : place[2]]


def add_to_weight(
    weight: Tensor, delta: Tensor, layer: nn.Module, part: Part, parameter: str | None
) -> Tensor:
    """Return ``weight``, as ``layer`` stores it, plus ``delta`` ``[out, in]`` of it or of a
    part."""
    if part is not None:
        before = part[0] * delta.shape[0]
        after = (part[1] - part[0] - 1) * delta.shape[0]
        delta = F.pad(delta, (0, 0, before, after))  # [out / n, in] → [out, in]
    if isinstance(layer, Conv1D) and parameter is None:
        delta = delta.T
    return weight + delta.reshape(weight.shape)


def add_to_bias(
    layer: nn.Module, part: Part, parameter: str | None, change: Tensor, new: dict[str, Tensor]
) -> None:
    """Add ``change`` to the bias of a weight; the result is put into ``new`` by its name."""
    place = _bias_place(layer, part, parameter)
    if place is not None:
        name, start, end = place
        bias = new.get(name, stored(layer, name))
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


def over_output(layer: nn.Module, values: Tensor) -> Tensor:
    """Shape ``values`` ``[…, out]`` so that they broadcast over the layer's output."""
    return values[(..., *[None] * (-1 - feature_axis(layer)))]


def feature_axis(layer: nn.Module) -> int:
    """Return the axis of the features in the layer's output: the last, except for convolutions."""
    return next((-k - 2 for k, kind in enumerate(_POINTWISE) if isinstance(layer, kind)), -1)


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


def linear_forward(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Tensor] | None:
    """Return what computes a layer by its weight, None where that is not linear in the weight.

    It takes the layer, its input, a weight as the layer stores it, and a bias. There is none for a
    class with a ``forward`` of its own, as scaled embeddings, position tables and standardised
    convolutions have.

    Args:
        layer: a layer of one weight.
        forward: its class's ``forward``.
    """
    if forward not in _BY_WEIGHT or getattr(layer, "max_norm", None) is not None:
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


def _bias_place(layer: nn.Module, part: Part, parameter: str | None) -> tuple[str, int, int] | None:
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
    if name == weight or not isinstance(bias, Tensor) or bias.dim() != 1:
        return None
    rows = weight_matrix(layer, None, parameter).shape[0]
    if part is not None:
        rows //= part[1]
        start += part[0] * rows
    return name, start, start + rows
