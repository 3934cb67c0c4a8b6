"""What is a setting of a host, what is its state, and what of it may differ."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BigBirdConfig, BigBirdModel, EsmConfig, EsmModel

import modgraft as mg

X = torch.ones(1, 4)


class Net(nn.Module):
    """A layer with a setting of any kind."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class Counting(Net):
    """A layer that counts in a function that its forward calls, and can be set otherwise."""

    def __init__(self) -> None:
        super().__init__(1)
        self.calls, self.scale, self.kept = 0, 1.0, []

    def forward(self, x: Tensor) -> Tensor:
        self._count()
        return self.scale * self.first(x)

    def _count(self) -> None:
        self.calls += 1
        self.kept.append(self.calls)

    def set_scale(self, scale: float) -> None:
        self.scale = scale


class Sparse(nn.Module):
    """A graph's layer."""

    def __init__(self, scale: float = 1.0, persistent: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("adjacency", (scale * torch.eye(5)).to_sparse(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.first(x))


class Indexed(nn.Module):
    """A layer with a table of ids."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("ids", ids, persistent=False)


def quantised(bias: float) -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    nn.init.constant_(model[1].bias, bias)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def esm(dropped: bool) -> nn.Module:
    return EsmModel(
        EsmConfig(
            vocab_size=33, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, pad_token_id=1, mask_token_id=32, token_dropout=dropped,
            position_embedding_type="rotary",
        )
    )  # fmt: skip


IDS = torch.arange(50000)
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "nothing": (lambda: Net(None), lambda: Net(2.0)),
    "nothing and a tensor": (lambda: Net(None), lambda: Net(torch.ones(2))),
    "an empty list": (lambda: Net([]), lambda: Net([1])),
    "a namespace": (lambda: Net(argparse.Namespace(k=1)), lambda: Net(argparse.Namespace(k=2))),
    "an array": (lambda: Net(np.ones(2)), lambda: Net(np.zeros(2))),
    "a number of numpy": (lambda: Net(np.float32(1)), lambda: Net(np.float32(2))),
    "a NaN": (lambda: Net(torch.zeros(2)), lambda: Net(torch.tensor([0.0, float("nan")]))),
    "large ids": (lambda: Indexed(IDS), lambda: Indexed(torch.cat([IDS[:9], IDS[9:].flip(0)]))),
    "a sparse buffer": (Sparse, lambda: Sparse(2.0)),
    "a sparse table": (lambda: Sparse(1.0, False), lambda: Sparse(2.0, False)),
    "packed weights": (lambda: quantised(0.0), lambda: quantised(0.5)),
    "a switch called dropout": (lambda: esm(True), lambda: esm(False)),
}


def hosts_of(*makers: Callable[[], nn.Module]) -> list[mg.Host]:
    made = []
    for make in makers:
        torch.manual_seed(0)
        made.append(mg.Host(make().eval()))
    return made


def saved(host: mg.Host, folder: Path) -> Path:
    first = next(m for m in host.model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    path = next(name for name, module in host.model.named_modules() if module is first)
    host.implant("a", mg.LoRA(rank=1), at=path)
    return Path(host.save("a", folder))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_another_function_is_refused(pair: str, tmp_path: Path) -> None:
    one, other, again = hosts_of(*PAIRS[pair], PAIRS[pair][0])
    folder = saved(one, tmp_path / "a")
    again.load(folder)
    with pytest.raises(mg.ModgraftError, match="trained in another host"):
        other.load(folder)


@pytest.mark.parametrize(
    ("one", "other"), [("cuda:0", "cpu"), ("cpu", "meta"), (torch.device("cpu"), None)]
)
def test_a_device_is_no_setting(one: object, other: object, tmp_path: Path) -> None:
    first, second = hosts_of(lambda: Net(one), lambda: Net(other))
    second.load(saved(first, tmp_path / "a"))


@pytest.mark.parametrize("times", [0, 2])
def test_a_host_that_ran_before_is_the_same(times: int, tmp_path: Path) -> None:
    first, fresh = hosts_of(Counting, Counting)
    for _ in range(times):
        first(X)
    folder = saved(first, tmp_path / "a")
    fresh.load(folder)
    first.remove("a")
    first(X)
    mg.Host(copy.deepcopy(first.model)).load(folder)
    mg.Host(first.merge(None)).load(folder)
    fresh.remove("a")
    fresh.model.set_scale(2.0)  # which nothing that runs does
    with pytest.raises(mg.ModgraftError, match=r"settings: Counting.scale .*strict=False"):
        fresh.load(folder)


def test_what_no_class_of_torch_holds_may_differ_if_that_is_asked_for(tmp_path: Path) -> None:
    one, other = hosts_of(lambda: Net("run 1"), lambda: Net("run 2"))
    folder = saved(one, tmp_path / "a")
    other.load(folder, strict=False)
    torchs = hosts_of(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=0.1)))[0]
    changed = hosts_of(lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=0.2)))[0]
    folder = saved(torchs, tmp_path / "b")
    with pytest.raises(mg.ModgraftError, match=r"LayerNorm.eps .*trained in$"):
        changed.load(folder, strict=False)


def test_a_host_that_changes_its_parts_as_it_runs_can_be_asked_for(tmp_path: Path) -> None:
    config = BigBirdConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, block_size=4, num_random_blocks=1,
    )  # fmt: skip
    ran, fresh = hosts_of(lambda: BigBirdModel(config), lambda: BigBirdModel(config))
    ran(input_ids=torch.randint(5, 40, (1, 9)))  # too short for blocks
    ran.implant("a", mg.LoRA(rank=1), at="query")
    fresh.load(ran.save("a", tmp_path / "a"), strict=False)


def test_a_host_that_was_compiled_is_the_same(tmp_path: Path) -> None:
    plain, other = hosts_of(lambda: Net(1), lambda: Net(1))
    compiled = mg.Host(torch.compile(other.model, backend="eager"))
    folder = saved(plain, tmp_path / "a")
    compiled.load(folder)
    other = hosts_of(lambda: Net(1))[0]
    other.load(compiled.save("a", tmp_path / "b"))
