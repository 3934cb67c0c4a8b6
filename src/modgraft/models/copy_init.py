"""An initialisation from which a T5 can copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from modgraft.core.sites import find

M = TypeVar("M", bound=PreTrainedModel)


def copy_init(
    model: M,
    *,
    match: float = 8.0,
    offsets: tuple[int, ...] = (-1, 1),
    decoder_offsets: tuple[int, ...] = (-1,),
    strength: float = 6.0,
    seed: int = 0,
) -> M:
    """W_q = W_k = sqrt(match / d_kv) P,  W_v = U,  W_o = Uᵀ;  P, U random with orthonormal rows.

    Every attention starts as a soft copy. A position attends to positions with the same token: a
    token, normalised to length sqrt(d_model), scores `match` with itself and about 0 with any
    other. It then adds what it finds there (Uᵀ U of each head is the projection on a different
    subspace). The first heads of each self-attention attend to a neighbour instead: head i's
    relative position bias is `strength` at `offsets[i]` and 0 elsewhere, and its W_q and W_k are
    small. A neighbour head followed by a copying head is an induction head: after "7 K" in a table,
    a 7 that was just written gives K. Without this start, a small T5 takes long to learn to copy.

    The weights are set in place and stay trainable.

    Args:
        model: Any T5, of transformers or :mod:`modgraft.models.t5`.
        match: The score, before the softmax, of a token with itself.
        offsets, decoder_offsets: The relative positions of the neighbour heads. -1 is the token
            before; the decoder sees no later ones.
        strength: The bias at the offset.
        seed: The seed of P and U.

    Returns:
        The same model.

    Raises:
        ValueError: There are more offsets than heads, a decoder offset is positive, or an offset is
            too large to have a separate bucket in T5's relative position bias.

    Mimetic initialisation is Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention
    Layers"; induction heads are Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [_layers(model, role) for role in ("query", "key", "value", "output")]
    heads = _bias(model).shape[1]
    own = [site.path for site in find(model, "self_attention")]
    with torch.no_grad():
        for path in layers[0]:
            _set_copy_weights([each[path] for each in layers], heads, match, generator)
        for stack, shifts in (("encoder", offsets), ("decoder", decoder_offsets)):
            bias = _bias(model.get_submodule(stack))
            some = len(shifts) * layers[0][own[0]].out_features // bias.shape[1]
            for path in own:
                if path.startswith(f"{stack}."):
                    layers[0][path].weight[:some] *= 0.1
                    layers[1][path].weight[:some] *= 0.3
            for head, offset in enumerate(shifts):
                bucket = _bucket(offset, bias.shape, head, two_sided=stack == "encoder")
                bias[:, head] = 0.0
                bias[bucket, head] = strength
    return model


def _layers(model: PreTrainedModel, role: str) -> dict[str, nn.Linear]:
    """Return the layers of a role, by the path of the attention that each is in."""
    return {site.path.rpartition(".")[0]: site.module for site in find(model, role)}  # type: ignore[misc]


def _bias(stack: nn.Module) -> torch.Tensor:
    """Return the relative position bias ``[buckets, heads]`` of a stack, which its blocks share."""
    names = ("relative_attention_bias", "bias.table")
    return next(m.weight for name, m in stack.named_modules() if name.endswith(names))  # type: ignore[return-value]


def _set_copy_weights(
    layers: Sequence[nn.Linear],
    heads: int,
    match: float,
    generator: torch.Generator,
) -> None:
    """Set query, key, value, output of an attention, [heads * d_kv, d_model] or its transpose."""
    query, key, value, output = layers
    rows = torch.empty_like(query.weight)
    nn.init.orthogonal_(rows, generator=generator)
    # |P_h x|² is d_kv where |x|² is d_model, for each head h
    rows *= math.sqrt(match / (len(rows) // heads))
    query.weight.copy_(rows)
    key.weight.copy_(rows)
    nn.init.orthogonal_(rows, generator=generator)
    value.weight.copy_(rows)
    output.weight.copy_(rows.T)


def _bucket(offset: int, shape: torch.Size, head: int, *, two_sided: bool) -> int:
    """Return the row of T5's relative position bias [buckets, heads] for exactly `offset`."""
    buckets, heads = shape
    side = buckets // 2 if two_sided else buckets
    if head >= heads:
        raise ValueError(f"copy_init: more offsets than the model's {heads} heads")
    if abs(offset) >= side // 2 or (offset > 0 and not two_sided):
        raise ValueError(
            f"copy_init: offset {offset} has no bucket of its own; the encoder takes "
            f"-{buckets // 4 - 1} to {buckets // 4 - 1}, the decoder -{buckets // 2 - 1} to 0"
        )
    return abs(offset) + (side if offset > 0 else 0)
