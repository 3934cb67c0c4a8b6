"""Small hosts that a method is tried on: an encoder, a decoder, both together, and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from modgraft.computation.base import Computation, FunctionComposition
from modgraft.core.sites import At

WIDTH, WORDS, EXAMPLES = 16, 41, 3
VOCAB: dict[str, Any] = {"vocab_size": WORDS}
STARTED: dict[str, Any] = {**VOCAB, "decoder_start_token_id": 0}
SPECIAL: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


class SmallCNN(nn.Module):
    """Two convolutions, then each place of the map as a token, and a linear head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return ``[B, 4]`` for ``[B, 3, H, W]``."""
        h = self.conv(torch.tanh(self.stem(pixel_values)))  # [B, 3, H, W] → [B, C, H, W]
        tokens = torch.tanh(h).flatten(2).transpose(1, 2)  # [B, HW, C]
        return self.head(torch.tanh(self.mix(tokens)).mean(dim=1))


def small_t5(layers: int = 2) -> nn.Module:
    """Return an encoder-decoder with relative positions, two heads of eight."""
    return T5ForConditionalGeneration(
        T5Config(
            **STARTED,
            d_model=WIDTH,
            d_kv=8,
            d_ff=24,
            num_layers=layers,
            num_heads=2,
            dropout_rate=0.0,
        )
    )


def small_bert(layers: int = 2) -> nn.Module:
    """Return an encoder with separate projections of query, key and value."""
    return BertForMaskedLM(
        BertConfig(
            **VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def small_gpt2(layers: int = 2) -> nn.Module:
    """Return a decoder whose query, key and value are one projection, stored inputs first."""
    return GPT2LMHeadModel(
        GPT2Config(
            **VOCAB,
            **SPECIAL,
            n_embd=WIDTH,
            n_layer=layers,
            n_head=2,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Make a model in evaluation, with weights so large that what changes them shows."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():  # the default initialisation is so small that nothing shows
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.1)
    return model


def ids(length: int = 7, seed: int = 1) -> Tensor:
    """Return words ``[3, length]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, WORDS, (EXAMPLES, length), generator=generator)


def padded_right(words: Tensor) -> dict[str, Tensor]:
    """Return a batch whose first text is two words shorter."""
    mask = torch.ones_like(words)
    mask[0, -2:] = 0
    return {"input_ids": words, "attention_mask": mask}


def padded_left() -> dict[str, Tensor]:
    """Return a batch whose first text is two words shorter, padded as for generation."""
    mask = torch.ones_like(ids())
    mask[0, :2] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pictures() -> dict[str, Tensor]:
    """Return pictures ``[3, 3, 8, 8]``."""
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(EXAMPLES, 3, 8, 8, generator=generator)}


@dataclass(frozen=True)
class SmallHost:
    """A small host: how it is made, a batch of three examples, and where methods go by kind."""

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    weights: At = ("query", "value")
    outputs: At = ("output", "down")
    generates: bool = False
    exact_in_half: bool = True

    def at(self, method: Computation) -> At | None:
        """Return where ``method`` goes, None where it goes by itself."""
        if method.unwrapped.default_at is not None:
            return None
        return self.outputs if isinstance(method.unwrapped, FunctionComposition) else self.weights


HOSTS = {
    "bert": SmallHost(small_bert, lambda: padded_right(ids())),
    "gpt2": SmallHost(small_gpt2, padded_left, generates=True),
    "t5": SmallHost(
        small_t5, lambda: {**padded_right(ids()), "labels": ids(5, 5)}, generates=True
    ),
    "cnn": SmallHost(
        SmallCNN, pictures, (nn.Conv2d, nn.Linear), "mix", exact_in_half=False
    ),
}  # fmt: skip
