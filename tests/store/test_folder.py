"""Folders of saved modules: every method can be loaded, and damaged folders are refused."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modgraft as mg
from common import forge
from contract.hosts import HOSTS, QV


def test_a_process_that_has_only_a_host_can_load_every_method() -> None:
    """A folder names its method as text, which is found although names are imported lazily."""
    public = {name: getattr(mg, name) for name in mg.__all__}
    methods = {
        k for k, v in public.items() if isinstance(v, type) and issubclass(v, mg.Computation)
    } - {"Computation"}
    code = (
        "import sys, modgraft; modgraft.Host\n"
        "from modgraft.core.config import Configured, resolve\n"
        "print(*[resolve(name, Configured).__name__ for name in sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, *sorted(methods)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(methods)


@pytest.mark.parametrize("folder", [123, None, b"qa", ["qa"], "q\0a", "file", "file/under"])
def test_what_is_no_folder_is_refused_by_name(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    host = mg.Host(torch.nn.Linear(2, 2))
    host.implant("qa", mg.LoRA(rank=1), at="")
    batch = {"input": torch.ones(1, 2)}
    calls = {
        "host.save": lambda: host.save("qa", folder),
        "host.load": lambda: host.load(folder),
        "fit(folder=)": lambda: host.fit([batch], train="qa", steps=1, folder=folder),
    }
    if folder is None:
        del calls["fit(folder=)"]  # which keeps nothing
    for what, call in calls.items():
        with pytest.raises(mg.ModgraftError, match=re.escape(what)):
            call()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_damaged_module_folders(tmp_path: Path) -> None:
    case = HOSTS["t5"]
    host = mg.Host(case.model())
    host.implant("qa", mg.LoRA(rank=2), at=QV)
    host.save("qa", tmp_path / "qa")
    weights = tmp_path / "qa" / "module.safetensors"
    whole = weights.read_bytes()
    fresh = mg.Host(case.model())
    for broken in (whole[:-40], b"", whole.replace(b'"F32"', b'"F3"', 1)):
        weights.write_bytes(broken)
        with pytest.raises(mg.ModgraftError, match="missing or cut"):
            fresh.load(tmp_path / "qa")
    with torch.no_grad():
        host["qa"].places[0].A[0, 0] = float("nan")
    host.save("qa", tmp_path / "qa")
    with pytest.raises(mg.ModgraftError, match="NaN or infinity"):
        fresh.load(tmp_path / "qa")
    forge(tmp_path / "qa", modules=[])
    with pytest.raises(mg.ModgraftError, match="not a module's card"):
        fresh.load(tmp_path / "qa")
    forge(tmp_path / "qa", format=3)
    with pytest.raises(mg.ModgraftError, match="format 3, this version reads 2"):
        fresh.load(tmp_path / "qa")
    with pytest.raises(mg.ModgraftError, match="no module in"):
        fresh.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep me")
    with pytest.raises(mg.ModgraftError, match="holds no module"):
        host.save("qa", tmp_path / "other")
    assert (tmp_path / "other" / "mine.txt").read_text() == "keep me"
    assert not list(fresh.implants)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def with_statistics(seed: int) -> nn.Module:
    """A network whose buffers have a precision too."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    model(torch.randn(5, 4))
    return model.eval()


PRECISIONS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("there", PRECISIONS, ids=str)
@pytest.mark.parametrize("here", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "statistics"])
def test_the_same_host_in_another_precision_is_called_that(
    tmp_path: Path, kind: str, there: torch.dtype, here: torch.dtype
) -> None:
    case = HOSTS["gpt2"]
    make, at = (case.model, QV) if kind == "gpt2" else (with_statistics, "0")
    exact = make(seed=0)
    host = mg.Host(copy.deepcopy(exact).to(there))
    host.implant("qa", mg.LoRA(rank=2), at=at)
    host.save("qa", tmp_path / "qa")
    fresh = mg.Host(copy.deepcopy(exact).to(here))
    if here == there:
        fresh.load(tmp_path / "qa")
        return
    halves = {here, there} == {torch.float16, torch.bfloat16}  # of one another they cannot be told
    says = "another host" if halves else "this host in another precision"
    with pytest.raises(
        mg.ModgraftError, match=rf"was trained in {says} \(weights(, buffers)? diff"
    ):
        fresh.load(tmp_path / "qa")
    warned = r"another host .*tensors: .+ by 0\.\d+ %.* on a few values of each"
    with pytest.warns(UserWarning, match=warned) if halves else nullcontext():
        fresh.load(tmp_path / "qa", strict=False)
    with pytest.raises(mg.ModgraftError, match="was trained in another host"):
        mg.Host(make(seed=5).to(here)).load(tmp_path / "qa")


@pytest.mark.parametrize("about", [{"metrics": {"f1": float("nan")}}, {"description": "\ud800"}])
def test_what_no_card_can_hold_is_refused(tmp_path: Path, about: dict[str, Any]) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4)))
    host.implant("a", mg.LoRA(rank=1), "0")
    with pytest.raises(mg.ModgraftError, match="cannot stand in a card"):
        host.save("a", tmp_path / "a", **about)
    assert not (tmp_path / "a").exists()


def test_a_state_dict_has_what_waits(tmp_path: Path) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4)))
    host.implant("a", mg.LoRA(rank=1), "0")
    host.save("a", tmp_path / "a")
    fresh = mg.Host(copy.deepcopy(nn.Sequential(nn.Linear(4, 4))))
    fresh.model.load_state_dict(nn.Sequential(host.model.get_submodule("0")).state_dict())
    with pytest.raises(mg.ModgraftError, match="joins no composition now; leave out active=True"):
        fresh.load(tmp_path / "a", lazy=True, active=True)  # type: ignore[call-overload]
    assert "a" not in fresh
    fresh.load(tmp_path / "a", lazy=True)
    assert fresh.state_dict().keys() == host.state_dict().keys()


def test_a_module_at_a_part_that_is_seen_at_work_loads(tmp_path: Path) -> None:
    """The host then runs while the limit to what a stranger's card may make is in force."""
    host = mg.Host(HOSTS["gpt2"].model(shallow=True))
    host.implant("m", mg.Adapter(reduction=2), at="transformer.drop")
    host.save("m", tmp_path)
    again = mg.Host(HOSTS["gpt2"].model(shallow=True))
    again.load(tmp_path, strict=False)
    assert list(again["m"].paths) == ["transformer.drop"]
