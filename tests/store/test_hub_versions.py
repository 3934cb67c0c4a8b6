"""A hub in a folder and at a URL: versions that never change, an index, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fsspec
import pytest

import modgraft as mg
from modgraft.core.errors import CheckpointError, UnknownNameError
from modgraft.store.hub import index
from modgraft.store.hub.address import find, pull
from modgraft.store.hub.given import Given
from modgraft.store.hub.hub import Hub
from modgraft.store.hub.index import GIVEN, INDEX
from modgraft.store.hub.remote import reached
from modgraft.store.hub.search import Listed
from modgraft.store.hub.update import update
from modgraft.store.verify import verify
from store.hub_cases import fill_of, saved, small_host


@pytest.fixture(params=["folder", "memory"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    where = tmp_path / "hub" if request.param == "folder" else f"memory://{uuid.uuid4()}/hub"
    monkeypatch.setenv("MODGRAFT_HUB", str(where))
    return Hub()


def addresses(hub: Hub) -> list[str]:
    return [row.address for row in hub.listed()]


def test_versions_are_numbered_and_never_change(hub: Hub, tmp_path: Path) -> None:
    assert hub.listed() == []
    one, two = saved(tmp_path / "one", 1.0), saved(tmp_path / "two", 2.0)
    assert hub.push(one).address == "hub:qa@1"
    assert hub.push(two, dry_run=True).address == "hub:qa@2"
    assert addresses(hub) == ["hub:qa@1"]
    assert hub.push(two).address == "hub:qa@2"
    assert hub.push(one).address == "hub:qa@1"  # it is there
    assert hub.push(two, "other", "paper").address == "hub:other@1"
    assert hub.push(one, tag="paper").address == "hub:qa@1"
    assert hub.push(one, tag="paper").tags == ("paper",)
    with pytest.raises(mg.ModgraftError, match=r"qa@paper is on the hub with another hash"):
        hub.push(two, tag="paper")
    assert addresses(hub) == ["hub:other@1", "hub:qa@1", "hub:qa@2"]
    assert hub.find("qa") == hub.find("qa@2")
    assert hub.find("other") == hub.find("hub:other@paper")
    assert hub.find("qa@paper") == hub.find("qa@1")
    assert hub.find("qa@1").card.sha256 == verify(one).hash
    assert hub.verify() == dict.fromkeys(addresses(hub), "")

    host = small_host()
    host.load("hub:qa@1", "first")
    host.load("hub:qa", "newest")
    assert (fill_of(host, "first"), fill_of(host, "newest")) == (1.0, 2.0)


def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="there are: none"):
        hub.find("qa")
    hub.push(saved(tmp_path / "one"))
    with pytest.raises(UnknownNameError, match=r"no version '7' on the hub .*; there are 1"):
        hub.find("qa@7")
    for call in (hub.find, hub.verify, hub.remove, hub.versions):
        with pytest.raises(UnknownNameError, match="'qb'; there are: 'qa'"):
            call("qb")
    with pytest.raises(UnknownNameError):
        hub.remove("")
    host = small_host()
    with pytest.raises(UnknownNameError):
        host.load("hub:qb")


@pytest.mark.parametrize(
    "name", ["../qa", "a/b", "/etc", ".", "..", ".qa", "a b", "a@1", "ä", "x" * 97]
)
def test_names_that_are_paths_are_refused(name: str, tmp_path: Path) -> None:
    hub, folder = Hub(tmp_path / "hub"), saved(tmp_path / "one")
    with pytest.raises(mg.ModgraftError, match="cannot be a module's name"):
        hub.push(folder, name)
    with pytest.raises(mg.ModgraftError, match="cannot be a module's tag"):
        hub.push(folder, tag=name)
    hub.push(folder)
    with pytest.raises(mg.ModgraftError, match="cannot be a module's name"):
        hub.rename("qa", name)
    with pytest.raises(mg.ModgraftError, match="is a number, which the hub gives"):
        hub.push(folder, tag="7")
    assert addresses(hub) == ["hub:qa@1"]


def test_remove_and_rename(hub: Hub, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 1.0), saved(tmp_path / "two", 2.0)
    hub.push(one), hub.push(two), hub.push(one, "qab")
    with pytest.raises(mg.ModgraftError, match="'qab' is on the hub already"):
        hub.rename("qa", "qab")
    assert hub.remove("qa@1") == ["hub:qa@1"]
    hub.rename("qa", "new")
    assert addresses(hub) == ["hub:new@2", "hub:qab@1"]
    assert hub.push(one, "new").address == "hub:new@3"
    assert hub.remove("new") == ["hub:new@2", "hub:new@3"]
    assert addresses(hub) == ["hub:qab@1"]
    assert hub.push(two, "new").address == "hub:new@4"
    if hub.folder:
        assert {p.name for p in hub.folder.iterdir()} == {GIVEN, INDEX, "new", "qab"}


def test_the_index_is_made_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "hub")
    hub.push(saved(tmp_path / "one", metrics={"f1": 0.5}))
    index = tmp_path / "hub" / INDEX
    said = json.loads(index.read_text())
    assert list(said) == ["qa@1 given", "qa@1"]

    opened = []
    monkeypatch.setattr("modgraft.store.hub.index.card_there", lambda *a: opened.append(a))
    assert [row.card.metrics for row in hub.listed()] == [{"f1": 0.5}]
    assert opened == []  # a search opens no files
    monkeypatch.undo()

    for damaged in (
        "",
        "[]",
        '{"qa@1": 3}',
        '{"qa@1": {"stamp": "", "text": "{}"}}',
        '{"qb@1": {}}',
    ):
        index.write_text(damaged)
        assert [row.card.metrics for row in hub.listed()] == [{"f1": 0.5}]
        assert json.loads(index.read_text()) == said
    other = saved(tmp_path / "two", metrics={"f1": 0.7})  # another file of the same size
    (other / "module.safetensors").replace(tmp_path / "hub/qa/1/module.safetensors")
    with pytest.raises(CheckpointError, match="is the module with hash"):
        hub.find("qa")


def test_a_hub_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    hub.push(saved(tmp_path / "one"))

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("modgraft.store.hub.hub.write_text", refused)
    assert addresses(hub) == ["hub:qa@1"]


def test_broken_versions_are_said_and_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODGRAFT_HUB", str(tmp_path / "hub"))
    hub = Hub(tmp_path / "hub")
    for fill in (1.0, 2.0, 3.0):
        hub.push(saved(tmp_path / f"{fill}", fill))
    flipped = tmp_path / "hub/qa/1/module.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\1")
    cut = tmp_path / "hub/qa/3/module.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "hub/qa/x").mkdir()  # of a push that was killed
    (tmp_path / "hub/qa/x/module.json").write_text("{}")
    assert addresses(hub) == ["hub:qa@1", "hub:qa@2"]
    found = hub.verify()
    assert "it was changed" in found["hub:qa@1"]
    assert "cannot be read" in found["hub:qa@3"]
    assert found["hub:qa@2"] == ""
    with pytest.raises(CheckpointError, match="cannot be read"):
        hub.find("qa@3")
    with pytest.raises(CheckpointError, match="were changed after they were written"):
        small_host().load("hub:qa@1")
    with pytest.raises(CheckpointError, match="it was changed"):
        hub.push(tmp_path / "hub/qa/1", "copy")
    assert hub.push(saved(tmp_path / "4", 4.0)).address == "hub:qa@4"
    assert hub.remove("qa@3") == ["hub:qa@3"]
    assert "hub:qa@3" not in hub.verify()


def test_two_that_push_at_once(tmp_path: Path) -> None:
    for n in range(4):
        saved(tmp_path / f"{n}", float(n))
    code = (
        "import sys; from pathlib import Path; from modgraft.store.hub.hub import Hub\n"
        "for each in sys.argv[2:]: Hub(sys.argv[1]).push(Path(each), 'qa')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hub")]
    runs = [
        subprocess.Popen([*command, str(tmp_path / a), str(tmp_path / b)])
        for a, b in (("0", "1"), ("2", "3"))
    ]
    assert [run.wait() for run in runs] == [0, 0]
    hub = Hub(tmp_path / "hub")
    assert addresses(hub) == [f"hub:qa@{n}" for n in (1, 2, 3, 4)]
    assert set(hub.verify().values()) == {""}


def test_search(hub: Hub, tmp_path: Path) -> None:
    about = {"description": "Answers questions", "task": "question-answering", "data": "SQuAD"}
    hub.push(saved(tmp_path / "1", 1.0, metrics={"f1": 0.7, "em": 0.6}, **about))
    hub.push(saved(tmp_path / "2", 2.0, metrics={"f1": 0.9}, base_model="bert-base", **about))
    hub.push(saved(tmp_path / "3", 3.0, name="style"))

    def found(*args: str, **kwargs: object) -> list[str]:
        return [row.address for row in hub.search(*args, **kwargs)]  # type: ignore[arg-type]

    qa = ["hub:qa@1", "hub:qa@2"]
    assert found() == [*qa, "hub:style@1"]
    assert found("squad questions") == found(task="answering") == qa
    assert found("squad style") == []
    assert found(kind="LORA") == found(host="sequential") == found()
    assert found(kind="lor") == []
    assert found(host="bert") == found(metrics=["f1 > 0.8"]) == found(metrics=["f1>=.9"]) == qa[1:]
    assert found(metrics=["f1<0.8", "em=0.6"]) == qa[:1]
    assert found(host=hub.find("style").card.host["weights"][:8]) == found()
    for condition in ("f1", "f1>", "f1>x", ">1", "f1>1>2", "f1 > e"):
        with pytest.raises(mg.ModgraftError, match=r"is no condition; write one as f1>0\.8"):
            hub.search(metrics=[condition])


def test_what_is_no_hub_or_no_module(tmp_path: Path) -> None:
    with pytest.raises(mg.ModgraftError, match="a hub is a folder or a URL"):
        Hub("hf:me/qa")
    with pytest.raises(mg.ModgraftError, match="nosuch://x cannot be"):
        Hub("nosuch://x")
    other = tmp_path / "peft"
    other.mkdir()
    hub = Hub(tmp_path / "hub")
    for name, why in {
        "": r"has no \.safetensors file", "adapter_model.bin": "a pickle",
        "adapter_model.safetensors": "another tool's",
    }.items():  # fmt: skip
        if name:
            (other / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=why):
            hub.push(other)
    assert hub.listed() == []
    with fsspec.open(f"memory://{uuid.uuid4()}/file", "w") as file:
        file.write("x")


def test_what_is_no_file_does_not_hang_a_hub(tmp_path: Path) -> None:
    (tmp_path / "hub" / "qa" / "1").mkdir(parents=True)
    os.mkfifo(tmp_path / "hub" / "qa" / "1" / "module.safetensors")
    hub = Hub(tmp_path / "hub")
    assert "is no plain file" in hub.verify()["hub:qa@1"]
    assert hub.listed() == []


def test_the_newest_is_what_was_pushed_last_whatever_it_is_called(hub: Hub, tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"{n}", float(n)) for n in (1, 2, 3)]
    hub.push(folders[0]), hub.push(folders[1])
    assert hub.push(folders[2], tag="paper").address == "hub:qa@3"
    assert hub.find("qa").tags == ("paper",)
    hub.push(folders[0], tag="first")
    assert hub.find("qa").address == "hub:qa@3"
    host = small_host()
    host.load("hub:qa")
    host.load("hub:qa@first", "first")
    assert (fill_of(host, "qa"), fill_of(host, "first")) == (3.0, 1.0)
    with pytest.raises(UnknownNameError, match=r"no version 'x'.*there are 1, 2, 3, first, paper"):
        hub.find("qa@x")
    assert [row.address for row in hub.listed("qa@first")] == ["hub:qa@1"]


def test_a_number_is_given_once(hub: Hub, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "1", 1.0), saved(tmp_path / "2", 2.0)
    hub.push(one, tag="paper")
    assert hub.remove("qa@1") == ["hub:qa@1"]
    assert hub.listed() == []
    with pytest.raises(UnknownNameError):
        hub.find("qa")
    assert hub.push(two, tag="paper").address == "hub:qa@2"  # a tag is chosen, and free again
    with pytest.raises(UnknownNameError, match=r"no version '1' .* any more: it was removed"):
        hub.find("qa@1")
    hub.rename("qa", "squad")
    assert hub.push(one).address == "hub:qa@3"
    assert hub.find("squad@paper").address == "hub:squad@2"
    with pytest.raises(UnknownNameError):
        hub.find("qa@paper")
    hub.remove("qa")
    hub.rename("squad", "qa")  # back again: its numbers are its own
    assert addresses(hub) == ["hub:qa@2"]
    assert hub.push(one).address == "hub:qa@4"
    assert hub.push(two, "squad").address == "hub:squad@3"
    hub.push(two, "style")  # style@1 is another one than squad@1 was
    hub.remove("squad")
    with pytest.raises(mg.ModgraftError, match="squad@1 was another module once"):
        hub.rename("style", "squad")
    assert addresses(hub) == ["hub:qa@2", "hub:qa@4", "hub:style@1"]


def test_two_pushes_at_one_moment_get_two_numbers(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another push has the number between a push's look at the hub and its own."""
    one, two = saved(tmp_path / "1", 1.0), saved(tmp_path / "2", 2.0)
    number = Given.number

    def late(self: Given, name: str, least: int, sha: str) -> str:
        monkeypatch.setattr(Given, "number", number)
        monkeypatch.setattr("modgraft.store.hub.hub.locked", lambda *_, **__: nullcontext())
        assert Hub().push(two, tag="paper").address == "hub:qa@1"
        return self.number(name, least, sha)

    monkeypatch.setattr(Given, "number", late)
    with pytest.raises(mg.ModgraftError, match=r"qa@2 is there, but not as paper: .*to hub:qa@1"):
        hub.push(one, tag="paper")
    assert [row.card.sha256 for row in hub.listed()] == [verify(two).hash, verify(one).hash]
    assert hub.find("qa@paper").address == "hub:qa@1"
    assert set(hub.verify().values()) == {""}


