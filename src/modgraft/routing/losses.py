"""Losses of routers: load balancing, and the score function for sampled choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modgraft.core.errors import warn

Routings = Sequence[tuple[Any, Any]]
"""Mixtures, and what their routers chose."""


def squared_variation(x: Tensor) -> Tensor:
    """Return CV(x)² = Var(x) / mean(x)² of ``x`` ``[N]``; 0 if all are equal, or N = 1."""
    if x.numel() == 1:
        return x.sum() * 0
    return x.var(unbiased=False) / x.mean().square().clamp_min(torch.finfo(x.dtype).tiny)


def importance(weights: Tensor) -> Tensor:
    """Return CV(Σ_x G(x))²: every module should get the same weight over a batch.

    Shazeer et al. 2017 (arXiv:1701.06538), equations 6 and 7. ``weights`` ``[…, N]``.
    """
    return squared_variation(weights.flatten(0, -2).sum(0))


def load(clean: Tensor, noisy: Tensor, spread: Tensor, k: int) -> Tensor:
    """Return CV(Σ_x P(x, ·))²: every module should be chosen equally often, by a smooth estimate.

    P(x, i) is the probability that module i is among the k largest if only its noise is drawn again
    (Shazeer et al. 2017, equations 8 to 11).

    Args:
        clean: ``[…, N]``, the logits without noise.
        noisy: ``[…, N]``, the logits with noise, by which modules were chosen.
        spread: ``[…, N]``, the standard deviation of the noise.
        k: how many were chosen; with k = N every probability is 1, and the loss 0.
    """
    count = clean.shape[-1]
    if k >= count:
        return clean.sum() * 0
    ranked = noisy.topk(k + 1, dim=-1)
    kth, next_one = ranked.values[..., k - 1, None], ranked.values[..., k, None]  # […, 1] each
    # the k-th largest of the others: for a module that was chosen, the (k + 1)-th of all
    threshold = torch.where(noisy >= kth, next_one, kth)
    probability = torch.special.ndtr((clean - threshold) / spread)
    return squared_variation(probability.flatten(0, -2).sum(0))


def switch(weights: Tensor, probabilities: Tensor) -> Tensor:
    """Return N Σ_i f_i P_i, f_i a module's share of choices, P_i its mean probability; 1 if even.

    Fedus et al. 2022 (arXiv:2101.03961), equation 4. Both ``[…, N]``.
    """
    chosen = (weights.detach() != 0).to(probabilities.dtype).flatten(0, -2)
    share = chosen.sum(0) / chosen.sum().clamp_min(1)
    return probabilities.shape[-1] * (share * probabilities.flatten(0, -2).mean(0)).sum()


def score_function(score: Tensor, losses: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """Return mean (L − b) · score, whose gradient is an unbiased estimate of ∇ E[L].

    REINFORCE (Williams 1992). The expectation is over sampled choices: ``score`` ``[B]`` is each
    choice's (importance-weighted) log-probability, ``losses`` ``[B]`` the loss L after it. A
    baseline b that does not depend on the choice reduces the variance without adding a bias.
    """
    return ((losses.detach() - baseline) * score).mean()


def example_losses(logits: Any, labels: Any, loss: Tensor) -> Tensor:
    """Return the loss of each example ``[B]``, or of the batch ``[1]`` where only that is known.

    It has no gradient.

    Args:
        logits: ``[B, C]`` with labels ``[B]``, or ``[B, n, C]`` with labels ``[B, n]``, where −100
            is ignored; a language model's predict the next token, or the same one.
        labels: int64.
        loss: the loss of the batch, a scalar.
    """
    known = isinstance(logits, Tensor) and isinstance(labels, Tensor)
    if not known or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return loss.detach()[None]
    same = _mean_over_tokens(logits.detach(), labels)
    if labels.dim() == 2:
        shifted = _mean_over_tokens(logits.detach()[:, :-1], labels[:, 1:])
        # the one nearer to the model's loss tells whether it predicts the next token
        if (shifted.mean() - loss.detach()).abs() < (same.mean() - loss.detach()).abs():
            return shifted
    return same


def with_routing_losses(out: Any, routings: Routings, kwargs: dict[str, Any]) -> Any:
    """Add the losses of the routers that learn in a call of a host to ``out.loss``.

    Without ``return_dict`` the loss is the first of a tuple, where there are labels. A
    score-function estimator needs the loss of each example, which is computed from logits and
    labels where they have the usual shapes.

    Args:
        out: what the host's model put out.
        routings: each mixture that learns, with its choice.
        kwargs: what the model was called with by name.
    """
    if not routings:
        return out
    in_tuple = isinstance(out, tuple) and kwargs.get("labels") is not None
    loss, logits = out[:2] if in_tuple else (getattr(out, n, None) for n in ("loss", "logits"))
    if not isinstance(loss, Tensor) or loss.dim():
        if any(routing.adds_to_loss for _, routing in routings):
            warn(_NO_LOSS.format(type(out).__name__))
        return out
    each = example_losses(logits, kwargs.get("labels"), loss)
    for mixture, routing in routings:
        loss = loss + mixture.routing_loss(routing, each)
    if isinstance(out, tuple):
        return loss, *out[1:]
    out.loss = loss
    return out


_NO_LOSS = (
    "a router of this host learns by what it adds to the loss, and the host's forward returned a "
    "{} without a scalar .loss, where it would be added: as it is, the router does not learn that. "
    "Compute the loss in the model's forward and return it as .loss, or take a router that adds "
    "none, mg.Soft() or mg.NoisyTopK(k, importance=0.0, load=0.0)"
)


def _mean_over_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
    )
    loss = loss.view(labels.shape[0], -1)  # 0 where a label is −100
    counted = (labels != -100).view(labels.shape[0], -1).sum(1).clamp_min(1)
    return loss.sum(1) / counted
