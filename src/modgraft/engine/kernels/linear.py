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
from functools import reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.computation._borrow import borrows
from modgraft.computation.base import ParameterComposition
from modgraft.core.layers import bias_vector, weight_matrix

#: layers that compute nothing but x Wᵀ + b
PLAIN = (nn.Linear.forward, Conv1D.forward)
_LINEAR = (nn.Linear, Conv1D)
_SIMPLE = (*_LINEAR, nn.Embedding)  # those whose weight is all there is to change
CACHED = 3 * 2**19  # bytes of activations that a core's own cache holds beside a product's own
VECTOR = 16  # float32 numbers that a core computes with at once


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
        alone = first.module.fused_forward(lambda value: forward(layer, value), x)
        if alone is not None:
            return alone
    weight = _own_weight(layer, forward, x, changes)
    if weight is None:
        return None
    assert isinstance(layer, _LINEAR)  # noqa: S101
    if merged is not None and _can_merge(x):
        return merged.product(layer, x, changes)
    if not _pays(weight, x):
        return None
    bias = _with_changes(layer, layer.bias, changes)
    low_rank = _low_rank(changes, len(weight))
    if low_rank is not None:
        B, A, s = low_rank
        return LowRank.apply(x, (s,), weight, bias, B, A)[0]
    if x.dtype.itemsize < 4:  # Δ, small beside θ, would be lost in a sum rounded to 8 bits
        return None
    return F.linear(x, _laid_out_as(weight, _changed(layer, weight, changes)), bias)


def of_low_rank(
    layer: nn.Module, forward: Callable[..., Any], x: Tensor, changes: Sequence[Change]
) -> tuple[float, tuple[Tensor | None, ...]] | None:
    """s and W, b, B, A where the layer's share of :class:`LowRank` is what it would run, or None.

    Args:
        layer: the site.
        forward: its own, unchanged.
        x: ``[…, in]``, its input.
        changes: of every parameter module in force there.
    """
    weight = _own_weight(layer, forward, x, changes)
    if weight is None or _can_merge(x) or not _pays(weight, x):
        return None
    assert isinstance(layer, _LINEAR)  # noqa: S101
    low_rank = _low_rank(changes, len(weight))
    if low_rank is None:
        return None
    B, A, s = low_rank
    return s, (weight, _with_changes(layer, layer.bias, changes), B, A)


def _own_weight(
    layer: nn.Module, forward: Callable[..., Any], x: Tensor, changes: Sequence[Change]
) -> Tensor | None:
    """The layer's weight ``[out, in]`` where its changes could be added to it, else None."""
    if forward not in PLAIN or not all(c.module.is_weight_change for c in changes):
        return None
    assert isinstance(layer, _LINEAR)  # noqa: S101
    weight, _ = _own(layer)
    if type(weight) not in (Tensor, nn.Parameter):  # a quantised one adds in its own way
        return None
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return None
    return weight


