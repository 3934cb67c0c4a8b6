"""A small T5 to train from scratch, and an initialisation from which it can copy."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention


def small_t5(
    vocab_size: int,
    pad_id: int = 0,
    eos_id: int = 1,
    *,
    d_model: int = 128,
    d_ff: int = 256,
    heads: int = 4,
    layers: int = 2,
    decoder_layers: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> T5ForConditionalGeneration:
    """Create a `transformers.T5ForConditionalGeneration` with random weights.

    Args:
        vocab_size: The number of tokens.
        pad_id: The id of padding, which is also the decoder's start.
        eos_id: The id of the end token.
        d_model: The width; each of the `heads` heads is `d_model / heads` wide.
        d_ff: The width of the feed-forward layers.
        layers: The number of encoder layers, and of decoder layers unless `decoder_layers` is set.
        dropout: The dropout probability.
        seed: The seed of the weights; the global random state does not change.

    Raises:
        ValueError: `d_model` is not a multiple of `heads`.
    """
    if d_model % heads:
        raise ValueError(f"small_t5: d_model={d_model} is not a multiple of heads={heads}")
    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_model // heads,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers if decoder_layers is None else decoder_layers,
        num_heads=heads,
        dropout_rate=dropout,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
    )
    config.decoder_start_token_id = pad_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config)


def copy_init(
    model: T5ForConditionalGeneration,
    *,
    match: float = 8.0,
    offsets: tuple[int, ...] = (-1, 1),
    decoder_offsets: tuple[int, ...] = (-1,),
    strength: float = 6.0,
    seed: int = 0,
) -> T5ForConditionalGeneration:
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
        model: Any T5ForConditionalGeneration, usually from `small_t5`.
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
    d_kv = model.config.d_kv
    with torch.no_grad():
        for stack, shifts in ((model.encoder, offsets), (model.decoder, decoder_offsets)):
            own = [m for n, m in _attentions(stack) if n.endswith("SelfAttention")]
            for _, attention in _attentions(stack):
                _set_copy_weights(attention, match, generator)
            for attention in own:
                attention.q.weight[: d_kv * len(shifts)] *= 0.1
                attention.k.weight[: d_kv * len(shifts)] *= 0.3
            # the first block's bias is used in all blocks
            bias = own[0].relative_attention_bias.weight
            for head, offset in enumerate(shifts):
                bucket = _bucket(offset, bias.shape, head, two_sided=stack is model.encoder)
                bias[:, head] = 0.0
                bias[bucket, head] = strength
    return model


def _attentions(stack: nn.Module) -> list[tuple[str, T5Attention]]:
    return [(name, m) for name, m in stack.named_modules() if isinstance(m, T5Attention)]


def _set_copy_weights(attention: T5Attention, match: float, generator: torch.Generator) -> None:
    """Set the projections of a T5Attention, each [heads * d_kv, d_model] or its transpose."""
    rows = torch.empty_like(attention.q.weight)
    nn.init.orthogonal_(rows, generator=generator)
    # |P_h x|² is d_kv where |x|² is d_model, for each head h
    rows *= math.sqrt(match / attention.key_value_proj_dim)
    attention.q.weight.copy_(rows)
    attention.k.weight.copy_(rows)
    nn.init.orthogonal_(rows, generator=generator)
    attention.v.weight.copy_(rows)
    attention.o.weight.copy_(rows.T)


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
