"""Modules that are loaded with ``lazy=True``: what happens until their first use, and at it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from modgraft.core.errors import CheckpointError, ModgraftError


class Net(nn.Module):
    """A layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> SimpleNamespace:
        logits = self.head(self.l(x))
        return SimpleNamespace(loss=logits.square().mean(), logits=logits)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def fresh() -> mg.Host:
    return mg.Host(net())


def bundle(folder: Path) -> Path:
    host = fresh()
    host.implant("a", mg.LoRA(rank=2), at="l")
    host.implant("b", mg.LoRA(rank=2), at="head")
    return host.save(["a", "b"], folder, description="of several pages" * 999)


X = torch.ones(4, 8)


def test_one_of_several_that_wait_can_be_removed(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "both")
    for again in (False, True):
        host = fresh()
        host.load(folder, lazy=True)
        host.remove("a")
        if again:
            host.implant("a", mg.LoRA(rank=1), at="l")
        host.use("b")
        assert list(host.implants) == (["b", "a"] if again else ["b"])
        assert "a" in host if again else "a" not in host


def test_several_that_cannot_be_read_can_be_removed(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "both")
    file = folder / "module.safetensors"
    host = fresh()
    host.load(folder, lazy=True)
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    host.remove("a")
    with pytest.raises(CheckpointError, match="their hash is another one"):
        host.use("b")
    host.remove("b")
    assert "b" not in host


def test_what_trains_is_what_was_asked_for(tmp_path: Path) -> None:
    folder, flags = bundle(tmp_path / "both"), []
    for lazy in (False, True):
        host = fresh()
        host.load(folder, lazy=lazy)
        host.fit([{"x": X, "modules": "a"}], train="a", steps=1, progress=False)
        flags.append({n: p.requires_grad for n, p in host.named_parameters()})
    assert flags[0] == flags[1]


def test_a_module_that_waits_is_there_for_all(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "both")

    def waiting() -> mg.Host:
        host = fresh()
        host.load(folder, lazy=True)
        assert not host.implants
        return host

    host = waiting()
    assert "read at the first use: a, b" in repr(host)
    host.implant("m", mg.Mixture(["a", "b"], router=mg.Soft(level="token")), active=False)
    mg.own_module(waiting(), "a", into="z")
    equal = waiting()
    equal.load_state_dict(waiting().state_dict())
    plain = mg.Host(nn.Sequential(nn.Linear(8, 8)))
    plain.implant("a", mg.LoRA(rank=2), at="0")
    plain.save("a", tmp_path / "a")
    plain.remove("a")
    plain.load(tmp_path / "a", lazy=True)
    assert not plain.probe({"input": torch.randn(4, 8)}).faults
    saved = waiting()
    assert saved.save(saved["a"], tmp_path / "one").exists()


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_head_that_came_with_another_is_no_other_host(
    tmp_path: Path, lazy: bool, order: str
) -> None:
    for name, train in (("a", ["a"]), ("b", ["b", "host.head"])):
        host = fresh()
        host.implant(name, mg.LoRA(rank=2), at="l")
        host.fit([{"x": X}], train=train, steps=2, progress=False)
        host.save(name, tmp_path / name)
    host, bare = fresh(), net().state_dict()
    for name in order:
        host.load(tmp_path / name, lazy=lazy)
    host(X, modules=list("baab"))
    trained = host.model.head.weight.detach().clone()
    assert not torch.equal(trained, bare["head.weight"])
    host.remove("b")
    assert all(torch.equal(t, bare[n]) for n, t in host.model.state_dict().items())
    with torch.no_grad():
        host.model.l.weight.add_(1)
    with pytest.raises(ModgraftError, match="weights differ"):
        host.load(tmp_path / "a", "again")


def test_another_adapter_in_place_of_one_that_waits_is_refused(tmp_path: Path) -> None:
    """Its options were read, and its tensors are another's."""
    for alpha in (2, 9):
        options = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["l"])
        model = peft.get_peft_model(net(), options)  # type: ignore[arg-type]
        model.save_pretrained(str(tmp_path / f"{alpha}"))
    host = fresh()
    host.load(tmp_path / "2", "a", lazy=True)
    shutil.copytree(tmp_path / "9", tmp_path / "2", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="was written to since it was opened"):
        host.use("a")
    host.remove("a")
    host.load(tmp_path / "2", "a", lazy=True)
    host.use("a")


@pytest.mark.parametrize("then", ["put back", "removed"])
def test_a_file_that_was_cut_ends_no_process(tmp_path: Path, then: str) -> None:
    """Whatever was done to its name since, what is mapped lacks its end."""
    folder = bundle(tmp_path / "both")
    file = folder / "module.safetensors"
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from store.test_waiting import fresh
from modgraft.core.errors import CheckpointError
host = fresh()
host.load({str(folder)!r}, lazy=True)
data = open({str(file)!r}, "rb").read()
os.truncate({str(file)!r}, 100)
os.remove({str(file)!r})
if {then!r} == "put back":
    open({str(file)!r}, "wb").write(data)
try:
    host.use("a")
except CheckpointError as error:
    sys.exit("it no longer has" not in str(error))
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_read_whatever_the_default_device_is(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "both")
    host = fresh()
    with torch.device("meta"):
        host.load(folder)
    host(X, modules="a + b")


def test_a_composition_of_a_batch_stays_with_it(tmp_path: Path) -> None:
    host = mg.Host(fresh().model)
    host.load(bundle(tmp_path / "both"))
    for composition in (["a", None, "a + b"], mg.Weighted(["a", "b"], torch.ones(3, 2))):
        host.use(composition)
        host.save(None, tmp_path / "all")
        other = fresh()
        other.load(tmp_path / "all")
        assert list(other.implants) == ["a", "b"]
        assert other.composition is None


@pytest.mark.parametrize("active", [0, 1, "yes"])
def test_whether_a_module_is_active_is_yes_or_no(tmp_path: Path, active: object) -> None:
    host = fresh()
    with pytest.raises(ModgraftError, match=f"active={active!r} is none of True, False"):
        host.load(bundle(tmp_path / "both"), active=active)  # type: ignore[call-overload]
    assert not host.implants
