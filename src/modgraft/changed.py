"""A linear layer with changed weights, f(x; θ + Σ w·Δ), in about one product.

What a step costs is passing over the activations: N inputs of a layer ``[out, in]`` are N·in
numbers, their outputs N·out. A module's own ``effect`` passes over both once more. Where every Δ
is of low rank, its share is added into the layer's own product instead. Another Δ is as large as θ,
and θ + Σ w·Δ is made by one pass over the weight, after which nothing but the layer runs. Both pay
where the weight is smaller than the activations, N·(in + out) ≥ in·out; effects are taken where
there are few tokens, as in decoding. ``benchmarks/train_step.py`` measures all of it.
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
    are all there is: another kind of layer, autocast, or a module that is no change of weights now.

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
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    outs, ins = weight.shape
    if x.numel() // ins * (ins + outs) < ins * outs:
        return None
    factors = [_factors(c, outs) for c in changes]
    low_rank = [f for f in factors if f is not None]
    if len(low_rank) == len(changes):
        B, A = low_rank[0]
        if len(low_rank) > 1:  # a sum of low rank is of low rank: [B₁ B₂] [A₁; A₂]
            B, A = torch.cat([b for b, _ in low_rank], 1), torch.cat([a for _, a in low_rank])
        return LowRank.apply(x, weight, _with_changes(layer, bias, changes), B, A)[0]
    if x.dtype.itemsize < 4:  # Δ, small beside θ, would be lost in a sum rounded to 8 bits
        return None
    new = weight
    for change in changes:
        delta = change.module.delta(weight_matrix(layer, change.part))
        delta = delta if change.weight == 1 else change.weight * delta
        new = new + (delta if change.part is None else _padded(delta, change.part, outs))
    return F.linear(x, _laid_out_as(weight, new), _with_changes(layer, bias, changes))


class LowRank(torch.autograd.Function):
    """y = x Wᵀ + b + (x Aᵀ) Bᵀ = x (W + BA)ᵀ + b, the last sum made in place; and x Aᵀ.

    With G the gradient of y: ∂x = G W + (G B) A, in place as well, ∂B = Gᵀ(x Aᵀ), ∂A = (G B)ᵀ x.
    Nothing of the size of W is made, unless W itself trains, and of the size of y and x nothing
    but themselves. It can be differentiated twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: D102
        x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = F.linear(x, W, b)
        hidden = x.reshape(-1, W.shape[1]) @ A.T  # […, in] → [N, r]
        y.view(-1, W.shape[0]).addmm_(hidden, B.T)
        return y, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:  # noqa: D102
        x, W, _, B, A = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, W, B, A, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W, B, A, hidden = ctx.saved_tensors
        wants_x, wants_W, wants_b, wants_B, wants_A = ctx.needs_input_grad
        G = grads[0].reshape(-1, W.shape[0])  # […, out] → [N, out]
        X = x.reshape(-1, W.shape[1])  # […, in] → [N, in]
        if torch.is_grad_enabled():  # to be differentiated again, through x and A
            hidden = X @ A.T
        # first what reads G thinly, while it is in the cache: the product with W drives it out
        GB = G @ B  # [N, r]
        of_B = (hidden.T @ G).T if wants_B else None  # as [r, out]: over G in its stored order
        return (
            (G @ W).addmm_(GB, A).view_as(x) if wants_x else None,
            G.T @ X if wants_W else None,
            G.sum(0) if wants_b else None,
            of_B,
            GB.T @ X if wants_A else None,
        )


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
