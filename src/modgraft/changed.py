"""A linear layer with changed weights, f(x; θ + Σ w·Δ), in one product.

What a step costs is passing over the activations: N inputs of a layer ``[out, in]`` are N·in
numbers, their outputs N·out. A module's own ``effect`` passes over both once more, beside the
layer; θ + Σ w·Δ is made by one pass over the weight, and then nothing but the layer runs. So the
weight is made where it is smaller than the activations, N·(in + out) ≥ in·out, and effects are
taken where there are few tokens, as in decoding. ``benchmarks/train_step.py`` measures both.
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
from modgraft.computation.layers import bias_vector, weight_matrix

#: layers that compute nothing but x Wᵀ + b
_PLAIN = (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True)
class Change:
    """w·Δ of one module, at one part of a fused projection or at all of the layer.

    ``parameter`` says which of the layer's weights, where it has several.
    """

    module: ParameterComposition
    weight: float | Tensor
    part: tuple[int, int] | None
    parameter: str | None = None


def one_product(
    layer: nn.Module, forward: Callable[..., Any], x: Tensor, changes: Sequence[Change]
) -> Tensor | None:
    """f(x; θ + Σ w·Δ) ``[…, out]``, None where the layer and each module's effect are cheaper, or
    are all there is: another kind of layer, or a module that is no change of weights just now.

    In half precision as well: Δ is small beside θ, and a sum rounded to 8 bits would lose it.

    Args:
        layer: the site.
        forward: its own, unchanged.
        x: ``[…, in]``, its input.
        changes: of every parameter module in force there.
    """
    first = changes[0]
    whole = len(changes) == 1 and first.weight == 1 and first.part is None
    if whole and isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
        alone = first.module.alone(lambda value: forward(layer, value), x)
        if alone is not None:
            return alone
    if forward not in _PLAIN or not all(c.module.in_weights for c in changes):
        return None
    weight, bias = weight_matrix(layer), bias_vector(layer)
    if type(weight) not in (Tensor, nn.Parameter):  # a quantised one adds in its own way
        return None
    if x.dtype != weight.dtype or x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
        return None
    outs, ins = weight.shape
    if x.numel() // ins * (ins + outs) < ins * outs:
        return None
    bias = _with_changes(layer, bias, changes)
    factors = [_factors(c, outs) for c in changes]
    low_rank = [f for f in factors if f is not None]
    if len(low_rank) == len(changes):
        B, A = low_rank[0]
        if len(low_rank) > 1:  # a sum of low rank is of low rank: [B₁ B₂] [A₁; A₂]
            B, A = torch.cat([b for b, _ in low_rank], 1), torch.cat([a for _, a in low_rank])
        out = LowRank.apply(x, weight, bias, B, A)
        assert isinstance(out, Tensor)  # noqa: S101
        return out
    new = weight
    for change in changes:
        delta = change.module.delta(weight_matrix(layer, change.part))
        delta = delta if change.weight == 1 else change.weight * delta
        new = new + (delta if change.part is None else _padded(delta, change.part, outs))
    return F.linear(x, _laid_out_as(weight, new), bias)


class LowRank(torch.autograd.Function):
    """y = x (W + BA)ᵀ + b, forward in one product and backward in factors.

    With G the gradient of y: ∂x = G (W + BA), ∂B = Gᵀ(x Aᵀ), ∂A = (G B)ᵀ x. Nothing of the size of
    W is kept for backward, where W + BA is made again, and no gradient of its size is made unless
    W itself trains. It can be differentiated twice.
    """

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor) -> Tensor:  # noqa: D102
        return F.linear(x, _sum(W, B, A), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: D102
        x, W, _, B, A = inputs
        ctx.save_for_backward(x, W, B, A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W, B, A = ctx.saved_tensors
        wants_x, wants_W, wants_b, wants_B, wants_A = ctx.needs_input_grad
        G = grads[0].reshape(-1, W.shape[0])  # […, out] → [N, out]
        X = x.reshape(-1, W.shape[1])  # […, in] → [N, in]
        return (
            (G @ _sum(W, B, A)).view_as(x) if wants_x else None,
            G.T @ X if wants_W else None,
            G.sum(0) if wants_b else None,
            # as a [r, out] product: over the wide side in its stored order
            ((X @ A.T).T @ G).T if wants_B else None,
            (G @ B).T @ X if wants_A else None,
        )


def _sum(W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """W + BA in the layout of W, so that equal weights give equal products to the last bit."""
    if W.is_contiguous():
        return torch.addmm(W, B, A)
    return torch.addmm(W.T, A.T, B.T).T


def _laid_out_as(weight: Tensor, new: Tensor) -> Tensor:
    if new.stride() == weight.stride() or not weight.T.is_contiguous():
        return new
    return new.T.contiguous().T


def _factors(change: Change, outs: int) -> tuple[Tensor, Tensor] | None:
    """B ``[out, r]`` and A ``[r, in]`` of w·Δ, B being 0 outside the part."""
    factors = change.module.factors()
    if factors is None:
        return None
    B, A = factors
    B = B if change.part is None else _padded(B, change.part, outs)
    return B, A if change.weight == 1 else change.weight * A


def _padded(rows: Tensor, part: tuple[int, int], outs: int) -> Tensor:
    """A part's rows ``[out / n, k]`` in ``[out, k]`` of zeros."""
    size = outs // part[1]
    before = part[0] * size
    return F.pad(rows, (0, 0, before, outs - before - size))


def _with_changes(
    layer: nn.Module, bias: Tensor | None, changes: Sequence[Change]
) -> Tensor | None:
    if bias is None:
        return None
    new = bias
    for change in changes:
        delta = change.module.bias_delta(bias_vector(layer, change.part))
        if delta is None:
            continue
        delta = delta if change.weight == 1 else change.weight * delta
        if change.part is not None:
            delta = _padded(delta[:, None], change.part, bias.shape[0])[:, 0]
        new = new + delta
    return new
