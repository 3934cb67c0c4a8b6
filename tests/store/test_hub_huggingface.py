"""Modules on the Hugging Face Hub, of which a server in a thread is the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import modgraft as mg
from modgraft.core.errors import CheckpointError, DataError
from modgraft.store.hub import huggingface
from modgraft.store.hub.address import find, pull
from modgraft.store.hub.huggingface import Place
from modgraft.store.verify import verify
from store.hub_cases import Server, fill_of, saved, serving, small_host


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    with serving() as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        at = f"{found.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield found


def files_of(folder: Path, start: str = "") -> dict[str, bytes]:
    return {start + path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_module_is_fetched_once_and_loads_offline(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    one = files_of(saved(tmp_path / "one", 1.0))
    first = server.commit("me/qa", {**one, "pytorch_model.bin": b"a pickle", "x/y.json": b"{}"})
    second = server.commit("me/qa", files_of(saved(tmp_path / "two", 2.0)))

    host = small_host()
    host.load(f"hf:me/qa@{first}")
    assert fill_of(host, "qa") == 1.0
    said = capsys.readouterr().err
    assert "fetching hf:me/qa: " in said
    assert "module.safetensors" in said
    assert "kB" in said
    assert not any(".bin" in each or "x/y" in each for each in server.asked)

    host.load("hf:me/qa", "newest")
    assert fill_of(host, "newest") == 2.0
    found = find("hf:me/qa")
    assert found.address == f"hf:me/qa@{second}"
    pull(found, tmp_path / "pulled")
    assert verify(tmp_path / "pulled").problems == []

    capsys.readouterr()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    assert find("hf:me/qa").address == f"hf:me/qa@{second}"
    assert find(f"hf:me/qa@{first}").sha256 != found.sha256
    assert len(server.asked) == asked
    assert capsys.readouterr().err == ""


def test_a_folder_of_a_repository(server: Server, tmp_path: Path) -> None:
    server.commit("me/all", {
        **files_of(saved(tmp_path / "one", 1.0), "nested/one/"),
        **files_of(saved(tmp_path / "two", 2.0)),
    })  # fmt: skip
    host = small_host()
    host.load("hf:me/all@main/nested/one", "one")
    host.load("hf:me/all", "two")
    assert (fill_of(host, "one"), fill_of(host, "two")) == (1.0, 2.0)


def test_another_tools_folder_is_called_as_its_repository(server: Server, tmp_path: Path) -> None:
    host = small_host()
    host.implant("qa", mg.LoRA(rank=2), at="0")
    with torch.no_grad():
        for parameter in host["qa"].parameters():
            parameter.fill_(5.0)
    server.commit("me/qa-lora", files_of(host.save("qa", tmp_path / "peft", format="peft")))
    other = small_host()
    assert other.load("hf:me/qa-lora").name == "qa_lora"
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(other(x), host(x))


def test_what_is_not_there_is_said(server: Server, tmp_path: Path) -> None:
    server.commit("me/pickle", {"adapter_model.bin": b"x", "adapter_config.json": b"{}"})
    server.commit("me/gated", {})
    server.closed.add("me/gated")
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        find("hf:me/pickle")
    assert not any(each.endswith(".bin") for each in server.asked)
    for address, why in {
        "hf:me/none": "no such repository, or it is private. See the name, or log in",
        "hf:me/pickle@v9": "it has no revision 'v9'",
        "hf:me/gated": "access must be asked for",
    }.items():
        with pytest.raises(DataError, match=why):
            find(address)
    host = small_host()
    before = set(host.implants)
    with pytest.raises(mg.ModgraftError, match="me/none"):
        host.load("hf:me/none")
    assert set(host.implants) == before


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot be reached, and not all of it is in the cache"):
        find("hf:me/qa")
    with pytest.raises(mg.ModgraftError, match=r"hf:me/qa.* cannot be used"):
        huggingface.push(saved(tmp_path / "qa"), Place.read("hf:me/qa"), "qa", private=False)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>'")  # huggingface_hub's, of its own upload
def test_a_module_is_uploaded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "qa", 3.0)
    (folder / "notes.txt").write_text("a user's own")
    (folder / "optimizer.bin").write_bytes(b"a pickle")
    with pytest.raises(DataError, match=r"you may not do that\. Log in"):
        huggingface.push(folder, Place.read("hf:me/qa"), "qa", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    address = huggingface.push(folder, Place.read("hf:me/qa"), "qa", private=False)
    commit, files = server.repos["me/qa"][-1]
    assert address == f"hf:me/qa@{commit}"
    assert set(files) == {"module.safetensors", "module.json", "README.md"}
    assert find(address).sha256 == verify(folder).hash
    into = huggingface.push(folder, Place.read("hf:me/qa@main/sub"), "qa", private=True)
    host = small_host()
    host.load(into)
    assert fill_of(host, "qa") == 3.0


@pytest.mark.parametrize(
    "address",
    ["hf:qa", "hf:", "hf:me/qa/../x", "hf:me/qa@", "hf:me/qa@v1@v2", "hf:/me/qa", "hf:me//x"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(mg.ModgraftError, match="write hf:USER/REPO"):
        find(address)


def test_half_of_a_module_is_no_module_offline(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A fetch that was killed leaves a snapshot of some of the files."""
    host = small_host()
    host.implant("qa", mg.LoRA(rank=2), at="0")
    server.commit("me/qa.v1", files_of(host.save("qa", tmp_path / "peft", format="peft")))
    snapshot = huggingface.fetch(Place.read("hf:me/qa.v1"))[0]
    (snapshot / "adapter_config.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="and not all of it is in the cache"):
        find("hf:me/qa.v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert small_host().load("hf:me/qa.v1").name == "qa_v1"


def test_what_was_damaged_in_the_cache_is_fetched_again(server: Server, tmp_path: Path) -> None:
    server.commit("me/qa", files_of(saved(tmp_path / "one", 3.0)))
    blob = (find("hf:me/qa").folder / "module.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\1")
    host = small_host()
    host.load("hf:me/qa")
    assert fill_of(host, "qa") == 3.0


@pytest.mark.parametrize("form", ["modgraft", "peft"])
def test_a_link_of_the_cache_that_leads_nowhere(
    form: str, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = small_host()
    host.implant("qa", mg.LoRA(rank=2), at="0")
    server.commit("me/qa", files_of(host.save("qa", tmp_path / "one", format=form)))
    [*_, tensors] = sorted(find("hf:me/qa").folder.resolve().glob("*.safetensors"))
    tensors.resolve().unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="and not all of it is in the cache"):
        find("hf:me/qa")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert small_host().load("hf:me/qa").name == "qa"


def test_a_revision_with_a_slash(server: Server, tmp_path: Path) -> None:
    commit = server.commit("me/qa", files_of(saved(tmp_path / "one", 3.0)))
    assert find(f"hf:me/qa@{commit}").address == f"hf:me/qa@{commit}"
    for address in ("hf:me/qa@refs%2Fpr%2F1", "hf:me/qa@refs/pr/1"):
        with pytest.raises(DataError, match="a slash in one is written %2F"):
            find(address)
    assert any("/revision/refs/pr/1" in each for each in server.asked)


@pytest.mark.filterwarnings("ignore:Use 'content=<...>'")
def test_another_tools_folder_is_not_mixed_with_what_is_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files would be behind ``module.safetensors``, and another module be loaded than sent."""
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    host = small_host()
    host.implant("qa", mg.LoRA(rank=2), at="0")
    folder = host.save("qa", tmp_path / "peft", format="peft")
    server.commit("me/qa", files_of(saved(tmp_path / "one", 3.0)))
    commits = len(server.repos["me/qa"])
    with pytest.raises(CheckpointError, match=r"has module\.safetensors already"):
        huggingface.push(folder, Place.read("hf:me/qa"), "peft", private=False)
    assert len(server.repos["me/qa"]) == commits
    address = huggingface.push(folder, Place.read("hf:me/qa@main/peft"), "peft", private=False)
    assert find(address).sha256 == find(str(folder)).sha256
    again = huggingface.push(folder, Place.read("hf:me/qa@main/peft"), "peft", private=False)
    assert find(again).sha256 == find(str(folder)).sha256


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "qa")
    (folder / "module.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")
    for call in (lambda: small_host().load(folder), lambda: find(str(folder))):
        with pytest.raises(CheckpointError, match="git-lfs's pointer to the file: `git lfs pull`"):
            call()
