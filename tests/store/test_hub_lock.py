"""Lock files: a composition by exact hashes, loaded so or not at all; and newer versions of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import modgraft as mg
from modgraft.core.errors import CheckpointError, CompositionError, DataError, UnknownNameError
from modgraft.store.hub.hub import Hub
from modgraft.store.hub.lock import Lock, lock
from modgraft.store.hub.update import update
from store.hub_cases import fill_of, saved, small_host


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Hold ``qa`` in two versions and ``style`` in one."""
    monkeypatch.setenv("MODGRAFT_HUB", str(tmp_path / "hub"))
    for n, name in ((1, "qa"), (2, "qa"), (3, "style")):
        about = {"metrics": {"f1": n / 10}, "description": f"try {n}"}
        Hub().push(saved(tmp_path / f"{n}", float(n), name, **about))
    return Hub()


def test_a_lock_file_loads_exactly_its_modules(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "mix.lock.json"
    lock("0.5*qa + style", {}, tmp_path).write(file)
    said = json.loads(file.read_text())
    assert said["composition"] == "0.5*qa + style"
    assert [each["address"] for each in said["modules"]] == ["hub:qa@2", "hub:style@1"]
    hub.push(saved(tmp_path / "new", 7.0))

    host = small_host()
    assert host.load(file).name == "style"
    assert str(host.composition) == "0.5*qa + style"
    assert (fill_of(host, "qa"), fill_of(host, "style")) == (2.0, 3.0)
    other = small_host()
    other.load("hub:qa@2"), other.load("hub:style")
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(host(x), other(x, modules="0.5*qa + style"), rtol=0, atol=0)
    idle = small_host()
    idle.load(str(file), active=False)
    assert idle.composition is None
    for wrong in ({"name": "x"}, {"lazy": True}):
        with pytest.raises(mg.ModgraftError, match="leave out name= and lazy="):
            small_host().load(file, **wrong)


def test_another_module_at_its_address_is_refused(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "mix.lock.json"
    lock("qa + style", {"style": str(tmp_path / "3")}, tmp_path).write(file)
    saved(tmp_path / "3", 9.0, "style")
    host = small_host()
    host.implant("here", mg.LoRA(rank=1), at="0")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"'style' is locked to .*/3 with hash \w{12}, and"
        ):
            host.load(file)
        assert (list(host.implants), str(host.composition)) == (["here"], "here")
    hub.remove("qa@2")
    with pytest.raises(UnknownNameError, match="no version '2'"):
        host.load(file)


def test_a_host_that_refuses_one_of_them_is_as_it_was(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "mix.lock.json"
    lock("qa + style", {}, tmp_path).write(file)
    host = small_host()
    host.implant("style", mg.LoRA(rank=1), at="0")
    with pytest.raises(mg.ModgraftError, match="style"):
        host.load(file)
    assert (list(host.implants), str(host.composition)) == (["style"], "style")


def test_folders_stand_relative_to_the_lock_file(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "mix.lock.json"
    lock("a - qa", {"a": "1"}, tmp_path).write(file)
    assert Lock.read(file).modules[0].address == "1"
    host = small_host()
    host.load(file)
    assert (fill_of(host, "a"), fill_of(host, "qa")) == (1.0, 2.0)


def test_what_cannot_be_locked(hub: Hub, tmp_path: Path) -> None:
    host = small_host()
    host.load("hub:qa", "a"), host.load("hub:style", "b")
    hub.push(host.save(["a", "b"], tmp_path / "pair"), "pair")
    for composition, addresses, kind, why in (
        ("qa +", {}, CompositionError, "is not a composition"),
        ("qa + none", {}, UnknownNameError, "'none'; there are"),
        ("qa", {"x": "1"}, mg.ModgraftError, "x is not in 'qa'"),
        ("pair", {}, mg.ModgraftError, "holds a, b; a lock names"),
    ):
        with pytest.raises(kind, match=why):
            lock(composition, addresses, tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "{}",
        '{"composition": "qa", "modules": []}',
        '{"composition": 3, "modules": []}',
        '{"composition": "qa", "modules": [], "more": 1}',
        '{"format": 2, "composition": "qa", "modules": []}',
    ],
)
def test_what_is_no_lock_file(said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(said)
    with pytest.raises((CheckpointError, DataError), match=r"host\.load takes|lock it anew"):
        small_host().load(tmp_path / "file")


def test_newer_versions_and_what_changes(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "mix.lock.json"
    lock("qa + style", {"qa": "hub:qa@1"}, tmp_path).write(file)
    assert [(u.old, u.new) for u in update(file)] == [("hub:qa@1",) * 2, ("hub:style@1",) * 2]
    lock("qa + style", {}, tmp_path).write(file)
    hub.push(saved(tmp_path / "new", 7.0, metrics={"em": 0.5}, description="try 2"), "qa")
    before = file.read_text()
    found = update(file, dry_run=True)[0]
    assert (found.old, found.new) == ("hub:qa@2", "hub:qa@3")
    assert found.changes == ["em – → 0.5", "f1 0.2 → –", "other tensors"]
    assert file.read_text() == before
    update(file)
    host = small_host()
    host.load(file)
    assert fill_of(host, "qa") == 7.0


def test_a_pulled_folder_is_updated(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "1"
    assert update(folder, dry_run=True)[0].changes == [
        "f1 0.1 → 0.2",
        "description: try 2",
        "other tensors",
    ]
    host = small_host()
    host.load(folder)
    assert fill_of(host, "qa") == 1.0
    assert [(u.old, u.new) for u in update(folder)] == [("hub:qa@1", "hub:qa@2")]
    host.load(folder, "newer")
    assert fill_of(host, "newer") == 2.0
    assert [(u.old, u.new) for u in update(folder)] == [("hub:qa@2", "hub:qa@2")]
    with pytest.raises(UnknownNameError, match="is not on the hub"):
        update(saved(tmp_path / "x", 8.0))


@pytest.mark.parametrize("where", ["folder", "relative", "memory"])
def test_a_lock_of_another_hub_names_it(
    where: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Your own hub has modules of the same names, which are others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = {"folder": str(tmp_path / "team"), "relative": "team"}.get(
        where, f"memory://{tmp_path.name}/team"
    )
    team = mg.Hub(address)
    team.push(saved(tmp_path / "theirs", 8.0))
    made = mg.lock("qa", base="here", hub=team)
    made.write("here/mix.json")
    assert made.hub == {"relative": "../team"}.get(where, address)
    host = small_host()
    host.load("here/mix.json")
    assert fill_of(host, "qa") == 8.0
    assert [(u.old, u.new) for u in update("here/mix.json")] == [("hub:qa@1",) * 2]
    team.push(saved(tmp_path / "newer", 9.0))
    assert [(u.old, u.new) for u in update("here/mix.json")] == [("hub:qa@1", "hub:qa@2")]
    assert Lock.read("here/mix.json").hub == made.hub
    assert fill_of_lock("here/mix.json") == 9.0
    own = mg.lock("qa", base=tmp_path, hub=hub)
    own.write("own.json")
    assert own.hub is None  # your own is not named
    assert fill_of_lock("own.json") == 2.0


def fill_of_lock(path: str) -> float:
    host = small_host()
    host.load(path)
    return fill_of(host, "qa")


def test_addresses_are_paths_or_texts(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").rename("hub:qa")
    made = lock("qa", {"qa": Path("hub:qa")}, tmp_path)
    assert made.modules[0].address == "./hub:qa"
    made.write("mix.json")
    assert fill_of_lock("mix.json") == 1.0
    host = small_host()
    host.load("hub:qa")
    assert str(lock(host.composition, {}, tmp_path).composition) == "qa"  # type: ignore[arg-type]
    for wrong in (3, b"qa", None):
        with pytest.raises(mg.ModgraftError, match="a module's address takes the path"):
            lock("qa", {"qa": wrong}, tmp_path)  # type: ignore[dict-item]


def test_a_lock_file_may_be_written_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, third = tmp_path / "here", tmp_path / "third"
    third.mkdir()
    saved(here / "mods" / "qa", 1.0), saved(here / "hub:odd", 2.0, "odd")
    Hub(here / "team").push(saved(tmp_path / "3", 3.0, "style"))
    monkeypatch.chdir(here)
    made = mg.lock("qa + odd + style", {"qa": "mods/qa", "odd": "./hub:odd"}, hub="team")
    monkeypatch.chdir(third)
    made.write(here / "locks" / "deep" / "a.json")
    made.write("b.json")
    monkeypatch.chdir(tmp_path)
    said = json.loads((here / "locks" / "deep" / "a.json").read_text())
    assert said["hub"] == "../../team"
    assert [m["address"] for m in said["modules"]] == [
        "../../mods/qa", "../../hub:odd", "hub:style@1",
    ]  # fmt: skip
    made.write(here / "c.json")
    assert json.loads((here / "c.json").read_text())["modules"][1]["address"] == "./hub:odd"
    for file in ("here/locks/deep/a.json", "third/b.json", "here/c.json"):
        host = small_host()
        host.load(file)
        assert [fill_of(host, name) for name in ("qa", "odd", "style")] == [1.0, 2.0, 3.0]
    Lock.read("third/b.json").write("here/mods/d.json")
    small_host().load("here/mods/d.json")
