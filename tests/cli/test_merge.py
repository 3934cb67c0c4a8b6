"""``modgraft merge`` and ``modgraft diff``: modules and checkpoints, from folders to folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM
from typer.testing import CliRunner

import modgraft as mg
from common import lines
from contract.hosts import HOSTS
from modgraft.cli.app import app
from modgraft.core.errors import ModgraftError
from modgraft.store.folder import native
from modgraft.store.merging.diff import compare_checkpoints
from store.merging.test_checkpoints import saved, three, weights
from store.merging.test_modules import error, implanted, output

QKV = HOSTS["bert"].lora_at


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def modules(tmp_path: Path) -> tuple[Path, mg.Host, list[Path]]:
    """Save a host and two modules of it, in folders with names that are none of modules."""
    base = saved(tmp_path / "base")
    host = mg.Host(AutoModelForMaskedLM.from_pretrained(base).eval())
    folders = []
    for kind, folder in (("lora", "if"), ("dora", "2nd-style")):
        implanted(host, kind, QKV)
        folders.append(host.save(kind, tmp_path / folder))
    return base, host, folders


def test_modules_are_merged_into_a_module(tmp_path: Path) -> None:
    base, host, folders = modules(tmp_path)
    out = tmp_path / "out"
    args = ["merge", *folders, "--base", base, "--out", out, "--method", "arithmetic"]
    text = run(*args, "--weights", "0.5,2", "--name", "both")
    assert text.startswith(f"{out}: DenseDelta()")
    host.load(out, "new", active=False)
    expected = output(host, "0.5*lora + 2*dora", "bert")
    assert error(output(host, "new", "bert"), expected) < 1e-6
    report = json.loads(run(*args, "--rank", "3", "--set", "scale=0.5", "--json"))
    assert report["module"] == "LoRA(rank=3)"
    assert report["relative_error"] > 0
    assert report["options"] == {"scale": 0.5}
    parents = {each["name"]: each["tensors"] for each in report["parents"]}
    cards = [native(folder).card for folder in folders]
    assert parents == {card.names[0]: card.tensors for card in cards}
    host.load(out, "newer", active=False)  # in place of the one before
    assert host["newer"].method.brief() == "LoRA(rank=3)"


def test_modules_are_merged_into_a_model(tmp_path: Path) -> None:
    base, host, folders = modules(tmp_path)
    (base / "vocab.txt").write_text("words")
    out = tmp_path / "model"
    args = ["merge", *folders, "--base", base, "--out", out, "--method", "ties", "--into-model"]
    run(*args, "--set", "density=0.5", "--set", "elect=count", "--set", "normalize=false")
    model = AutoModelForMaskedLM.from_pretrained(out).eval()
    options: dict[str, Any] = {"density": 0.5, "elect": "count", "normalize": False}
    mg.merge(host, ["lora", "dora"], "new", "ties", **options)
    with torch.no_grad():
        found = model(**HOSTS["bert"].batch()).logits.double()
    assert error(found, output(host, "new", "bert")) < 1e-6
    assert (out / "vocab.txt").read_text() == "words"
    with pytest.raises(ModgraftError, match="is there and not empty"):
        run(*args)


def test_checkpoints_are_merged(tmp_path: Path) -> None:
    base, *models = three(tmp_path)
    text = run("merge", *models, "--out", tmp_path / "soup")
    assert text == f"{tmp_path / 'soup'}: a checkpoint\n"
    one, two, soup = map(weights, (*models, tmp_path / "soup"))
    torch.testing.assert_close(soup, {name: (one[name] + two[name]) / 2 for name in one})
    args = ("merge", *models, "--base", base, "--method", "dare", "--out", tmp_path / "dare")
    report = json.loads(run(*args, "--set", "density=0.3", "--json"))
    assert report["merged"] == "checkpoints"
    assert set(weights(tmp_path / "dare")) == set(one)


def test_what_cannot_be_merged_is_said(tmp_path: Path) -> None:
    base, _, folders = modules(tmp_path)
    out = tmp_path / "out"
    cases: list[tuple[list[Any], str]] = [
        ([folders[0], base], "holds a module and .*base does not; merge or compare modules with"),
        ([tmp_path / "nowhere"], "nowhere is no folder"),
        (folders, "which host is .*if for.* name it with --base"),
        ([*folders, "--base", base, "--name", "../x"], "'../x' cannot name a module"),
        ([*folders, "--base", base, "--method", "fisher"], "there are average"),
        ([*folders, "--base", base, "--set", "t=1"], "t=1: .* its options"),
        ([*folders, "--base", base, "--rank", "99"], "so the rank is 1 to 16"),
        ([*folders, "--base", tmp_path], "no config.json here"),
        ([base, "--rank", "2"], "--rank and --into-model are of modules"),
        ([base, "--method", "ties"], "name that one: --base"),
        ([base, "--method", "greedy_soup"], "asks a function of yours"),
    ]
    for args, said in cases:
        with pytest.raises(ModgraftError, match=said):
            run("merge", *args, "--out", out)
    saved(tmp_path / "other", seed=3)
    with pytest.raises(ModgraftError, match=r"trained in another host \(weights"):
        run("merge", *folders, "--out", out, "--base", tmp_path / "other")
    result = CliRunner().invoke(app, ["merge", str(base), "--out", str(out), "--weights", "a,1"])
    assert result.exit_code == 2
    assert not out.exists()


# -- diff ----------------------------------------------------------------------------------------


def changed(tmp_path: Path) -> tuple[Path, Path, str]:
    """Save a model, and it with a change of rank 2 and length 3 in one weight, and a new one."""
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    tensors = load_file(two / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    tensors[name][0, 0] += 3 / 2**0.5
    tensors[name][1, 1] += 3 / 2**0.5
    tensors["new"] = torch.zeros(2)
    save_file(tensors, two / "model.safetensors", {"format": "pt"})
    return one, two, name


def test_diff_says_what_differs_between_checkpoints(tmp_path: Path) -> None:
    one, two, name = changed(tmp_path)
    picture = tmp_path / "pictures" / "diff.png"
    text = run("diff", one, two, "--ranks", "--plot", picture)
    before, after = (load_file(each / "model.safetensors") for each in (one, two))
    relative = 3 / before[name].norm()
    cosine = torch.cosine_similarity(before[name].flatten(), after[name].flatten(), 0)
    found = lines(text)[name]
    assert found[4:] == [f"{relative:.3g}", f"{cosine:.4f}", "2"]
    assert "only in B" in text
    assert f"{len(after)} weights, {len(before) - 1} of them equal" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(lines(run("diff", one, two, "--all"))) > len(before)
    rows = json.loads(run("diff", one, two, "--json"))["rows"]
    assert [row["name"] for row in rows if row["relative"]] == [name]
    same = run("diff", one, one)
    assert same == f"checkpoints: {len(before)} weights, {len(before)} of them equal\n"


def test_diff_compares_what_was_learned_from_a_base(tmp_path: Path) -> None:
    base, one, two = three(tmp_path)
    rows = compare_checkpoints(one, two, base, ranks=True)
    origin, a, b = map(weights, (base, one, two))
    for row in rows:
        x, y = (each[row.name].double() - origin[row.name].double() for each in (a, b))
        assert row.one == pytest.approx(float(x.norm()), rel=1e-5)
        if row.one:
            assert row.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)
            cosine = torch.cosine_similarity(x.flatten(), y.flatten(), 0)
            assert row.cosine == pytest.approx(float(cosine), abs=1e-5)
        if x.dim() == 2:
            assert row.rank == min(x.shape)
    text = run("diff", one, two, "--base", base)
    assert f"{len(rows)} weights" in text


def test_diff_of_other_shapes_and_types(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, 3), "n": torch.tensor([1, 2]), "same": torch.ones(2)}
    others = {"w": torch.ones(3, 2), "n": torch.tensor([1, 3]), "same": torch.ones(2).half()}
    for name, each in (("a", tensors), ("b", others), ("c", {**tensors, "n": torch.ones(2)})):
        (tmp_path / name).mkdir()
        save_file(each, tmp_path / name / "model.safetensors")
    text = lines(run("diff", tmp_path / "a", tmp_path / "b"))
    assert text["w"][-2:] == ["another", "shape"]
    assert text["n"][-3:] == ["other", "whole", "numbers"]
    assert "same" not in text
    assert lines(run("diff", tmp_path / "a", tmp_path / "c"))["n"][-1] == "numbers"


def test_diff_compares_the_changes_of_modules(tmp_path: Path) -> None:
    base, host, folders = modules(tmp_path)
    implanted(host, "lora", "up", "elsewhere")
    other = host.save("elsewhere", tmp_path / "elsewhere")
    rows = json.loads(run("diff", *folders, "--base", base, "--json"))["rows"]
    assert {row["name"] for row in rows} == set(host["lora"].paths)
    assert all(row["rank"] == 16 and abs(row["cosine"]) < 0.9 for row in rows)
    assert "only in A" in run("diff", folders[0], other, "--base", base)
    half = run("merge", folders[0], "--base", base, "--out", tmp_path / "half", "--method",
               "arithmetic", "--weights", "0.5")  # fmt: skip
    assert "LoRA(rank=2)" in half
    rows = json.loads(run("diff", folders[0], tmp_path / "half", "--base", base, "--json"))["rows"]
    for row in rows:
        assert row["relative"] == pytest.approx(0.5, rel=1e-5)
        assert row["cosine"] == pytest.approx(1)
        assert row["rank"] == 2


def test_a_refusal_shows_no_bar_and_one_module_is_no_modules(tmp_path: Path) -> None:
    paths = [str(saved(tmp_path / name)) for name in "ab"]
    words = ["merge", *paths, "--method", "dare", "--base", paths[0], "--out", str(tmp_path / "o")]
    said = CliRunner().invoke(app, [*words, "--set", "density="])
    assert said.exit_code == 1
    assert said.stderr == "2 checkpoints, dare\n"
    said = CliRunner().invoke(app, ["merge", paths[0], "--out", str(tmp_path / "o")])
    assert said.stderr.startswith("1 checkpoint, average\n")


def test_the_package_runs_as_the_command() -> None:
    run = [sys.executable, "-m", "modgraft", "--version"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