def test_what_a_protocol_cannot_hold_off_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modgraft.store.hub.given.EXCLUSIVE", frozenset())
    one, two = saved(tmp_path / "1", 1.0), saved(tmp_path / "2", 2.0)
    hub = Hub(f"memory://{uuid.uuid4()}/hub")
    hub.push(one)
    assert "let one push at a time" in capsys.readouterr().err
    before = Given.number

    def same(self: Given, name: str, least: int, sha: str) -> str:
        monkeypatch.setattr(Given, "number", before)
        put = Hub._put

        def late(self: Hub, file: Path, row: Listed) -> None:
            monkeypatch.setattr(Hub, "_put", put)
            put(self, file, row)
            put(self, one / "module.safetensors", row)  # who pushed at the same moment

        monkeypatch.setattr(Hub, "_put", late)
        return self.number(name, least, sha)

    monkeypatch.setattr(Given, "number", same)
    with pytest.raises(mg.ModgraftError, match="somebody else pushed hub:qa@2 at the same moment"):
        hub.push(two)


@pytest.mark.parametrize("call", ["remove", "rename"])
def test_what_is_gone_when_its_turn_comes_is_named(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub")
    hub.push(saved(tmp_path / "1"))
    alone = Hub._alone

    def late(self: Hub) -> Any:
        monkeypatch.setattr(Hub, "_alone", alone)
        Hub(tmp_path / "hub").rename("qa", "other")
        return alone(self)

    monkeypatch.setattr(Hub, "_alone", late)
    with pytest.raises(UnknownNameError, match=r"no module on the hub .* is named 'qa'.*'other'"):
        hub.remove("qa") if call == "remove" else hub.rename("qa", "new")
    assert addresses(hub) == ["hub:other@1"]


def test_names_that_differ_in_case_alone_are_refused(hub: Hub, tmp_path: Path) -> None:
    one, two = saved(tmp_path / "1", 1.0), saved(tmp_path / "2", 2.0)
    hub.push(one, tag="paper"), hub.push(one, "qa.v1")
    for call in (
        lambda: hub.push(two, "QA"),
        lambda: hub.push(two, tag="Paper"),
        lambda: hub.rename("qa", "QA.v1"),
    ):
        with pytest.raises(mg.ModgraftError, match="but for its case"):
            call()
    assert addresses(hub) == ["hub:qa@1", "hub:qa.v1@1"]
    host = small_host()
    host.load("hub:qa.v1@1")


@pytest.mark.parametrize("where", ["hub", "hub/more"])
def test_a_file_is_no_hub(where: str, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("")
    with pytest.raises(mg.ModgraftError, match=r"hub is a file, and no folder"):
        Hub(tmp_path / where)
    url = f"memory://{uuid.uuid4()}/hub"
    fsspec.filesystem("memory").pipe_file(url, b"x")
    with pytest.raises(mg.ModgraftError, match="is a file; a hub is a folder, or a URL of one"):
        Hub(url).listed()
    for wrong in ("", 3):
        with pytest.raises(mg.ModgraftError):
            Hub(wrong)  # type: ignore[arg-type]


def test_a_broken_version_is_not_passed_over(hub: Hub, tmp_path: Path) -> None:
    hub.push(saved(tmp_path / "1", 1.0)), hub.push(saved(tmp_path / "2", 2.0), tag="paper")
    system, root = fsspec.core.url_to_fs(hub.address)
    for path, why in ((f"{root}/qa/2", "cannot be read"), (f"{root}/qa/beta", "no version's")):
        system.makedirs(path, exist_ok=True)
        system.pipe_file(f"{path}/module.safetensors", b"12345678")
        with pytest.raises(CheckpointError, match=why):
            hub.find(path.rpartition("/hub/")[2].replace("/", "@"))
    for name in ("qa", "qa@paper"):
        with pytest.raises(CheckpointError, match="hub:qa@2: "):
            hub.find(name)
    assert hub.remove("qa@2") == ["hub:qa@2"]
    assert hub.find("qa").address == "hub:qa@1"


def test_a_bit_of_the_header_that_is_flipped(hub: Hub, tmp_path: Path) -> None:
    """What `host.load` refuses is broken, and pushing the module again repairs it."""
    one = saved(tmp_path / "1", 1.0)
    hub.push(one, tag="paper")
    system, root = fsspec.core.url_to_fs(hub.address)
    good = bytearray((one / "module.safetensors").read_bytes())
    for word in (b'"format"', b'"modgraft"', b'"sites'):
        bad = bytearray(good)
        bad[bad.index(word) + 4] ^= 1
        system.pipe_file(f"{root}/qa/1/module.safetensors", bytes(bad))
        assert hub.verify()["hub:qa@1"]
        for call in (find, small_host().load):
            with pytest.raises(CheckpointError, match="hub:qa@1: "):
                call("hub:qa@1")
        found = hub.push(one)
        assert (found.address, found.tags) == ("hub:qa@1", ("paper",))
        assert hub.verify() == {"hub:qa@1": ""}
    bad = bytearray(good)
    bad[bad.index(b'"format"') + 4] ^= 1
    (one / "module.safetensors").write_bytes(bad)
    for call in (hub.push, lambda folder: pull(find(folder), tmp_path / "2")):
        with pytest.raises(CheckpointError, match="more than a card"):
            call(one)


def test_another_module_in_a_versions_place(hub: Hub, tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"{n}", float(n)) for n in (1, 2)]
    for folder in folders:
        hub.push(folder)
    system, root = fsspec.core.url_to_fs(hub.address)
    files = [f"{root}/qa/{n}/module.safetensors" for n in (1, 2)]
    system.pipe_file(files[0], system.cat_file(files[1]))
    assert "is the module with hash" in hub.verify()["hub:qa@1"]
    assert hub.verify("qa@2") == {"hub:qa@2": ""}
    for call in (hub.find, find, small_host().load):
        with pytest.raises(CheckpointError, match="this number was given to"):
            call("hub:qa@1")
    assert [hub.push(folder).address for folder in folders] == ["hub:qa@1", "hub:qa@2"]
    assert set(hub.verify().values()) == {""}


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path / "hub")
    for name in ("qa", "qb"):
        for n in (1, 2):
            hub.push(saved(tmp_path / f"{n}{name}", float(n), name))

    def refused(closed: Path) -> None:
        def refusing(before: Any) -> Any:
            def call(*args: Any) -> Any:
                if str(closed) in map(str, args):
                    raise PermissionError(13, "Permission denied", str(closed))
                return before(*args)

            return call

        monkeypatch.setattr(os, "scandir", refusing(os.scandir))
        monkeypatch.setattr(index, "card_there", refusing(index.card_there))

    for path, broken in (
        ("qa/1/module.safetensors", ["hub:qa@1"]),
        ("qa/1", ["hub:qa@1"]),
        ("qa", ["hub:qa@1", "hub:qa@2"]),
    ):
        (tmp_path / "hub" / INDEX).unlink(missing_ok=True)
        refused(tmp_path / "hub" / path)
        found = hub.verify()
        assert [each for each, why in found.items() if why] == broken
        assert len(found) == 4
        assert all("Permission denied" in found[each] for each in broken)
        with pytest.raises(CheckpointError, match="Permission denied"):
            hub.find("qa@1")
        assert hub.find("qb").address == "hub:qb@2"
        monkeypatch.undo()
    for path in (".versions", ""):  # without which numbers would be given twice
        refused(tmp_path / "hub" / path)
        with pytest.raises(mg.ModgraftError, match="Permission denied"):
            hub.listed()
        monkeypatch.undo()


