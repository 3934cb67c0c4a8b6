"""Losses of routers: balance against collapse, and the score function for sampled choices."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_variation(x: Tensor) -> Tensor:
    """CV(x)² = Var(x) / mean(x)² of ``x`` ``[N]``, 0 where all are equal (or there is one)."""
    if x.numel() == 1:
        return x.sum() * 0
    return x.var(unbiased=False) / x.mean().square().clamp_min(torch.finfo(x.dtype).tiny)


def importance(weights: Tensor) -> Tensor:
    """CV(Σ_x G(x))²: every module should get the same weight over a batch.

    Shazeer et al. 2017 (arXiv:1701.06538), equations 6 and 7. ``weights`` ``[…, N]``.
    """
    return squared_variation(weights.flatten(0, -2).sum(0))


def load(clean: Tensor, noisy: Tensor, spread: Tensor, k: int) -> Tensor:
    """CV(Σ_x P(x, ·))²: every module should be chosen as often, by a smooth estimate.

    P(x, i) is the chance that module i is among the k largest when its own noise is drawn again
    (Shazeer et al. 2017, equations 8 to 11).

    Args:
        clean: ``[…, N]``, the logits without noise.
        noisy: ``[…, N]``, the logits that were chosen by.
        spread: ``[…, N]``, the standard deviation of the noise.
        k: how many were chosen; with k = N every chance is 1, and the loss 0.
    """
    count = clean.shape[-1]
    if k >= count:
        return clean.sum() * 0
    ranked = noisy.topk(k + 1, dim=-1)
    kth, next_one = ranked.values[..., k - 1, None], ranked.values[..., k, None]  # […, 1] each
    among = noisy >= kth
    # the k-th largest of the others: for one that was chosen, the (k + 1)-th of all
    bar = torch.where(among, next_one, kth)
    chance = torch.special.ndtr((clean - bar) / spread)
    return squared_variation(chance.flatten(0, -2).sum(0))


def switch(weights: Tensor, chances: Tensor) -> Tensor:
    """N Σ_i f_i P_i: f the share of choices that module i got, P its mean chance; 1 at balance.

    Fedus et al. 2022 (arXiv:2101.03961), equation 4. Both ``[…, N]``.
    """
    chosen = (weights.detach() != 0).to(chances.dtype).flatten(0, -2)
    share = chosen.sum(0) / chosen.sum().clamp_min(1)
    return chances.shape[-1] * (share * chances.flatten(0, -2).mean(0)).sum()


def score_function(score: Tensor, losses: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """mean (L − b) · score: its gradient is an unbiased estimate of ∇ E[L] over sampled choices.

    REINFORCE (Williams 1992). ``score`` ``[B]`` is the (importance-weighted) log-probability of
    each choice, ``losses`` ``[B]`` what came of it; a baseline that does not depend on the choice
    takes away variance and no truth.
    """
    return ((losses.detach() - baseline) * score).mean()
