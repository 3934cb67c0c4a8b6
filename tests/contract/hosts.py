"""The hosts of the contract suite: real transformers architectures, small, and a plain network."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import modgraft as mg
from modgraft.testing.hosts import SPECIAL, VOCAB, WIDTH, small_bert, small_gpt2, small_t5

DEVICE = torch.device(os.environ.get("MODGRAFT_TEST_DEVICE", "cpu"))  # make gpu sets it
FEATURES, BATCH = 6, 3


@dataclass(frozen=True)
class HostCase:
    """A host, a batch for it, and where modules go.

    ``lora_at`` and ``output_at`` select sites; ``output_at`` is one site whose output is
    ``[B, n, WIDTH]``. ``text`` says whether there is an input to put tokens before.

    ``adapter_at``: outputs ``[B, n, WIDTH]``, by default after attention and feed-forward (Houlsby
    et al.); ``parallel_at``: sites that take and give ``[B, n, WIDTH]``; ``keys_at`` and
    ``inner_at``: linear layers whose output or input IA³ scales; ``map_at``: a site whose output
    is a map ``[B, C, H, W]``, None where there is none; ``attention_at``: attention layers, or a
    layer that is none where the host has none. ``deep``: whether ``make(layers)`` takes a number.
    """

    name: str
    make: Callable[..., nn.Module]
    make_batch: Callable[[], dict[str, Any]]
    lora_at: Any
    output_at: str
    generates: bool = False
    text: bool = False
    adapter_at: Any = ("output", "down")
    parallel_at: Any = "feedforward"
    keys_at: Any = ("key", "value")
    inner_at: Any = "down"
    map_at: str | None = None
    attention_at: Any = "self_attention"
    deep: bool = False

    def batch(self) -> dict[str, Any]:
        return {key: value.to(DEVICE) for key, value in self.make_batch().items()}

    def seen(self) -> Tensor:
        """Return a mask [B, …], true at the outputs that are no padding."""
        batch = self.batch()
        if self.name in ("bert", "gpt2", "llama"):
            return batch["attention_mask"].bool()
        return torch.ones(BATCH, dtype=torch.bool)

    def model(self, seed: int = 0, shallow: bool = False) -> nn.Module:
        """Make the bare model, where ``shallow`` with a single layer if its layers are alike."""
        torch.manual_seed(seed)
        model = (self.make(1) if shallow and self.deep else self.make()).eval().to(DEVICE)
        with torch.no_grad():  # the default initialisation is so small that nothing shows
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.1)
        return model


def tensor_of(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def ids(length: int = 7, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 41, (BATCH, length), generator=generator).to(DEVICE)


def side(rows: int = BATCH, seed: int = 2, dtype: torch.dtype = torch.float32) -> mg.Side:
    """Make four feature vectors an example; example 1 has none, the last one only two."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 4, FEATURES, generator=generator, dtype=dtype)
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[1] = False
    mask[-1, 2:] = False
    return mg.Side(features, mask).to(DEVICE)


def _llama(layers: int = 2) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            **VOCAB,
            **SPECIAL,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def _vit(layers: int = 2) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)
    )


class SmallCNN(nn.Module):
    """Two convolutions, then each place of the map as a token, and a linear head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.conv(torch.tanh(self.stem(pixel_values)))  # [B, 3, H, W] → [B, C, H, W]
        tokens = torch.tanh(h).flatten(2).transpose(1, 2)  # [B, HW, C]
        return self.head(torch.tanh(self.mix(tokens)).mean(dim=1))


class SmallAttention(nn.Module):
    """An encoder layer, then four learned queries that attend to it and to the raw features."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(5, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
        self.latents = nn.Embedding(4, WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, 2, kdim=5, vdim=WIDTH, batch_first=True)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, features: Tensor, unseen: Tensor) -> Tensor:
        h = self.encoder(self.read(features), src_key_padding_mask=unseen)  # [B, n, d]
        rows = torch.arange(4, device=h.device).expand(h.shape[0], 4)
        read, _ = self.cross(self.latents(rows), features, h, key_padding_mask=unseen)  # [B, 4, d]
        return self.head(torch.tanh(self.mix(read)).mean(dim=1))


