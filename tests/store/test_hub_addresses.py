"""Addresses: URLs of fsspec, folders, and what is fetched of them, whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import save_file

import modgraft as mg
from modgraft.core.errors import CheckpointError, MissingFileError
from modgraft.store.hub.address import find, name_of, pull
from modgraft.store.hub.hub import Hub
from modgraft.store.hub.remote import cache
from modgraft.store.verify import verify
from store.hub_cases import fill_of, saved, small_host


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def put(folder: Path, kind: str, tmp_path: Path) -> str:
    """Put a folder at a URL."""
    if kind == "file":
        return folder.as_uri()
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for path in folder.iterdir():
                archive.write(path, f"in/{path.name}")
        return f"zip://in::{(tmp_path / 'all.zip').as_uri()}"
    url = f"memory://{uuid.uuid4()}/in"
    system, root = fsspec.core.url_to_fs(url)
    for path in folder.iterdir():
        system.pipe_file(f"{root}/{path.name}", path.read_bytes())
    return url


@pytest.mark.parametrize("kind", ["file", "zip", "memory"])
def test_a_url_is_loaded(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "qa", 3.0)
    (folder / "setup.py").write_text("1 / 0")
    url = put(folder, kind, tmp_path)
    host = small_host()
    host.load(url)
    assert fill_of(host, "qa") == 3.0
    assert f"fetching {url}: module.safetensors, " in capsys.readouterr().err
    small_host().load(url + "/" if kind != "zip" else url)
    assert capsys.readouterr().err == ""  # by its hash, it is here
    assert [p.name for p in cache().rglob("*") if p.is_file()] == ["module.safetensors"]
    pull(find(url), tmp_path / "pulled")
    assert verify(tmp_path / "pulled").problems == []


def test_a_url_whose_module_changes_is_fetched_again(tmp_path: Path) -> None:
    url = put(saved(tmp_path / "one", 1.0), "memory", tmp_path)
    system, root = fsspec.core.url_to_fs(url)
    first = find(url)
    two = saved(tmp_path / "two", 2.0) / "module.safetensors"
    system.pipe_file(f"{root}/module.safetensors", two.read_bytes())
    second = find(url)
    assert first.sha256 != second.sha256
    system.pipe_file(f"{root}/module.safetensors", two.read_bytes()[:-1] + b"x")
    (second.folder / "module.safetensors").unlink()
    with pytest.raises(CheckpointError, match="were changed after they were written"):
        small_host().load(url)
    with pytest.raises(CheckpointError, match="it was changed"):
        pull(find(url), tmp_path / "pulled")
    assert not (tmp_path / "pulled" / "module.safetensors").exists()


def test_another_tools_folder_is_fetched_and_pulled_into_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(
        {"a": mg.Host(small_host().model).model[0].weight.detach()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    url = put(folder, "memory", tmp_path)
    found = find(url)
    assert (found.card, found.sha256) == (None, find(str(folder)).sha256)
    names = {"adapter_model.safetensors", "adapter_config.json"}
    assert {p.name for p in found.folder.iterdir()} == names
    assert found.folder.resolve().name == "in"  # by which its module is called
    pull(found, tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} == names
    with pytest.raises(mg.ModgraftError, match="is there and not empty; choose another"):
        pull(found, tmp_path / "new")


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(saved(tmp_path / "qa"), "memory", tmp_path)
    system: Any = fsspec.filesystem("memory")

    def cut(source: str, target: str, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise ConnectionError("the line went dead")

    monkeypatch.setattr(system, "get_file", cut)
    with pytest.raises(
        mg.ModgraftError, match=r"memory://.* \(ConnectionError: the line went dead\)"
    ):
        find(url)
    assert list(cache().iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    left = cache() / ".fetch-old"
    left.mkdir()
    os.utime(left, (0, 0))
    find(url)
    assert not left.exists()


def test_pull_replaces_a_module_and_nothing_else(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 1.0), saved(tmp_path / "two", 2.0)
    (one / "notes.txt").write_text("a user's own")
    pull(find(str(two)), one)
    assert (one / "notes.txt").read_text() == "a user's own"
    assert verify(one).hash == verify(two).hash
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="is there and holds no module; choose another"):
        pull(find(str(one)), other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_a_full_disk_and_a_place_that_cannot_be_written_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = saved(tmp_path / "one", 1.0), saved(tmp_path / "two", 2.0)
    hub = Hub(tmp_path / "hub")
    hub.push(one)
    before = verify(one).hash

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(mg.ModgraftError, match=r"one cannot be .*No space left on device"):
        pull(find(str(two)), one)
    with pytest.raises(mg.ModgraftError, match=r"hub.* cannot be .*No space left on device"):
        hub.push(two)
    monkeypatch.undo()
    assert (verify(one).hash, verify(one).problems) == (before, [])
    assert [row.address for row in hub.listed()] == ["hub:qa@1"]
    assert set(hub.verify().values()) == {""}
    (tmp_path / "file").write_text("")
    with pytest.raises(mg.ModgraftError, match=r"cannot be|is a file"):
        Hub(tmp_path / "file/hub").push(one)
    with pytest.raises(mg.ModgraftError, match=r"cannot be|is a file"):
        pull(find(str(one)), tmp_path / "file/x")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("hub:qa@2", "qa"), ("hf:me/qa-lora", "qa-lora"), ("hf:me/qa@main", "qa"),
        ("hf:me/all@main/a/b", "b"), ("s3://b/qa@x/", "qa@x"), ("zip://in::file:///a.zip", "in"),
    ],
)  # fmt: skip
def test_what_a_folder_is_called(address: str, name: str) -> None:
    assert name_of(address) == name


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="Give a module's folder, hub:NAME"):
        find(str(tmp_path / "none"))
    with pytest.raises(mg.ModgraftError, match="nosuch://x cannot be"):
        find("nosuch://x")
    with pytest.raises(MissingFileError, match="there is nothing there"):
        find(f"memory://{uuid.uuid4()}/none")
    empty = put(tmp_path, "memory", tmp_path)
    fsspec.filesystem("memory").makedirs(empty.removeprefix("memory:/"))
    with pytest.raises(CheckpointError, match=r"it has no \.safetensors file"):
        find(empty)
    (tmp_path / "hf:me").mkdir()
    host = small_host()
    before = set(host.implants)
    with pytest.raises(mg.ModgraftError):
        host.load(str(tmp_path / "hf:me"))
    assert set(host.implants) == before


def test_what_was_damaged_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    url = put(saved(tmp_path / "qa", 3.0), "memory", tmp_path)
    small_host().load(url)
    [file] = cache().glob("*/module.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    host = small_host()
    host.load(url)
    assert fill_of(host, "qa") == 3.0
