"""A save in another tool's format leaves the old module or the new one, whole.

``KILLS`` says how many saves are killed at random moments.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_adapterhub_format import FOLDER, model
from transformers import BertConfig, BertForSequenceClassification, BertModel

import modgraft as mg
from modgraft.core.errors import CheckpointError
from modgraft.core.files import locked
from modgraft.store.formats.base import NAMES
from modgraft.store.formats.peft import read

KILLS = int(os.environ.get("KILLS", "20"))
IDS = torch.arange(5, 15).view(2, 5)


def host(what: str) -> mg.Host:
    if what == "fusion":
        return mg.Host(model("gpt2"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=20,
    )  # fmt: skip
    return mg.Host((BertForSequenceClassification if what == "head" else BertModel)(config)).eval()


def out(host: mg.Host) -> torch.Tensor:
    with torch.no_grad():
        return host(IDS)[0]


def one_and_two(what: str, folder: Path) -> tuple[list[Callable[[], Path]], list[torch.Tensor]]:
    """Return what saves two versions, which differ in tensors and options, and their outputs."""
    saves, outputs = [], []
    for version in (1, 2):
        made = host(what)
        if what == "fusion":
            made.load(FOLDER / "saved" / "fusion" / "gpt2")
        else:
            made.implant("f", mg.LoRA(rank=2, alpha=4 * version), at="query")
        if what == "head":
            made.model.classifier.requires_grad_(True)
        with torch.no_grad():
            for p in (*made.implants.parameters(), *made.model.parameters()):
                if p.requires_grad:
                    p.normal_(0, 0.4 * version)
        names = "m_n" if what == "fusion" else "f"
        form = "peft" if what == "peft" else "adapterhub"
        saves.append(partial(made.save, names, folder, format=form))
        outputs.append(out(made))
    return saves, outputs


def version(folder: Path, outputs: list[torch.Tensor], what: str) -> int:
    """Return which version is in a folder, which is whole."""
    here = host(what)
    here.load(folder)
    [found] = [n for n, o in enumerate(outputs, 1) if torch.allclose(out(here), o, atol=1e-5)]
    return found


def forked(work: Callable[[], object], steps: int = 0, seconds: float = 0) -> int:
    """Work in a child, which is killed at a step that Python takes in the file system, or then."""
    if not (child := os.fork()):

        def step(event: str, _: object) -> None:
            nonlocal steps
            if event in {"tempfile.mkstemp", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}:
                steps -= 1
                if not steps:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(step)
        try:
            while True:
                work()
                if not seconds:
                    os._exit(0)
        finally:
            os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(("what", "every"), [("peft", 1), ("fusion", 3)])
def test_a_kill_at_each_step_of_a_save(what: str, every: int, tmp_path: Path) -> None:
    folder, seen, status = tmp_path / "f", [], -1
    (old, new), outputs = one_and_two(what, folder)
    while status:
        old()  # also after a kill
        status = forked(new, every * len(seen) + 1)
        seen.append(version(folder, outputs, what))
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("what", NAMES)
def test_a_first_save_that_is_killed(what: str, tmp_path: Path) -> None:
    """The next one goes through, whatever is left of it."""
    status, steps = -1, 0
    while status:
        steps += 1
        folder = tmp_path / str(steps)
        (_, new), outputs = one_and_two(what, folder)
        status = forked(new, steps)
        if not status:
            assert version(folder, outputs, what) == 2
        new()
        assert version(folder, outputs, what) == 2


@pytest.mark.parametrize("what", ["peft", "head"])
def test_kills_at_random_moments(what: str, tmp_path: Path) -> None:
    draw, folder = random.Random(0), tmp_path / "f"
    (old, new), outputs = one_and_two(what, folder)
    old()
    for _ in range(KILLS):
        status = forked(lambda: (new(), old()), seconds=draw.uniform(0.002, 0.05))
        assert status == signal.SIGKILL
        version(folder, outputs, what)


@pytest.mark.parametrize("what", ["peft", "adapterhub", "head", "fusion"])
def test_a_full_disk(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (old, new), outputs = one_and_two(what, folder)
    old()
    (folder / "mine.txt").write_text("a user's own")
    there = sorted(folder.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 500):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(mg.ModgraftError, match="what was there is as it was"):
                new()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(folder.rglob("*")) == there
        assert version(folder, outputs, what) == 1
    new()
    assert version(folder, outputs, what) == 2
    assert sorted(folder.rglob("*")) == there


@pytest.mark.parametrize("what", NAMES)
def test_two_processes_save_to_one_place(what: str, tmp_path: Path) -> None:
    (old, new), outputs = one_and_two(what, tmp_path)
    with locked(tmp_path), pytest.raises(mg.ModgraftError, match="another process is writing"):
        new()
    old()
    (tmp_path / "adapter_config.json").chmod(0o640)
    with locked(tmp_path), pytest.raises(mg.ModgraftError, match="another process is writing"):
        new()
    assert version(tmp_path, outputs, what) == 1
    new()
    assert (tmp_path / "adapter_config.json").stat().st_mode & 0o777 == 0o640


def test_a_save_while_a_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old, new), outputs = one_and_two("peft", tmp_path)
    old()
    opened = read.TensorFile
    monkeypatch.setattr(read, "TensorFile", lambda path: (new(), opened(path))[1])
    with pytest.raises(CheckpointError, match="was written to while it was read; load it again"):
        host("peft").load(tmp_path)
    monkeypatch.undo()
    assert version(tmp_path, outputs, "peft") == 2


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_a_folder_in_the_place_of_a_file(name: str, tmp_path: Path) -> None:
    (_, new), _ = one_and_two("adapterhub", tmp_path)
    (tmp_path / "head_config.json").write_text("{}")
    (tmp_path / "model_head.safetensors").write_text("")
    (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    (_, new), _ = one_and_two("head", tmp_path)
    with pytest.raises(mg.ModgraftError, match=f"{name} is a folder"):
        new()
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_left_without_its_options_is_named(tmp_path: Path) -> None:
    (old, _), _ = one_and_two("peft", tmp_path)
    old()
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read .*not there"):
        host("peft").load(tmp_path)
