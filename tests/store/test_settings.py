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
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    EsmConfig,
    EsmModel,
    T5Config,
    T5ForConditionalGeneration,
)

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


class Coded(nn.Module):
    """A layer with a buffer of whole numbers, that begins somewhere."""

    def __init__(self, dtype: torch.dtype = torch.uint8, first: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.drop_first = first  # no rate
        self.register_buffer("code", torch.tensor([200], dtype=torch.uint8).view(dtype))


def doubled() -> nn.Module:
    """Make layers of which some run twice."""
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    return model.append(model[0]).append(model[1])


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
    "other numbers of the same bytes": (Coded, lambda: Coded(torch.int8)),
    "where something begins": (Coded, lambda: Coded(first=3)),
    "layers that run twice": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), doubled),
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


def test_what_changes_between_two_loads_is_seen(tmp_path: Path) -> None:
    one, other = hosts_of(lambda: Net(1), lambda: Net(1))
    folder = saved(one, tmp_path / "a")
    for change, back in (
        (lambda m: setattr(m, "value", 2), lambda m: setattr(m, "value", 1)),
        (lambda m: setattr(m, "value", [1]), lambda m: setattr(m, "value", 1)),
        (
            lambda m: setattr(m.first, "out_features", 5),
            lambda m: setattr(m.first, "out_features", 4),
        ),
    ):
        other.load(folder, name="b")
        other.remove("b")
        change(other.model)
        with pytest.raises(mg.ModgraftError, match="trained in another host"):
            other.load(folder, name="b")
        back(other.model)
    other.load(folder, name="b")


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
    with pytest.warns(UserWarning, match=r"the setting Net.value .*run 1.* there, .*run 2.* here"):
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
    said = (
        r"the setting BigBirdLayer.attention_type \(.*original_full.* there, .*block_sparse.* here"
    )
    with pytest.warns(UserWarning, match=said):
        fresh.load(ran.save("a", tmp_path / "a"), strict=False)


def test_a_host_that_was_compiled_is_the_same(tmp_path: Path) -> None:
    plain, other = hosts_of(lambda: Net(1), lambda: Net(1))
    compiled = mg.Host(torch.compile(other.model, backend="eager"))
    folder = saved(plain, tmp_path / "a")
    compiled.load(folder)
    other = hosts_of(lambda: Net(1))[0]
    other.load(compiled.save("a", tmp_path / "b"))


def test_a_weight_in_the_place_of_another_is_read(tmp_path: Path) -> None:
    """It has the address of the former one, as a freed one's is taken again, and was not written
    to."""
    memory = np.full(4000, 0.5, dtype=np.float32)
    host = hosts_of(lambda: nn.Sequential(nn.Linear(4, 4), Net(1)))[0]
    weight = torch.frombuffer(memory, dtype=torch.float32)
    host.model[1].more = nn.Parameter(weight, requires_grad=False)
    folder = saved(host, tmp_path / "a")
    host.load(folder, "b")
    host.model[1].more = nn.Parameter(weight.clone(), requires_grad=False)
    host.load(folder, "c")
    memory[3:400] = 1.5
    again = torch.frombuffer(memory, dtype=torch.float32)
    assert again.data_ptr() == weight.data_ptr()
    host.model[1].more = nn.Parameter(again, requires_grad=False)
    with pytest.raises(mg.ModgraftError, match="weights differ"):
        host.load(folder, "d")


def test_tables_that_are_one_layer_or_three_are_the_same(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.resize_token_embeddings(52, mean_resizing=False)
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at="query")
    host.save("a", tmp_path / "a")
    host.merge(None).save_pretrained(tmp_path / "host")
    mg.Host(T5ForConditionalGeneration.from_pretrained(tmp_path / "host")).load(tmp_path / "a")


def test_a_host_made_in_inference_mode_is_read(tmp_path: Path) -> None:
    with torch.inference_mode():
        one, other = hosts_of(lambda: Net(1), lambda: Net(1))
        with torch.no_grad():
            folder = saved(one, tmp_path / "a")
            other.load(folder)
    changed = hosts_of(lambda: Net(1))[0]
    with torch.no_grad():
        changed.model.first.bias[2] = 7
    with pytest.raises(mg.ModgraftError, match="weights differ"):
        changed.load(folder)


def test_a_weight_that_is_made_of_others_is_read(tmp_path: Path) -> None:
    hosts = hosts_of(lambda: Net(1), lambda: Net(1), lambda: Net(1))
    for host, value in zip(hosts, (1.0, 1.0, 2.0), strict=True):
        two = TwoTensor(torch.ones(3), torch.full((3,), value))
        host.model.more = nn.Parameter(two, requires_grad=False)
    folder = saved(hosts[0], tmp_path / "a")
    hosts[1].load(folder)
    with pytest.raises(mg.ModgraftError, match="weights differ"):
        hosts[2].load(folder)


@pytest.mark.parametrize("kind", ["bits8", "complex64", "mkldnn"])
def test_odd_tensors_are_read(kind: str, tmp_path: Path) -> None:
    def host() -> mg.Host:
        one = hosts_of(lambda: Net(1))[0]
        odd = torch.ones(4).to_mkldnn() if kind == "mkldnn" else torch.zeros(4).to(torch.uint8)
        odd = odd if kind == "mkldnn" else odd.repeat(8).view(getattr(torch, kind))
        one.model.register_buffer("odd", odd)
        return one

    host().load(saved(host(), tmp_path / "a"))
