"""A place that cannot be written or read is named, with what to do, and nothing there is lost."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

import modgraft as mg
from modgraft.store.verify import verify


def fresh(width: int = 64) -> mg.Host:
    model = torch.nn.Sequential(torch.nn.Linear(width, width))
    torch.nn.init.constant_(model[0].weight, 0.5)
    torch.nn.init.zeros_(model[0].bias)
    return mg.Host(model)


def host(fill: float = 1.0) -> mg.Host:
    made = fresh()
    made.implant("qa", mg.LoRA(rank=64), at="0")
    for parameter in made["qa"].parameters():
        torch.nn.init.constant_(parameter, fill)
    return made


def refused(call: Callable[[], object], *says: str) -> None:
    """Check that an error of ours says what was wrong."""
    with pytest.raises(mg.ModgraftError) as error:
        call()
    for each in says:
        assert each in str(error.value)


def is_one(folder: Path) -> bool:
    """Return whether the module that was saved first is there, and nothing is left of others."""
    found = verify(folder)
    return found.whole and not found.problems and fresh().load(folder).places[0].A[0, 0].item() == 1


def elsewhere(call: Callable[[Path], None], folder: Path) -> None:
    """Run a check in a process of its own."""
    child = get_context("fork").Process(target=_checked, args=(call, folder))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _checked(call: Callable[[Path], None], folder: Path) -> None:
    code = 1
    try:
        call(folder)
        code = 0
    finally:
        traceback.print_exc()
        os._exit(code)  # and not through pytest


def no_room(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk does, a write only fails
    for size in (0, 100, 5000, 40_000):  # the card, the tensors; they have 33 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        if size < 33_000:
            refused(
                lambda: host(2.0).save("qa", folder), f"{folder} cannot be written", "make room"
            )
            refused(lambda: host(2.0).save("qa", folder / "new"), "cannot be written", "make room")
            assert not verify(folder / "new").names
            assert not [path for path in folder.iterdir() if path.suffix == ".part"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_disk(tmp_path: Path) -> None:
    folder = host().save("qa", tmp_path / "qa")
    elsewhere(no_room, folder)
    (folder / "new").rmdir()
    assert is_one(folder)


def no_permission(folder: Path) -> None:
    if os.getuid() == 0:
        os.setuid(12345)  # root may do everything
    refused(lambda: host(2.0).save("qa", folder / "readable"), "cannot be written", "permission")
    refused(lambda: host(2.0).save("qa", folder / "new"), "cannot be written", "permission")
    refused(lambda: host(2.0).save("qa", folder / "closed"), "closed", "ermission")
    refused(lambda: fresh().load(folder / "closed"), "closed", "ermission")
    refused(lambda: fresh().load(folder / "unreadable"), "cannot be read", "ermission")
    refused(lambda: fresh().load(folder / "closed" / "inside"), "closed", "ermission")
    assert "ermission" in verify(folder / "closed").problems[0]
    assert "ermission" in verify(folder / "unreadable").problems[0]
    assert fresh().load(folder / "readable").places[0].A[0, 0] == 1


def test_no_permission(tmp_path: Path) -> None:
    folders = [host().save("qa", tmp_path / name) for name in ("readable", "closed", "unreadable")]
    above = [path for path in tmp_path.parents if path.stat().st_uid == os.getuid()]
    before = {path: path.stat().st_mode for path in above if not path.stat().st_mode & 0o001}
    try:
        for path in before:
            path.chmod(0o755)  # pytest's own are closed to others
        tmp_path.chmod(0o555)
        folders[0].chmod(0o555)
        folders[1].chmod(0)
        (folders[2] / "module.safetensors").chmod(0)
        elsewhere(no_permission, tmp_path)
    finally:
        for path in (tmp_path, *folders):
            path.chmod(0o755)
        (folders[2] / "module.safetensors").chmod(0o644)
        for path, mode in before.items():
            path.chmod(mode)
    assert all(map(is_one, folders))


@pytest.mark.parametrize("name", ["../x", "a/b", "", "/", ".", "a\0b", "..\\x"])
def test_a_name_that_is_a_path(tmp_path: Path, name: str) -> None:
    folder = host().save("qa", tmp_path / "qa")
    other = fresh()
    refused(lambda: other.load(folder, name))
    refused(lambda: other.load(folder, name, lazy=True))
    refused(lambda: host(2.0).save(name, tmp_path / "new"))
    refused(lambda: other.implant(name, mg.LoRA(rank=1), at="0"))
    assert not other.implants
    assert [path.name for path in tmp_path.iterdir()] == ["qa"]
    assert is_one(folder)


def test_a_file_where_a_folder_would_be(tmp_path: Path) -> None:
    folder = host().save("qa", tmp_path / "qa")
    file = folder / "module.safetensors"
    for place in (file, file / "under"):
        refused(lambda place=place: host(2.0).save("qa", place), str(file), "is a file")
        refused(lambda place=place: fresh().load(place), str(file), "is a file")
    refused(lambda: host(2.0).save("qa", tmp_path / ("x" * 300)), "choose another")
    for name in ("module.safetensors", "module.json", "README.md"):
        there = host().save("qa", tmp_path / name)
        (there / name).unlink()
        (there / name / "mine").mkdir(parents=True)
        refused(
            lambda there=there: host(2.0).save("qa", there), str(there), "choose another folder"
        )
        assert (there / name / "mine").is_dir()
    assert is_one(folder)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    for name in ("module.safetensors", "adapter_model.bin", "module.bin", "pytorch_adapter.bin"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(pickle.dumps(Bad()))
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        refused(lambda folder=folder: fresh().load(folder), str(folder))
    folder = host().save("qa", tmp_path / "qa")
    (folder / "module.bin").write_bytes(pickle.dumps(Bad()))  # beside a module: not looked at
    assert is_one(folder)
    assert not (tmp_path / "ran").exists()


def test_a_host_of_another_size(tmp_path: Path) -> None:
    folder = host().save("qa", tmp_path / "qa")
    for strict in (True, False):
        other = fresh(width=32)
        for lazy in (True, False):
            refused(
                lambda o=other, s=strict, z=lazy: o.load(folder, strict=s, lazy=z),
                "another host",
                "shape",
            )
        assert "qa" not in other


def test_a_file_that_shrinks_while_it_waits(tmp_path: Path) -> None:
    """Whoever writes into the file itself, rather than replacing it, changes what is mapped."""
    folder, other = host().save("qa", tmp_path / "qa"), fresh()
    file = folder / "module.safetensors"
    content = file.read_bytes()
    other.load(folder, lazy=True)
    with file.open("rb+") as cut:
        cut.truncate(100)
    refused(lambda: other.use("qa"), str(folder), "copy the folder again")
    with file.open("rb+") as cut:
        cut.write(content[:-1] + b"\1")
    refused(lambda: other.use("qa"), str(folder), "hash")
    with file.open("rb+") as cut:
        cut.write(content)
    other.use("qa")
    again = fresh()
    again.load(folder, lazy=True)
    host(2.0).save("qa", folder)
    assert again["qa"].places[0].A[0, 0] == 1  # what was opened stays what it was
