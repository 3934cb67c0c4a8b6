"""The product of a linear layer whose weight is changed by a matrix of low rank, and its gradient.

Written by rows that stay in a core's cache: what such a product costs is reading its activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

CACHED = 3 * 2**19
"""Bytes of activations that a core's cache holds beside those of a product itself."""

VECTOR = 16
"""How many float32 numbers a core computes with at once."""


class LowRank(Function):
    """yᵢ = s·(x Aᵢᵀ) Bᵢᵀ + bᵢ + x Wᵢᵀ = x (Wᵢ + s·BᵢAᵢ)ᵀ + bᵢ of layers that share x, and s·A xᵀ.

    The layer's own product is added to what the thin one has written, as it would be to a bias, so
    that y is passed over no more often than in the layer alone; and x is passed over once for the
    thin products of all layers. With Gᵢ the gradient of yᵢ: ∂x = [s·GᵢBᵢ] [Aᵢ] + Σ GᵢWᵢ in the
    same way, ∂Bᵢ = Gᵢᵀ(s·x Aᵢᵀ), ∂A = [s·GᵢBᵢ]ᵀ x. No other tensor of the size of x, y or W is
    made, unless W itself trains. It can be differentiated twice.

    Call it as ``apply(x, scales, W₁, b₁, B₁, A₁, W₂, …)``.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run it; without ``torch.func``, past what binds the arguments to a signature first.

        Forward-mode differentiation goes through its operations, one by one.
        """
        if forward_ad._current_level >= 0:
            return cls.forward(*args)
        if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]

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
            y = y.addmm_(X, W.T)  # no view of it: the host may write to its layer's output in place
            outs.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], W.shape[0]]))
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
            if grad is None:  # nothing reads that layer's output
                grad = X.new_zeros(X.shape[0], W.shape[0])
            G = grad.reshape(-1, W.shape[0])  # […, out] → [N, out]
            # first what reads G thinly, while it is in the cache: the product with W drives it out
            GB, grad_B = _thinly(G, scales[i], Bs[i], thin, wants_B)
            thins.append(GB)
            if wants_x:
                back = G @ W if back is None else back.addmm_(G, W)
            found.append([G.T @ X if wants_W else None, G.sum(0) if wants_b else None, grad_B])
        GB = _joined(thins)  # [Σ r, N]
        if back is not None:
            back = back.addmm_(GB.T, _joined(As)).view(x.shape)
        grad_As = _each(GB @ X, As) if any(wants[3::4]) else [None] * n
        every = [grad for own, a in zip(found, grad_As, strict=True) for grad in (*own, a)]
        return back, None, *every


# torch reads the signature at every call, and would make it anew each time
LowRank.forward.__signature__ = signature(LowRank.forward)  # type: ignore[attr-defined]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _each(rows: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split ``rows`` into as many for each A as it has."""
    return (rows,) if len(As) == 1 else rows.split_with_sizes([A.shape[0] for A in As])


def _hidden(X: Tensor, scales: Sequence[float], As: Sequence[Tensor]) -> Tensor:
    """Return s·A Xᵀ of each A ``[r, in]``, one under the other: ``[Σ r, N]``."""
    s, *others = scales
    if any(other != s for other in others):
        s, As = 1.0, [own * A for own, A in zip(scales, As, strict=True)]
    A = _joined(As)
    return _across([_thin(s, A, some) for some in _pieces(X)])


def _thinly(
    G: Tensor, s: float, B: Tensor, hidden: Tensor, wants_B: bool
) -> tuple[Tensor, Tensor | None]:
    """Return s·(G B)ᵀ ``[r, N]`` and Gᵀ·hiddenᵀ ``[out, r]``, by rows of G that are still in the
    cache for the second."""
    pieces = _pieces(G)
    if not wants_B:
        return _across([_thin(s, B.T, some) for some in pieces]), None
    with_hidden = zip(pieces, hidden.split(pieces[0].shape[0], 1), strict=True)
    parts = [(_thin(s, B.T, some), own @ some) for some, own in with_hidden]
    return _across([thin for thin, _ in parts]), reduce(
        torch.add, [grad_B for _, grad_B in parts]
    ).T


def _pieces(X: Tensor) -> Sequence[Tensor]:
    """Split X ``[N, d]`` into rows that stay in a core's cache."""
    if (
        not X.is_cpu or torch.compiler.is_dynamo_compiling()
    ):  # no graph is bound to how many they are
        return (X,)
    rows = max(1, CACHED // (X.shape[1] * X.element_size()))
    return (X,) if X.shape[0] <= rows else X.split(rows)


def _across(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), 1)


def _thin(s: float, A: Tensor, X: Tensor) -> Tensor:
    """Return s·A Xᵀ ``[r, N]``, without a pass for s.

    Where r is small, a row of r numbers leaves most of a vector register unused; a row of N does
    not.
    """
    if forward_ad._current_level >= 0:  # torch has no tangent of a term that it leaves out
        return s * (A @ X.T)
    ignored = A.new_zeros(1)
    if A.shape[0] < VECTOR:
        return torch.addmm(ignored, A.contiguous(), X.T, beta=0, alpha=s)
    return torch.addmm(ignored, X, A.T, beta=0, alpha=s).T