def _pays(weight: Tensor, x: Tensor) -> bool:
    """Whether the weight is smaller than the activations, N·(in + out) ≥ in·out."""
    outs, ins = weight.shape
    return x.numel() // ins * (ins + outs) >= ins * outs


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
    """yᵢ = s·(x Aᵢᵀ) Bᵢᵀ + bᵢ + x Wᵢᵀ = x (Wᵢ + s·BᵢAᵢ)ᵀ + bᵢ of layers that share x, and s·A xᵀ.

    The layer's own product is added to what the thin one has written, as it would be to a bias, so
    that y is passed over no more often than in the layer alone; and x is passed over once for all
    its layers' thin products. With Gᵢ the gradient of yᵢ: ∂x = [s·GᵢBᵢ] [Aᵢ] + Σ GᵢWᵢ in the same
    way, ∂Bᵢ = Gᵢᵀ(s·x Aᵢᵀ), ∂A = [s·GᵢBᵢ]ᵀ x. Nothing of the size of W is made, unless W itself
    trains, and of the size of y and x nothing but themselves. It can be differentiated twice.

    Called as ``apply(x, scales, W₁, b₁, B₁, A₁, W₂, …)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: D102
        x: Tensor, scales: tuple[float, ...], *of: Any
    ) -> tuple[Tensor, ...]:
        Ws, bs, Bs, As = of[0::4], of[1::4], of[2::4], of[3::4]
        X = x.reshape(-1, x.shape[-1])  # […, in] → [N, in]
        hidden = _hidden(X, scales, As)
        outs = []
        for W, b, B, thin in zip(Ws, bs, Bs, _each(hidden, As), strict=True):
            if b is None:
                y = thin.T @ B.T
            else:  # as one product: a row of ones carries the bias
                ones = thin.new_ones(1, thin.shape[1])
                y = torch.cat([thin, ones]).T @ torch.cat([B, b[:, None]], 1).T
            outs.append(y.addmm_(X, W.T).view(*x.shape[:-1], W.shape[0]))
        return *outs, hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:  # noqa: D102
        x, ctx.scales, *of = inputs
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, output[-1], *of[0::4], *of[2::4], *of[3::4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, hidden, *of = ctx.saved_tensors
        scales, n = ctx.scales, len(ctx.scales)
        Ws, Bs, As = of[:n], of[n : 2 * n], of[2 * n :]
        wants_x, _, *wants = ctx.needs_input_grad
        X = x.reshape(-1, x.shape[-1])  # […, in] → [N, in]
        if torch.is_grad_enabled():  # to be differentiated again, through x and A
            hidden = _hidden(X, scales, As)
        back, thins = None, []
        found: list[list[Tensor | None]] = []
        for i, thin in enumerate(_each(hidden, As)):
            W, grad, (wants_W, wants_b, wants_B, _) = Ws[i], grads[i], wants[4 * i : 4 * i + 4]
            if grad is None:  # nobody reads that layer's output
                grad = X.new_zeros(X.shape[0], W.shape[0])
            G = grad.reshape(-1, W.shape[0])  # […, out] → [N, out]
            # first what reads G thinly, while it is in the cache: the product with W drives it out
            GB, of_B = _thinly(G, scales[i], Bs[i], thin, wants_B)
            thins.append(GB)
            if wants_x:
                back = G @ W if back is None else back.addmm_(G, W)
            found.append([G.T @ X if wants_W else None, G.sum(0) if wants_b else None, of_B])
        GB = _joined(thins)  # [Σ r, N]
        if back is not None:
            back = back.addmm_(GB.T, _joined(As)).view(x.shape)
        of_A = _each(GB @ X, As) if any(wants[3::4]) else [None] * n
        every = [grad for own, a in zip(found, of_A, strict=True) for grad in (*own, a)]
        return back, None, *every


# what torch asks of it at every call, and would make anew
LowRank.forward.__signature__ = signature(LowRank.forward)  # type: ignore[attr-defined]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _each(rows: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """As many rows for each A as it has."""
    return (rows,) if len(As) == 1 else rows.split_with_sizes([A.shape[0] for A in As])


def _hidden(X: Tensor, scales: Sequence[float], As: Sequence[Tensor]) -> Tensor:
    """s·A Xᵀ of each A ``[r, in]`` under the other, ``[Σ r, N]``."""
    s, *others = scales
    if any(other != s for other in others):
        s, As = 1.0, [own * A for own, A in zip(scales, As, strict=True)]
    A = _joined(As)
    return _across([_thin(s, A, some) for some in _pieces(X)])


def _thinly(
    G: Tensor, s: float, B: Tensor, hidden: Tensor, wants_B: bool
) -> tuple[Tensor, Tensor | None]:
    """s·(G B)ᵀ ``[r, N]`` and Gᵀ·hiddenᵀ ``[out, r]``, by rows that are still in the cache for the
    second."""
    pieces = _pieces(G)
    if not wants_B:
        return _across([_thin(s, B.T, some) for some in pieces]), None
    with_hidden = zip(pieces, hidden.split(pieces[0].shape[0], 1), strict=True)
    parts = [(_thin(s, B.T, some), own @ some) for some, own in with_hidden]
    return _across([thin for thin, _ in parts]), reduce(torch.add, [of_B for _, of_B in parts]).T


def _pieces(X: Tensor) -> Sequence[Tensor]:
    """X ``[N, d]`` by rows that stay in a core's cache."""
    if not X.is_cpu or torch.compiler.is_compiling():  # no graph is bound to how many they are
        return (X,)
    rows = max(1, CACHED // (X.shape[1] * X.element_size()))
    return (X,) if X.shape[0] <= rows else X.split(rows)


def _across(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)


def _thin(s: float, A: Tensor, X: Tensor) -> Tensor:
    """s·A Xᵀ ``[r, N]``, with no pass for s.

    Where r is small, a row of r numbers would leave most of a vector register unused, one of N
    does not.
    """
    ignored = A.new_zeros(1)
    if A.shape[0] < VECTOR:
        return torch.addmm(ignored, A.contiguous(), X.T, beta=0, alpha=s)
    return torch.addmm(ignored, X, A.T, beta=0, alpha=s).T


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
