"""Attention of one query, as in decoding, over keys that lie in two places.

Decoding costs as much as reading the keys and values. Putting a prefix before them would write all
of them anew at every step. Here both are read where they are: one softmax over the scores of both,
and the values of each summed with its part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_UNSUPPORTED = ("position_bias", "softcap", "output_attentions")


def applies(function: Any, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether :func:`attend` computes what ``function`` would with these arguments."""
    return (
        function is sdpa_attention_forward
        and query.shape[2] == 1
        and query.dtype.itemsize >= 4  # scores are added up in it
        and not kwargs.get("dropout")
        and not any(kwargs.get(name) is not None for name in _UNSUPPORTED)
        and not torch.compiler.is_dynamo_compiling()
        and not torch.is_autocast_enabled(query.device.type)
    )


def attend(
    query: Tensor,
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Return softmax(s·q [K₁; K₂]ᵀ + mask) [V₁; V₂].

    Args:
        query: ``[B, h, 1, d]``.
        first: K₁ and V₁ ``[B, kv, k, d]``, of which V₁ may be of another width; h / kv heads of
            queries have one head of keys.
        second: K₂ and V₂ ``[B, kv, n, d]``.
        mask: ``[B or 1, h or 1, 1, k + n]``, bool (True is seen) or added to the scores.
        scaling: s; None: 1/√d.

    Returns:
        ``[B, 1, h, d]``, as wide as the values.
    """
    batch, heads, _, width = query.shape
    kv, count = first[0].shape[1:3]
    q = query.reshape(batch, kv, heads // kv, width)  # the heads that share keys side by side
    q = q * (width**-0.5 if scaling is None else scaling)
    scores = torch.cat([q @ keys.mT for keys, _ in (first, second)], -1)  # [B, kv, h / kv, k + n]
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.reshape(len(mask), kv, heads // kv, -1)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
    of_first, of_second = scores.softmax(-1).split([count, second[0].shape[2]], -1)
    out = of_first @ first[1] + of_second @ second[1]  # [B, kv, h / kv, d]
    return out.view(batch, 1, heads, out.shape[-1])
