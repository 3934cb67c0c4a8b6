"""Hosts of the same weights that compute another function are told apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


class Holding(nn.Module):
    """A layer with settings of every kind."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Buffered(Holding):
    """A layer with a buffer that no state dict has."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", value, persistent=False)


class Running(Holding):
    """A layer that keeps a cache, a counter and what it saw, as some hosts do, and a setting."""

    def __init__(self, power: int = 2) -> None:
        super().__init__(power=power)
        self.cache: dict[int, Tensor] = {}
        self.maps: list[Tensor] = []
        self.calls, self.last = 0, None
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.cache[len(x)] = x
        self.maps.append(x)
        self.seen.copy_(x[0])
        return self.first(x) ** self.power


@dataclass
class Size:
    scale: float


def line(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), layers[0], nn.Linear(4, 4), layers[1])


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "activations": (lambda: line(nn.ReLU(), nn.Tanh()), lambda: line(nn.Tanh(), nn.ReLU())),
    "settings": (
        lambda: line(nn.LayerNorm(4, eps=1e-1), nn.LayerNorm(4, eps=1e-5)),
        lambda: line(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-1)),
    ),
    "functions": (lambda: Acting(torch.relu), lambda: Acting(torch.tanh)),
    "parts of functions": (
        lambda: Acting(partial(torch.add, other=1)), lambda: Acting(partial(torch.add, other=2))
    ),
    "lists": (lambda: Holding(scales=[1, 2]), lambda: Holding(scales=[1, 3])),
    "dictionaries": (lambda: Holding(of={"a": [1.0]}), lambda: Holding(of={"a": [1.5]})),
    "objects": (lambda: Holding(of=Size(1.0)), lambda: Holding(of=Size(2.0))),
    "tensors": (lambda: Holding(scale=torch.ones(3)), lambda: Holding(scale=torch.ones(3) * 1.001)),
    "tensors in lists": (
        lambda: Holding(of=[torch.arange(3)]), lambda: Holding(of=[torch.arange(1, 4)])
    ),
    "buffers": (lambda: Buffered(torch.tensor(2.0)), lambda: Buffered(torch.tensor(2.001))),
    "masks": (
        lambda: Buffered(torch.ones(9, 9).tril().log()),
        lambda: Buffered(torch.ones(9, 9).tril(-1).log()),
    ),
}  # fmt: skip


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


VALUES = ("tensors", "tensors in lists", "buffers", "masks", "lists", "dictionaries", "objects")


@pytest.mark.parametrize("pair", VALUES)
def test_what_layers_hold_can_be_overridden_as_weights_can(tmp_path: Path, pair: str) -> None:
    hosts = []
    for make in PAIRS[pair]:
        torch.manual_seed(0)
        hosts.append(mg.Host(make()))
    hosts[0].implant("a", mg.LoRA(rank=1), nn.Linear)
    hosts[0].save("a", tmp_path / "a")
    with pytest.raises(mg.ModgraftError, match=r"\(held: \w+ differ.*strict=False"):
        hosts[1].load(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"another host .*\(\w+, which a layer holds\)\. Make"):
        hosts[1].load(tmp_path / "a", strict=False)


@pytest.mark.parametrize("runs", [(1, 0), (0, 1), (1, 2)])
def test_state_is_no_setting(tmp_path: Path, runs: tuple[int, int]) -> None:
    hosts = []
    for times in runs:
        torch.manual_seed(0)
        hosts.append(mg.Host(nn.Sequential(Running())))
        for n in range(times):
            hosts[-1](torch.randn(2 + n, 4))
    hosts[0].implant("a", mg.LoRA(rank=1), nn.Linear)
    hosts[0].save("a", tmp_path / "a")
    hosts[1].load(tmp_path / "a")
    torch.manual_seed(0)
    with pytest.raises(mg.ModgraftError, match=r"Running.power \(\['2'\] there, \['3'\] here\)"):
        mg.Host(nn.Sequential(Running(3))).load(tmp_path / "a")
    torch.manual_seed(0)
    edited = mg.Host(nn.Sequential(Running()))
    edited.model[0].power = 4  # which its own code never does
    with pytest.raises(mg.ModgraftError, match=r"Running.power \(\['2'\] there, \['4'\] here\)"):
        edited.load(tmp_path / "a")


def test_what_is_computed_anew_may_differ_in_its_last_bits(tmp_path: Path) -> None:
    """Another processor, or a host that was cast, has nearly the same tables."""
    table = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    hosts = []
    for value in (table, table * (1 + 1e-7), table.bfloat16()):
        torch.manual_seed(0)
        hosts.append(mg.Host(Buffered(value)))
    hosts[0].implant("a", mg.LoRA(rank=1), nn.Linear)
    hosts[0].save("a", tmp_path / "a")
    for host in hosts[1:]:
        host.load(tmp_path / "a")


def test_a_write_that_is_not_counted_is_seen_when_all_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    host = mg.Host(nn.Sequential(nn.Linear(64, 64)))
    host.implant("a", mg.LoRA(rank=1), nn.Linear)
    host.save("a", tmp_path / "a")
    host.load(tmp_path / "a", "b")
    host.model[0].weight.data[5, 5] += 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60)
    with pytest.raises(mg.ModgraftError, match="weights differ"):
        host.load(tmp_path / "a", "c")


def bert(**settings: Any) -> mg.Host:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    host = mg.Host(BertModel(BertConfig(**size, intermediate_size=24, vocab_size=30)))
    host.implant("qa", mg.LoRA(rank=2, **settings), at=["query", "value"])
    return host


@pytest.mark.parametrize("format", ["peft", "adapterhub"])
@pytest.mark.parametrize(
    "composition", ["0.5*qa", ["qa", None, "0.3*qa"], mg.Weighted(("qa",), torch.ones(3, 1))]
)
def test_a_weighted_composition_has_no_place_elsewhere(
    tmp_path: Path, format: str, composition: Any
) -> None:
    host = bert()
    host.use(composition)
    with pytest.raises(mg.ModgraftError, match="no place for the composition in force"):
        host.save(None, tmp_path / "all", format=format)
    with pytest.raises(mg.ModgraftError, match=r"save a module by itself: host.save\('qa', …\)"):
        host.save(["qa"], tmp_path / "all", format=format)
    assert not (tmp_path / "all").exists()
    host.save("qa", tmp_path / "one", format=format)
    host.implant("b", mg.LoRA(rank=2), at="query", active=False)
    host.use("0.5*b + qa")
    host.save(["qa"], tmp_path / "part", format=format)  # which brings no composition with b
    host.remove("b")
    host.use("qa")
    host.save(None, tmp_path / "all", format=format)


def test_patterns_of_lora_are_not_dropped(tmp_path: Path) -> None:
    host = bert(alpha_pattern={"*layer.0.*": 8.0})
    with pytest.raises(mg.ModgraftError, match="alpha_pattern"):
        host.save("qa", tmp_path / "qa", format="adapterhub")
