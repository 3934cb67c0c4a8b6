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
    """An unchanged `transformers.T5ForConditionalGeneration` of the given shape, with fresh
    weights.

    Args:
        vocab_size: number of tokens.
        pad_id: padding, also what the decoder starts from. eos_id: the end.
        d_model: width; each of the `heads` heads is `d_model / heads` wide.
        d_ff: width of the feed-forward layers.
        layers: encoder layers; the decoder has as many unless `decoder_layers` says otherwise.
        dropout: dropout probability, everywhere.
        seed: decides the weights; the global random state is left as it was.

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

    Every attention of the model starts out as a soft copy: a position attends to the positions that
    hold what it holds itself (a token, normalised to length sqrt(d_model), scores `match` with
    itself and about 0 with any other) and adds to itself what it found there (Uᵀ U of head h is
    the projection on a subspace of its own). The first heads of the self-attentions look at a
    neighbour instead: head i's relative position bias is `strength` at `offsets[i]` and 0
    elsewhere, and its W_q and W_k are made small. An offset and a match one after the other are
    an induction head: "7 K" in a table and a 7 just written give K. Without this start a small
    T5 takes long to find the first copy.

    Everything stays trainable; only the starting point is set, in place; returns `model`.

    Args:
        model: any T5ForConditionalGeneration, usually from `small_t5`.
        match: score (before the softmax) of a token with itself.
        offsets, decoder_offsets: relative positions of the offset heads (-1: the token before; the
            decoder sees no later ones).
        strength: bias at the offset.
        seed: decides P and U.

    Raises:
        ValueError: more offsets than heads, a decoder offset that is not negative, or an offset too
            far to have a bucket of its own in T5's relative position bias.

    Mimetic initialisation is Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention
    Layers"; induction heads are Olsson et al. 2022, "In-context Learning and Induction Heads".
    """
    generator = torch.Generator().manual_seed(seed)
    d_kv = model.config.d_kv
    with torch.no_grad():
        for stack, shifts in ((model.encoder, offsets), (model.decoder, decoder_offsets)):
            own = [m for n, m in _attentions(stack) if n.endswith("SelfAttention")]
            for _, attention in _attentions(stack):
                _copying(attention, match, generator)
            for attention in own:
                attention.q.weight[: d_kv * len(shifts)] *= 0.1
                attention.k.weight[: d_kv * len(shifts)] *= 0.3
            bias = own[0].relative_attention_bias.weight  # the first block's serves them all
            for head, offset in enumerate(shifts):
                bucket = _bucket(offset, bias.shape, head, two_sided=stack is model.encoder)
                bias[:, head] = 0.0
                bias[bucket, head] = strength
    return model


def _attentions(stack: nn.Module) -> list[tuple[str, T5Attention]]:
    return [(name, m) for name, m in stack.named_modules() if isinstance(m, T5Attention)]


def _copying(attention: T5Attention, match: float, generator: torch.Generator) -> None:
    """Set one T5Attention's four projections, each [heads * d_kv, d_model] or its transpose."""
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
    """The row of T5's relative position bias [buckets, heads] that stands for exactly `offset`."""
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
