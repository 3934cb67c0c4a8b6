"""Hosts of the same weights that compute another function are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import modgraft as mg


class Acting(nn.Module):
    """A layer with a function that is no layer."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.first(x))


def line(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), layers[0], nn.Linear(4, 4), layers[1])


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "activations": (lambda: line(nn.ReLU(), nn.Tanh()), lambda: line(nn.Tanh(), nn.ReLU())),
    "settings": (
        lambda: line(nn.LayerNorm(4, eps=1e-1), nn.LayerNorm(4, eps=1e-5)),
        lambda: line(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-1)),
    ),
    "functions": (lambda: Acting(torch.relu), lambda: Acting(torch.tanh)),
}


@pytest.mark.parametrize("pair", list(PAIRS))
def test_the_same_settings_at_other_places(tmp_path: Path, pair: str) -> None:
    def host(make: Callable[[], nn.Module]) -> mg.Host:
        torch.manual_seed(0)
        return mg.Host(make())

    one, other = PAIRS[pair]
    saved = host(one)
    saved.implant("a", mg.LoRA(rank=1), nn.Linear)
    saved.save("a", tmp_path / "a")
    with pytest.raises(mg.ModgraftError, match="differ"):
        host(other).load(tmp_path / "a")
    host(one).load(tmp_path / "a")


def bert(**settings: Any) -> mg.Host:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    host = mg.Host(BertModel(BertConfig(**size, intermediate_size=24, vocab_size=30)))
    host.implant("qa", mg.LoRA(rank=2, **settings), at=["query", "value"])
    return host


@pytest.mark.parametrize("format", ["peft", "adapterhub"])
def test_a_weighted_composition_has_no_place_elsewhere(tmp_path: Path, format: str) -> None:
    host = bert()
    host.use("0.5*qa")
    with pytest.raises(mg.ModgraftError, match="no place for the composition in force"):
        host.save(None, tmp_path / "all", format=format)
    host.use("qa")
    host.save(None, tmp_path / "all", format=format)


def test_patterns_of_lora_are_not_dropped(tmp_path: Path) -> None:
    host = bert(alpha_pattern={"*layer.0.*": 8.0})
    with pytest.raises(mg.ModgraftError, match="alpha_pattern"):
        host.save("qa", tmp_path / "qa", format="adapterhub")
