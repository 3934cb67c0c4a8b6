"""A linear layer with changed weights, f(x; θ + Σ w·Δ), in about one product.

What a step costs is passing over the activations: N inputs of a layer ``[out, in]`` are N·in
numbers, their outputs N·out. A module's own ``effect`` passes over both once more. Where every Δ
is of low rank, its share is added into the layer's own product instead. Any other Δ is as large as
θ: θ + Σ w·Δ is made in one pass over the weight, and then the layer alone runs. Both pay where the
weight is smaller than the activations, N·(in + out) ≥ in·out; with few tokens, as in decoding,
the layer and effects beside it are cheaper, of which those of low rank run as one.
``benchmarks/train_step.py`` measures all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.computation.base import ParameterComposition
from modgraft.core.context import kept_in_call, seen_in_call
from modgraft.core.layers import bias_vector, stored, weight_matrix, with_own_gradient
from modgraft.core.parts import Part
from modgraft.engine.kernels.low_rank import LowRank

_LINEAR = (nn.Linear, Conv1D)
_ONE_WEIGHT = (*_LINEAR, nn.Embedding)


@dataclass(frozen=True)
class Change:
    """w·Δ of one module.

    Attributes:
        module: the parameter module.
        weight: w.
        part: the part of a fused projection that it changes; None: all of the weight.
        parameter: which of the layer's weights, where it has several.
    """

    module: ParameterComposition
    weight: float | Tensor
    part: Part | None
    parameter: str | None = None


class MergedWeight:
    """Σ w·Δ of one layer, as a call without gradients keeps it until it ends.

    Low rank is kept as factors. Any other Δ is made into θ + Σ w·Δ when a call runs the layer for
    the second time, as a ``generate`` does with its second step.
    """

    def low_rank(
        self, changes: Sequence[Change], weight: Tensor
    ) -> tuple[Tensor, Tensor, float] | None:
        """Return B ``[out, r]``, A ``[r, in]`` and s with Σ w·Δ = s·BA, None without factors."""
        return kept_in_call((self, "factors"), lambda: _low_rank(changes, weight))

    def product(self, layer: nn.Linear | Conv1D, x: Tensor, changes: Sequence[Change]) -> Any:
        """Return f(x; θ + Σ w·Δ), None at the first run."""
        if not seen_in_call(self):
            return None
        return F.linear(x, *kept_in_call(self, lambda: _changed(layer, changes)))


def one_product(
    layer: nn.Module,
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    changes: Sequence[Change],
    merged: MergedWeight | None = None,
) -> Tensor | None:
    """Return f(x; θ + Σ w·Δ) ``[…, out]`` in one product, or two; None where there is no such way.

    There is none where the layer and each module's effect are cheaper, for another kind of layer,
    under autocast, and with a module that is no change of weights now.

    Args:
        layer: the layer, linear in its weight.
        f: the layer as it is, f(x; θ).
        x: ``[…, in]``, its input.
        changes: those of every parameter module in force there.
        merged: where their sum with the layer's weight is kept, in a ``generate``.
    """
    first = changes[0]
    whole = len(changes) == 1 and first.weight == 1 and first.part is None
    if whole and isinstance(layer, _ONE_WEIGHT):
        fused = first.module.fused_forward(f, x)
        if fused is not None:
            return with_own_gradient(layer, x, fused)
    weight = _plain_weight(layer, x, changes)
    if weight is None:
        return None
    assert isinstance(layer, _LINEAR)  # noqa: S101
    pays, free = _pays(weight, x), merged is not None and _is_free(x)
    if free:
        assert merged is not None  # noqa: S101
        low_rank = merged.low_rank(changes, weight)
    else:
        low_rank = _low_rank(changes, weight)
    if low_rank is not None:
        own = stored(layer, "bias")
        bias = _changed_bias(layer, own, changes)
        if pays:
            B, A, s = low_rank
            return LowRank.apply(x, (s,), weight, bias, B, A)[0]
        if x.dim() > 1 and x.is_contiguous():  # laid out as torch itself would, but once
            flat = x.view(-1, x.shape[-1])  # […, in] → [N, in]
            y = _beside(F.linear(flat, weight, bias), flat, *low_rank)
            return y.view(*x.shape[:-1], len(weight))
        y = f(x) if bias is own else F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        return _beside(y.reshape(len(flat), -1), flat, *low_rank).view(y.shape)
    if free and (y := merged.product(layer, x, changes)) is not None:  # type: ignore[union-attr]
        return y
    if not pays or x.dtype.itemsize < 4:  # there Δ would be lost in a sum rounded to 8 bits
        return None
    return F.linear(x, *_changed(layer, changes))


def _beside(y: Tensor, x: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """Add s·(x Aᵀ)Bᵀ to ``y`` ``[N, out]``, the layer's own output for ``x`` ``[N, in]``."""
    fresh = not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())
    add = Tensor.addmm_ if fresh else torch.addmm
    return add(y, x.mm(A.T), B.T, alpha=s)


