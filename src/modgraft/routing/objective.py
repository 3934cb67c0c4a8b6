"""What routers add to a loss while they learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from modgraft.routing.base import Routing
from modgraft.routing.losses import score_function

if TYPE_CHECKING:
    from modgraft.routing.mixture import Mixture

KEPT = 0.9  # of a baseline, at every step


def example_losses(logits: Any, labels: Any, loss: Tensor) -> Tensor:
    """The loss of each example ``[B]`` without gradient; the mean for all where it is not known.

    Args:
        logits: ``[B, C]`` with labels ``[B]``, or ``[B, n, C]`` with labels ``[B, n]``, where −100
            is left out. A language model's, which predict the next token, have n as well.
        labels: int64.
        loss: of the batch, a scalar.
    """
    known = isinstance(logits, Tensor) and isinstance(labels, Tensor)
    if not known or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return loss.detach()[None]
    each = _mean_over_tokens(logits.detach(), labels)
    if labels.dim() == 2:
        moved = _mean_over_tokens(logits.detach()[:, :-1], labels[:, 1:])
        # which of both the model's own loss is: one that predicts the next token shifts them
        if (moved.mean() - loss.detach()).abs() < (each.mean() - loss.detach()).abs():
            return moved
    return each


def _mean_over_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
    )
    loss = loss.view(labels.shape[0], -1)  # 0 where a label is −100
    counted = (labels != -100).view(labels.shape[0], -1).sum(1).clamp_min(1)
    return loss.sum(1) / counted


def routing_loss(mixture: Mixture, routing: Routing, losses: Tensor) -> Tensor:
    """What one router adds: its balance, and the score function of what it sampled.

    The baseline is a running mean of earlier batches' losses, which no choice of this one moved.

    Args:
        mixture: whose router it is.
        routing: what was chosen.
        losses: ``[B]`` of the examples, or ``[1]`` of the batch.
    """
    added = routing.weights.new_zeros(())
    if routing.balance is not None:
        added = added + routing.balance
    if routing.score is not None:
        score = routing.score
        score = score.flatten(1).sum(1) if score.dim() > 1 else score.reshape(-1)
        each = losses if len(losses) == len(score) else losses.mean().expand(len(score))
        baseline = mixture.baseline
        added = added + score_function(score, each, 0.0 if baseline is None else baseline)
        now = float(losses.mean())
        mixture.baseline = now if baseline is None else KEPT * baseline + (1 - KEPT) * now
    return added
