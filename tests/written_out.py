"""Attention written out, query by query, for references: keys and values before a layer's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_PREPENDED = "written_out"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q [P_k; K]ᵀ s + b) [P_v; V]; the bias and the mask b are those of the own keys."""
    batch, heads, length, width = query.shape
    group, n = heads // key.shape[1], key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    bias = torch.zeros(batch, heads, length, n, dtype=query.dtype)
    for each in (attention_mask, position_bias):
        bias = bias if each is None else bias + each
    rows = []
    for b in range(batch):
        for h in range(heads):
            given = module.__dict__.get(_PREPENDED, [])
            K = torch.cat([*(keys[:, h // group] for keys, _, _ in given), key[b, h // group]])
            V = torch.cat([*(vals[:, h // group] for _, vals, _ in given), value[b, h // group]])
            for i in range(length):
                added = [
                    torch.zeros(len(keys), dtype=K.dtype) if more is None else more[h, i]
                    for keys, _, more in given
                ]
                scores = scale * K @ query[b, h, i] + torch.cat([*added, bias[b, h, i]])
                weights = (scores - scores.max()).exp()
                rows.append((weights / weights.sum()) @ V)
    out = torch.stack(rows).reshape(batch, heads, length, V.shape[1])
    return out.transpose(1, 2), None


AttentionInterface.register("written_out", _attention)
AttentionMaskInterface.register("written_out", eager_mask)


def prepend(
    model: nn.Module, path: str, keys: Tensor, values: Tensor, bias: Tensor | None = None
) -> None:
    """Let ``model`` compute its attention as above, with these ``[k, heads, d]`` at one layer,
    after those that are there, and ``bias`` ``[heads, q, k]`` added to their scores."""
    model.set_attn_implementation("written_out")  # type: ignore[operator]
    layer = model.get_submodule(path)
    layer.__dict__.setdefault(_PREPENDED, []).append((keys, values, bias))