def low_rank_terms(
    layer: nn.Module, x: Tensor, changes: Sequence[Change]
) -> tuple[float, tuple[Tensor | None, ...]] | None:
    """Return s and W, b, B, A, the layer's arguments of :class:`LowRank`, if it would run so.

    Args:
        layer: the layer, linear in its weight.
        x: ``[…, in]``, its input.
        changes: those of every parameter module in force there.
    """
    if not isinstance(layer, _LINEAR) or _is_free(x):
        return None
    weight = _plain_weight(layer, x, changes)
    pays = weight is not None and _pays(weight, x)
    low_rank = _low_rank(changes, weight) if pays else None  # type: ignore[arg-type]
    if weight is None or low_rank is None:
        return None
    B, A, s = low_rank
    return s, (weight, _changed_bias(layer, stored(layer, "bias"), changes), B, A)


def _plain_weight(layer: nn.Module, x: Tensor, changes: Sequence[Change]) -> Tensor | None:
    """Return the layer's weight ``[out, in]`` if changes can be added to it, else None."""
    if not isinstance(layer, _LINEAR) or not all(c.module.is_weight_change for c in changes):
        return None
    if x.is_nested:  # texts of unequal length, which are not rows of one matrix
        return None
    weight = stored(layer, "weight")
    weight = weight.T if isinstance(layer, Conv1D) else weight
    if type(weight) not in (Tensor, nn.Parameter):  # a quantised weight adds in a way of its own
        return None
    if x.dtype != weight.dtype or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return None
    return weight


def _pays(weight: Tensor, x: Tensor) -> bool:
    """Return whether the weight is smaller than the activations, N·(in + out) ≥ in·out.

    Never for an input that is not contiguous, which the layer alone sums up in another order.
    """
    rows = x.numel() // x.shape[-1]
    return x.is_contiguous() and rows * sum(weight.shape) >= weight.numel()


def _weight_and_bias(layer: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """Return the layer's weight ``[out, in]`` and bias."""
    weight = stored(layer, "weight")
    return weight.T if isinstance(layer, Conv1D) else weight, stored(layer, "bias")


def _is_free(x: Tensor) -> bool:
    """Return whether no gradient is wanted, and nothing is lost in rounding."""
    return not (
        torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or x.dtype.itemsize < 4
    )


def _changed(layer: nn.Linear | Conv1D, changes: Sequence[Change]) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias with all changes."""
    weight, bias = _weight_and_bias(layer)
    new = _laid_out_as(weight, _changed_weight(layer, weight, changes))
    return new, _changed_bias(layer, bias, changes)


def _changed_weight(layer: nn.Module, weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """Return θ + Σ w·Δ ``[out, in]``."""
    new = weight
    for change in changes:
        delta = change.module.delta(weight_matrix(layer, change.part))
        delta = delta if change.weight == 1 else change.weight * delta
        new = new + (delta if change.part is None else change.part.padded(delta, -2))
    return new


def _laid_out_as(weight: Tensor, new: Tensor) -> Tensor:
    if new.stride() == weight.stride() or not weight.T.is_contiguous():
        return new
    return new.T.contiguous().T


def _low_rank(changes: Sequence[Change], weight: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Return B ``[out, r]``, A ``[r, in]`` and s with Σ w·Δ = s·BA, None if a Δ has no factors.

    They are small, and are cast to the type of the layer's ``weight`` ``[out, in]``. A sum of
    low-rank matrices is one: [B₁ B₂] [A₁; A₂]; outside a part, B is 0.
    """
    factors: list[tuple[Tensor, Tensor, float]] = []
    for change in changes:
        assert isinstance(change.weight, float | int)  # noqa: S101
        found = change.module.factors()
        if found is None:
            return None
        B, A, s = found
        B = B if change.part is None else change.part.padded(B, -2)
        factors.append((B.to(weight.dtype), A.to(weight.dtype), change.weight * s))
    if len(factors) == 1:
        return factors[0]
    wide, thin = [B for B, _, _ in factors], [s * A for _, A, s in factors]
    return torch.cat(wide, 1), torch.cat(thin), 1.0


def _changed_bias(
    layer: nn.Module, bias: Tensor | None, changes: Sequence[Change]
) -> Tensor | None:
    """Return the bias with the changes of every module, None where the layer has none."""
    if bias is None:
        return None
    new = bias
    for change in changes:
        own = bias if change.part is None else bias_vector(layer, change.part)
        delta = change.module.bias_delta(own)
        if delta is None:
            continue
        delta = delta if change.weight == 1 else change.weight * delta
        if change.part is not None:
            delta = change.part.padded(delta, -1)
        new = new + delta
    return new.to(bias.dtype)