class SmallRNN(nn.Module):
    """Two layers of a bidirectional LSTM with projections, a GRU, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(41, WIDTH)
        self.lstm = nn.LSTM(
            WIDTH, 10, num_layers=2, bidirectional=True, proj_size=8, batch_first=True
        )
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        h, _ = self.lstm(self.words(input_ids))  # [B, n] → [B, n, d]
        return self.head(self.gru(h)[0])


def _pixels() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator)}


def _vectors() -> dict[str, Any]:
    return {"input": torch.randn(BATCH, 7, 5, generator=torch.Generator().manual_seed(4))}


def _padded_vectors() -> dict[str, Any]:
    unseen = torch.zeros(BATCH, 7, dtype=torch.bool)
    unseen[0, 5:] = True
    return {"features": _vectors()["input"], "unseen": unseen}


def _masked(values: Tensor) -> dict[str, Any]:
    mask = torch.ones_like(values)
    mask[0, -2:] = 0
    return {"input_ids": values, "attention_mask": mask}


def _decoder() -> dict[str, Any]:
    mask = torch.ones_like(ids())
    mask[0, :2] = 0  # padded on the left, as for generation
    return {"input_ids": ids(), "attention_mask": mask}


QV = ["query", "value"]
HOSTS = {
    case.name: case
    for case in (
        HostCase(
            "t5", small_t5, lambda: {**_masked(ids()), "labels": ids(5, 5)}, QV, "encoder.output",
            generates=True, text=True,
            deep=True,
        ),
        HostCase(
            "bert", small_bert, lambda: _masked(ids()), QV, "encoder.output", text=True,
            parallel_at="attention", deep=True,
        ),
        HostCase(
            "gpt2", small_gpt2, _decoder, QV, "decoder.output", generates=True, text=True,
            deep=True,
        ),
        HostCase(
            "llama", _llama, _decoder, QV, "decoder.output", generates=True, text=True, deep=True,
        ),
        HostCase(
            "vit", _vit, _pixels, QV, "encoder.output",
            map_at="*.patch_embeddings.projection", deep=True,
        ),
        HostCase(
            "plain", _plain, _vectors, nn.Linear, "2", adapter_at=["0", "2"], parallel_at="2",
            keys_at=nn.Linear, inner_at=nn.Linear, attention_at="2",
        ),
        HostCase(
            "cnn", SmallCNN, _pixels, [nn.Conv2d, nn.Linear], "mix", adapter_at="mix",
            parallel_at="mix", keys_at=["conv", "head"], inner_at=[nn.Conv2d, "mix"], map_at="conv",
            attention_at="mix",
        ),
        HostCase(
            "mha", SmallAttention, _padded_vectors,
            [
                "encoder.self_attn.in_proj_weight[0/3]", "encoder.self_attn.in_proj_weight[2/3]",
                "encoder.linear1", "cross.{q,k,v}_proj_weight", "*.out_proj",
            ],
            "encoder", adapter_at=["encoder.self_attn", "encoder.linear2", "cross"],
            parallel_at="encoder",
            keys_at=["encoder.self_attn.in_proj_weight[1/3]", "cross.{k,v}_proj_weight"],
            inner_at=["encoder.self_attn.out_proj", "encoder.linear2", "cross.k_proj_weight"],
            attention_at="cross",
        ),
        HostCase(
            "rnn", SmallRNN, lambda: {"input_ids": ids()},
            ["lstm.weight_{ih_l1_reverse,hr_l0}", "lstm.weight_hh_l0[1/4]", "gru.weight_*"],
            "gru", adapter_at=["lstm", "gru"], parallel_at="gru",
            keys_at=["lstm.weight_hr_l1", "gru.weight_ih_l0[2/3]"],
            inner_at=["lstm.weight_{ih,hh}_l0", "gru.weight_hh_l0[1/3]"], attention_at="gru",
        ),
    )
}  # fmt: skip
