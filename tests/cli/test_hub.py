"""``modgraft hub``: what it does and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import modgraft as mg
from contract.hosts import HOSTS
from modgraft.cli.app import app
from modgraft.store.verify import verify
from store.hub_cases import saved, small_host


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODGRAFT_HUB", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*args: str, code: int = 0, answer: str | None = None) -> str:
    result = CliRunner().invoke(app, ["hub", *args], catch_exceptions=False, input=answer)
    assert result.exit_code == code, result.output
    return result.stdout


def said(*args: str) -> Any:
    return json.loads(run(*args, "--json"))


def test_a_modules_way() -> None:
    assert "nothing on the hub" in run("list")
    assert said("list") == []
    saved(Path("modules/qa"), 1.0, metrics={"f1": 0.75}, task="question-answering")
    sha = verify(Path("modules/qa")).hash
    assert run("push", "modules/qa", "--dry-run") == f"would be hub:qa@1  {sha[:12]}\n"
    assert said("push", "modules/qa") == {"address": "hub:qa@1", "sha256": sha}
    saved(Path("plain"), 2.0, metrics={"f1": 0.9})
    assert run("push", "plain", "qa").startswith("hub:qa@2  ")
    assert run("push", "modules/qa", "hub:qa", "--tag", "paper").startswith("hub:qa@1  ")

    rows = run("list")
    assert [line.split()[0] for line in rows.splitlines() if "@" in line] == [
        "qa@1",
        "qa@2",
    ]
    assert all(
        word in rows for word in ("LoRA", "Sequential", "f1 0.75", "question-answering", sha[:12])
    )
    assert [row["address"] for row in said("search", "--metric", "f1>0.8")] == ["hub:qa@2"]
    assert said("search", "nothing") == []
    assert "nothing of that" in run("search", "nothing")

    assert said("show", "qa@1")["card"]["metrics"] == {"f1": 0.75}
    shown = run("show", "qa@1")
    assert sha in shown
    assert "| f1 | 0.75 |" in shown
    assert "---\n" not in shown

    assert "would be hub:qa@1" in run("pull", "qa@1", "there", "--dry-run")
    assert not Path("there").exists()
    run("pull", "qa@1", "there")
    assert verify(Path("there")).hash == sha
    assert said("pull", "qa")[0]["folder"] == "qa"
    assert "hub:qa@1 → hub:qa@2 (not done)" in run("update", "there", "--dry-run")
    assert "f1 0.75 → 0.9" in run("update", "there")
    assert "hub:qa@2 is the newest" in run("update", "there")

    run("rename", "qa", "squad")
    assert "Remove hub:squad@1" in run("remove", "squad@1", answer="n\n", code=1)
    assert "would be removed: hub:squad@1" in run("remove", "squad@1", "--dry-run")
    assert "removed: hub:squad@1" in run("remove", "squad@1", answer="y\n")
    assert "hub:squad@2" in run("remove", "squad", "--yes")
    assert said("list") == []


def test_lock(tmp_path: Path) -> None:
    run("push", str(saved(Path("qa"), 1.0)))
    saved(Path("style"), 2.0, "style")
    text = run("lock", "0.5*qa + style", "mix.json", "--module", "style=./style")
    assert "hub:qa@1" in text
    assert said("lock", "qa")["modules"][0]["address"] == "hub:qa@1"
    assert Path("modules.lock.json").exists()
    run("pull", "--lock", "mix.json", "all")
    assert {p.name for p in Path("all").iterdir()} == {"qa", "style"}
    run("push", str(saved(Path("new"), 3.0)))
    assert "qa: hub:qa@1 → hub:qa@2" in run("update", "mix.json")
    run("lock", "qa", "--module", "qa", code=2)
    run("pull", code=2)
    run("pull", "qa", "x", "--lock", "mix.json", code=2)
    saved(Path("style"), 4.0, "style")
    with pytest.raises(mg.ModgraftError, match=r"'style' is locked to \./style"):
        run("pull", "--lock", "mix.json", "again")
    assert not Path("again").exists()


def test_verify_ends_with_1_where_something_is_broken(tmp_path: Path) -> None:
    assert "nothing on the hub" in run("verify")
    run("push", str(saved(Path("qa"), 1.0)))
    assert run("verify") == "hub:qa@1: whole\n"
    assert said("verify", "qa", "./qa") == [
        {"address": "hub:qa@1", "whole": True, "why": ""},
        {"address": "./qa", "whole": True, "why": ""},
    ]
    for file in (tmp_path / "hub/qa/1/module.safetensors", tmp_path / "qa/module.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "it was changed" in run("verify", code=1)
    assert "./qa: " in run("verify", "./qa", code=1)


def test_what_fits_a_models_folder(tmp_path: Path) -> None:
    for name in ("bert", "gpt2"):
        model = HOSTS[name].model()
        model.save_pretrained(tmp_path / name)
        host = mg.Host(model)
        host.implant(f"m_{name}", mg.LoRA(rank=1), at="query")
        run("push", str(host.save(f"m_{name}", f"modules/{name}")))
    assert [row["name"] for row in said("search", "--host", "./bert")] == ["m_bert"]
    assert [row["name"] for row in said("search", "--host", "GPT2")] == ["m_gpt2"]


def test_another_hub_and_urls(tmp_path: Path) -> None:
    saved(Path("qa"), 1.0)
    other = f"memory://{tmp_path.name}/hub"
    assert said("push", "qa", "--hub", other)["address"] == "hub:qa@1"
    assert said("list") == []
    assert len(said("list", "--hub", other)) == 1
    run("pull", f"memory://{tmp_path.name}/hub/qa/1", "from_url")
    run("pull", "qa", "from_hub", "--hub", other)
    assert verify(Path("from_url")).hash == verify(Path("from_hub")).hash == verify(Path("qa")).hash


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x"])
def test_paths_are_no_names(name: str) -> None:
    saved(Path("qa"), 1.0)
    with pytest.raises(mg.ModgraftError):
        run("push", "qa", name)
    run("push", "qa")
    with pytest.raises(mg.ModgraftError):
        run("rename", "qa", name)
    with pytest.raises(mg.ModgraftError):
        run("remove", name, "--yes")


def test_help_shows_examples() -> None:
    commands = (
        "push",
        "pull",
        "lock",
        "update",
        "list",
        "search",
        "show",
        "verify",
        "rename",
        "remove",
    )
    for command in commands:
        assert f"modgraft hub {command}" in run(command, "--help")


def test_what_a_tag_names_and_what_is_broken(tmp_path: Path) -> None:
    saved(Path("qa"), 1.0)
    run("push", "qa", "--tag", "paper")
    run("push", str(saved(Path("b"), 2.0)))
    assert "qa@1 @paper" in run("list")
    assert said("list")[0]["tags"] == ["paper"]
    assert [row["address"] for row in said("list", "qa@paper")] == ["hub:qa@1"]
    assert said("show", "qa@paper")["address"] == "hub:qa@1"
    (tmp_path / "hub/qa/2/module.safetensors").write_bytes(b"cut")
    result = CliRunner().invoke(app, ["hub", "list"])
    assert (result.exit_code, "qa@1" in result.stdout) == (0, True)
    assert result.stderr == "broken: hub:qa@2; `modgraft hub verify` says why\n"


def test_a_lock_of_another_hub(tmp_path: Path) -> None:
    run("push", str(saved(Path("mine"), 1.0)))
    run("push", str(saved(Path("theirs"), 2.0)), "--hub", "team")
    assert said("lock", "qa", "in/mix.json", "--hub", "team")["hub"] == "../team"
    run("pull", "--lock", "in/mix.json", "all")
    assert verify(Path("all/qa")).hash == verify(Path("theirs")).hash
    with pytest.raises(mg.ModgraftError, match="'qa' is locked to hub:qa@1 with hash"):
        run("pull", "--lock", "in/mix.json", "all", "--hub", "hub")
    saved(Path("theirs"), 3.0)
    run("push", "theirs", "--hub", "team")
    assert "qa: hub:qa@1 → hub:qa@2" in run("update", "in/mix.json")


def test_options_that_would_do_nothing_are_refused() -> None:
    saved(Path("qa"), 1.0)
    run("push", "qa", "hf:me/qa", "--tag", "paper", code=2)
    run("push", "qa", "hf:me/qa", "--hub", "team", code=2)
    run("push", "qa", "--private", code=2)
    assert run("push", "qa", "hf:me/qa", "--dry-run").startswith("would be hf:me/qa")


def test_addresses_are_verified_too(tmp_path: Path) -> None:
    saved(Path("qa"), 1.0)
    url = f"memory://{tmp_path.name}/other"
    run("push", "qa", "--hub", url)
    assert run("verify", f"{url}/qa/1") == f"{url}/qa/1: whole\n"
    assert run("verify", "qa", "--hub", url) == "hub:qa@1: whole\n"


def test_a_folder_of_another_tool_is_verified(tmp_path: Path) -> None:
    host = small_host()
    host.implant("qa", mg.LoRA(rank=2), at="0")
    host.save("qa", "p", format="peft")
    assert "another tool's, which keeps no hash" in run("verify", "./p")
    assert said("verify", "./p")[0]["whole"]
    with torch.no_grad():
        host["qa"].places[0].A.fill_(torch.nan)
    host.save("qa", "p", format="peft")
    assert "holds NaN or infinity" in run("verify", "./p", code=1)
    file = Path("p/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert "cannot be read" in run("verify", "./p", code=1)


def test_a_tag_is_moved(tmp_path: Path) -> None:
    run("push", str(saved(Path("old"), 1.0)), "--tag", "paper")
    run("push", str(saved(Path("new"), 2.0)))
    text = "hub:qa@paper, a tag; hub:qa@1 stays\n"
    assert run("remove", "qa@paper", "--dry-run") == f"would be removed: {text}"
    assert run("remove", "qa@paper") == f"removed: {text}"
    run("push", "new", "--tag", "paper")
    assert [(row["address"], row["tags"]) for row in said("list")] == [
        ("hub:qa@1", []), ("hub:qa@2", ["paper"]),
    ]  # fmt: skip


def test_a_lock_in_another_folder_takes_paths_from_here(tmp_path: Path) -> None:
    saved(Path("mods/qa"), 1.0)
    made = said("lock", "qa", "locks/a.json", "--module", "qa=mods/qa")
    assert made["modules"][0]["address"] == "../mods/qa"
    run("pull", "--lock", "locks/a.json", "all")
    assert verify(Path("all/qa")).hash == verify(Path("mods/qa")).hash