def test_what_is_missing_is_said_with_the_command(tmp_path: Path) -> None:
    host = small_host()
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=2), at="0")
    both = host.save(["a", "b"], tmp_path / "both")
    with pytest.raises(mg.ModgraftError, match=r"modgraft hub push .*both NAME"):
        Hub(tmp_path / "hub").push(both)
    with pytest.raises(mg.ModgraftError, match=r"l\.json is not there; give a lock file"):
        update(tmp_path / "l.json", Hub(tmp_path / "hub"))


def test_removing_by_a_tag_takes_the_tag_alone_and_so_moves_it(hub: Hub, tmp_path: Path) -> None:
    old, new = saved(tmp_path / "old", 1.0), saved(tmp_path / "new", 2.0)
    hub.push(old, tag="paper"), hub.push(new)
    with pytest.raises(mg.ModgraftError, match=r"as hub:qa@1: .* hub\.remove\('qa@paper'\)"):
        hub.push(new, tag="paper")
    assert hub.remove("qa@paper", dry_run=True) == hub.remove("hub:qa@paper") == ["hub:qa@paper"]
    assert addresses(hub) == ["hub:qa@1", "hub:qa@2"]
    with pytest.raises(UnknownNameError, match="no version 'paper'"):
        hub.remove("qa@paper")
    assert hub.push(new, tag="paper").address == "hub:qa@2"
    assert hub.find("qa@paper").address == "hub:qa@2"
    assert hub.verify() == {"hub:qa@1": "", "hub:qa@2": ""}


def test_mistakes_of_a_program_are_not_the_hubs(hub: Hub, tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    assert hub.push(folder, name=None, tag=None).address == "hub:qa@1"
    wrong: Any = 3
    with pytest.raises(mg.ModgraftError, match="3 cannot be a module's tag"):
        hub.push(folder, tag=wrong)
    with pytest.raises(AttributeError, match="oops"), reached("hub"):
        raise AttributeError("oops")
    with pytest.raises(mg.ModgraftError, match=r"^reference://x lacks a part"):
        Hub("reference://x")
    with pytest.raises(UnknownNameError) as refused:
        hub.find("qa@01")
    assert "removed" not in str(refused.value)
