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
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.computation.base import ParameterComposition
from modgraft.computation.borrow import borrows
from modgraft.computation.layers import bias_vector, weight_matrix

#: layers that compute nothing but x Wᵀ + b
PLAIN = (nn.Linear.forward, Conv1D.forward)
_LINEAR = (nn.Linear, Conv1D)
_SIMPLE = (*_LINEAR, nn.Embedding)  # those whose weight is all there is to change


@dataclass(frozen=True)
class Change:
    """w·Δ of one module, at one part of a fused projection or at all of the layer.

    ``parameter`` says which of the layer's weights, where it has several.
    """

    module: ParameterComposition
    weight: float | Tensor
    part: tuple[int, int] | None
    parameter: str | None = None


class Merged:
    """θ + Σ w·Δ of one layer, kept as long as no tensor in it changes."""

    def __init__(self) -> None:
        # what it was made of (held, so that no other tensor takes an identity), weight and bias
        self.made: tuple[list[Any], list[Tensor], Tensor, Tensor | None] | None = None

    def drop(self) -> None:
        """Let go of it."""
        self.made = None

    def product(self, layer: nn.Linear | Conv1D, x: Tensor, changes: Sequence[Change]) -> Tensor:
        """f(x; θ + Σ w·Δ); made anew where tensors may change unseen.

        Those of another module, and of inference mode.
        """
        weight, bias = _own(layer)
        some: list[Tensor | None] = [layer.weight, bias]
        for change in changes:
            some += [*change.module._parameters.values(), *change.module._buffers.values()]
        tensors = [t for t in some if t is not None]
        if any(borrows(c.module) for c in changes) or any(map(Tensor.is_inference, tensors)):
            new = _laid_out_as(weight, _changed(layer, weight, changes))
            return F.linear(x, new, _with_changes(layer, bias, changes))
        of = [(id(t), t._version, t.data_ptr()) for t in tensors]
        made = self.made  # read once: another thread may let go of it, or keep its own
        if made is None or made[0] != of:
            new = _laid_out_as(weight, _changed(layer, weight, changes))
            made = self.made = of, tensors, new, _with_changes(layer, bias, changes)
        return F.linear(x, made[2], made[3])


def one_product(
    layer: nn.Module,
    forward: Callable[..., Any],
    x: Tensor,
    changes: Sequence[Change],
    merged: Merged | None = None,
) -> Tensor | None:
    """f(x; θ + Σ w·Δ) ``[…, out]``, None where the layer and each module's effect are cheaper, or
    are all there is: another kind of layer, autocast, or a module that is no change of weights now.

    Args:
        layer: the site.
        forward: its own, unchanged.
        x: ``[…, in]``, its input.
        changes: of every parameter module in force there.
        merged: where their sum with the layer's weight is kept while nothing needs a gradient.
    """
    first = changes[0]
    whole = len(changes) == 1 and first.weight == 1 and first.part is None
    if whole and isinstance(layer, _SIMPLE):
        alone = first.module.alone(lambda value: forward(layer, value), x)
        if alone is not None:
            return alone
    if forward not in PLAIN or not all(c.module.in_weights for c in changes):
        return None
    assert isinstance(layer, _LINEAR)  # noqa: S101
    weight, bias = _own(layer)
    if type(weight) not in (Tensor, nn.Parameter):  # a quantised one adds in its own way
        return None
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    if merged is not None and _can_merge(x):
        return merged.product(layer, x, changes)
    outs, ins = weight.shape
    if x.numel() // ins * (ins + outs) < ins * outs:
        return None
    low_rank = _low_rank(changes, outs)
    if low_rank is not None:
        return LowRank.apply(x, weight, _with_changes(layer, bias, changes), *low_rank)[0]
    if x.dtype.itemsize < 4:  # Δ, small beside θ, would be lost in a sum rounded to 8 bits
        return None
    new = _changed(layer, weight, changes)
    return F.linear(x, _laid_out_as(weight, new), _with_changes(layer, bias, changes))


