"""A small T5 of transformers, to train from scratch."""

from __future__ import annotations

import torch
from transformers import T5Config, T5ForConditionalGeneration


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