def _own(layer: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """The layer's weight ``[out, in]`` and bias."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight, layer.bias


def _can_merge(x: Tensor) -> bool:
    """Whether a weight may be kept: nothing learns, and nothing is lost in rounding."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype.itemsize < 4)


def _changed(layer: nn.Module, weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """θ + Σ w·Δ ``[out, in]``."""
    new = weight
    for change in changes:
        delta = change.module.delta(weight_matrix(layer, change.part))
        delta = delta if change.weight == 1 else change.weight * delta
        new = new + (delta if change.part is None else _padded(delta, change.part, len(weight)))
    return new


class LowRank(torch.autograd.Function):
    """y = s·(x Aᵀ) Bᵀ + b + x Wᵀ = x (W + s·BA)ᵀ + b, the thin product first; and s·x Aᵀ.

    The layer's own product is added to what the thin one has written, as it would be to a bias, so
    that y is passed over no more often than in the layer alone. With G the gradient of y:
    ∂x = s·(G B) A + G W in the same way, ∂B = s·Gᵀ(x Aᵀ), ∂A = s·(G B)ᵀ x. Nothing of the size of W
    is made, unless W itself trains, and of the size of y and x nothing but themselves. It can be
    differentiated twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: D102
        x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, s: float
    ) -> tuple[Tensor, Tensor]:
        X = x.reshape(-1, W.shape[1])  # […, in] → [N, in]
        hidden = X @ A.T  # [N, r]
        if b is None:
            y = hidden @ (s * B).T
        else:  # as one product: a column of ones carries the bias
            y = F.pad(hidden, (0, 1), value=1.0) @ torch.cat([s * B, b[:, None]], 1).T
        return y.addmm_(X, W.T).view(*x.shape[:-1], W.shape[0]), hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:  # noqa: D102
        x, W, _, B, A, ctx.s = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, W, B, A, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, W, B, A, hidden = ctx.saved_tensors
        wants_x, wants_W, wants_b, wants_B, wants_A, _ = ctx.needs_input_grad
        G = grads[0].reshape(-1, W.shape[0])  # […, out] → [N, out]
        X = x.reshape(-1, W.shape[1])  # […, in] → [N, in]
        if torch.is_grad_enabled():  # to be differentiated again, through x and A
            hidden = X @ A.T
        # first what reads G thinly, while it is in the cache: the product with W drives it out
        GB = G @ B  # [N, r]
        of_B = (hidden.T @ G).T if wants_B else None  # as [r, out]: over G in its stored order
        return (
            (G @ W).addmm_(GB, A, alpha=ctx.s).view(x.shape) if wants_x else None,
            G.T @ X if wants_W else None,
            G.sum(0) if wants_b else None,
            None if of_B is None else of_B.mul_(ctx.s),
            (GB.T @ X).mul_(ctx.s) if wants_A else None,
            None,
        )


# what torch asks of it at every call, and would make anew
LowRank.forward.__signature__ = signature(LowRank.forward)  # type: ignore[attr-defined]


def _laid_out_as(weight: Tensor, new: Tensor) -> Tensor:
    if new.stride() == weight.stride() or not weight.T.is_contiguous():
        return new
    return new.T.contiguous().T


def _low_rank(changes: Sequence[Change], outs: int) -> tuple[Tensor, Tensor, float] | None:
    """B ``[out, r]``, A ``[r, in]`` and s with Σ w·Δ = s·BA, None where a Δ is not of low rank.

    A sum of low rank is of low rank, [B₁ B₂] [A₁; A₂]; outside a part B is 0.
    """
    factors: list[tuple[Tensor, Tensor, float]] = []
    for change in changes:
        assert isinstance(change.weight, float | int)  # noqa: S101
        found = change.module.factors()
        if found is None:
            return None
        B, A, s = found
        B = B if change.part is None else _padded(B, change.part, outs)
        factors.append((B, A, change.weight * s))
    if len(factors) == 1:
        return factors[0]
    wide, thin = [B for B, _, _ in factors], [s * A for _, A, s in factors]
    return torch.cat(wide, 1), torch.cat(thin), 1.0


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
        own = bias if change.part is None else bias_vector(layer, change.part)
        delta = change.module.bias_delta(own)
        if delta is None:
            continue
        delta = delta if change.weight == 1 else change.weight * delta
        if change.part is not None:
            delta = _padded(delta[:, None], change.part, bias.shape[0])[:, 0]
        new = new + delta
    return new
