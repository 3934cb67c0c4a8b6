"""Modules merged and compared from their folders, with the heads that trained beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers import BertForSequenceClassification as Bert
from typer.testing import CliRunner

import modgraft as mg
from common import kept
from modgraft.cli import merge as command
from modgraft.cli.app import app
from modgraft.core.errors import ModgraftError
from modgraft.store.folder import native
from modgraft.store.merging.diff import compare_modules
from modgraft.store.merging.folders import merge_folders

CONFIG: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 4,
}  # fmt: skip
HEAD = ("classifier.bias", "classifier.weight")


def base(folder: Path) -> Path:
    torch.manual_seed(0)
    Bert(BertConfig(**CONFIG)).save_pretrained(folder / "base")
    return folder / "base"


def host_of(folder: Path) -> mg.Host:
    return mg.Host(AutoModelForSequenceClassification.from_pretrained(folder)).eval()


def saved(
    folder: Path, name: str, seed: int, head: bool = True, method: Any = None, **about: Any
) -> Path:
    """Save a module that trained for one step, with a head of its own or none."""
    host = host_of(folder / "base")
    torch.manual_seed(seed)
    host.implant(name, method or mg.LoRA(rank=2), ["query", "value"] if not method else "block")
    batch = {"input_ids": torch.randint(4, 40, (8, 6)), "labels": torch.randint(0, 4, (8,))}
    train = [name, "host.classifier"] if head else [name]
    host.fit([batch], train=train, steps=2, lr=3e-2, progress=False)
    return host.save(name, folder / name, **about)


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def heads(folder: Path) -> dict[str, Tensor]:
    return {k[1:]: t for k, t in kept(folder).items() if k.startswith(":")}


def test_heads_that_differ_are_chosen_or_refused(tmp_path: Path) -> None:
    origin = base(tmp_path)
    folders = [saved(tmp_path, name, seed) for seed, name in enumerate(("qa", "nli"))]
    bare = saved(tmp_path, "bare", 2, head=False)
    host = host_of(origin)
    before = {k: v.clone() for k, v in host.model.state_dict().items()}

    def here() -> dict[str, Tensor]:
        return {name: host.model.get_parameter(name) for name in HEAD}

    with pytest.raises(
        ModgraftError, match=r"qa and .*nli each trained .* values: classifier\.bia"
    ):
        merge_folders(host, folders, "no")
    for wrong, said in (("mean", "'mean': there are average, none"), ("bare2", "whose it is: qa")):
        with pytest.raises(ModgraftError, match=said):
            merge_folders(host, folders, "no", heads=wrong)
    with pytest.raises(ModgraftError, match=r"nli is named twice"):
        merge_folders(host, [*folders, str(folders[1])], "no", heads="none")
    with pytest.raises(ModgraftError, match="greedy_soup asks for scores of modules in one host"):
        merge_folders(host, folders, "no", "greedy_soup", heads="none", validate=len)
    with pytest.raises(ModgraftError, match="sum to 0"):
        merge_folders(host, folders, "no", "arithmetic", heads="average", weights=[1, -1])
    assert not host.implants
    own = [heads(folder) for folder in folders]
    assert tuple(own[0]) == tuple(sorted(own[0])) == HEAD
    mean = {n: (3 * own[0][n].double() + own[1][n].double()) / 4 for n in HEAD}
    turned = {n: 0.75 * own[0][n].double() + 0.25 * own[1][n].double() for n in HEAD}
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"heads": "average", "weights": [3, 1, 2]}, mean),  # the third has none
        ({"heads": "nli"}, own[1]),
        ({"heads": "none"}, {n: before[n] for n in HEAD}),
    ]
    for number, (options, expected) in enumerate(cases):
        new = merge_folders(host, [*folders, bare], f"m{number}", **options)
        for name, tensor in here().items():
            torch.testing.assert_close(tensor.double(), expected[name].double())
        assert [p["tensors"] for p in new.provenance["parents"]] == [
            native(folder).card.tensors for folder in (*folders, bare)
        ]
        folder = host.save(new.name, tmp_path / new.name)
        assert tuple(sorted(heads(folder))) == (() if options["heads"] == "none" else HEAD)
        host.remove(new.name)
        assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    merge_folders(host, folders, "s", "slerp", heads="average", t=0.25)
    for name, tensor in here().items():
        torch.testing.assert_close(tensor.double(), turned[name])


def test_the_changes_are_those_of_a_merge_in_one_host(tmp_path: Path) -> None:
    origin = base(tmp_path)
    folders = [saved(tmp_path, name, seed) for seed, name in enumerate(("qa", "nli"))]
    host = host_of(origin)
    new = merge_folders(host, folders, "both", "arithmetic", heads="none", weights=[1, -0.5])
    apart = host_of(origin)
    for folder in folders:
        own = host_of(origin)
        handle = own.load(folder)
        apart.implant(handle.name, mg.LoRA(rank=2), ["query", "value"], active=False)
        apart[handle.name].places.load_state_dict(handle.places.state_dict())
    x = torch.arange(12)[None] % 40
    with torch.no_grad():
        torch.testing.assert_close(
            host(input_ids=x, modules=new.name).logits,
            apart(input_ids=x, modules="qa - 0.5*nli").logits,
        )


def test_equal_heads_and_a_head_of_one_come_along(tmp_path: Path) -> None:
    base(tmp_path)
    one, bare = saved(tmp_path, "qa", 0), saved(tmp_path, "bare", 1, head=False)
    for number, pair in enumerate(([one, bare], [bare, one])):
        out = tmp_path / f"out{number}"
        run("merge", *pair, "--base", tmp_path / "base", "--out", out)
        found = heads(out)
        assert all(torch.equal(found[name], tensor) for name, tensor in heads(one).items())


def test_the_command_line_takes_heads(tmp_path: Path) -> None:
    """Into a module, and into a model."""
    origin = base(tmp_path)
    folders = [saved(tmp_path, name, seed) for seed, name in enumerate(("qa", "nli"))]
    args = ["merge", *folders, "--base", origin, "--out", tmp_path / "out"]
    with pytest.raises(ModgraftError, match="--heads average, none, or the module whose it is"):
        run(*args)
    assert not (tmp_path / "out").exists()
    report = json.loads(run(*args, "--heads", "average", "--json"))
    assert report["heads"] == "average"
    own = [heads(folder) for folder in folders]
    for name, tensor in heads(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (own[0][name] + own[1][name]) / 2)
    run(*args[:-1], tmp_path / "model", "--heads", "qa", "--into-model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(model.classifier.weight, own[0]["classifier.weight"])


def test_the_host_of_the_card_brings_what_is_beside_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, or a hub's name; and the merged module keeps that name."""
    origin = base(tmp_path)
    for name in ("vocab.txt", "generation_config.json"):
        (origin / name).write_text("{}")
    folders = [
        saved(tmp_path, name, seed, False, base_model=str(origin))
        for seed, name in enumerate(("qa", "nli"))
    ]
    run("merge", *folders, "--out", tmp_path / "both")
    assert native(tmp_path / "both").card.base_model == str(origin)
    run("merge", tmp_path / "both", folders[0], "--out", tmp_path / "model", "--into-model")
    assert (tmp_path / "model" / "vocab.txt").read_text() == "{}"
    assert (tmp_path / "model" / "generation_config.json").is_file()
    asked: list[Any] = []

    def fetched(name: str, **which: Any) -> str:
        asked.append((name, which))
        return str(origin)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert command._beside_weights("some/hub") == origin
    assert asked[0][0] == "some/hub"
    assert "*.safetensors" in asked[0][1]["ignore_patterns"]

    def fails(name: str, **which: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(ModgraftError, match=r"some/hub cannot be fetched \(no network\); give its"):
        command._beside_weights("some/hub")


def test_the_class_and_the_labels_are_those_of_the_card(tmp_path: Path) -> None:
    """The base is an encoder of another class, without a head."""
    origin = base(tmp_path)
    model: Any = host_of(origin).model
    model.bert.save_pretrained(tmp_path / "encoder")
    folders = [saved(tmp_path, name, seed) for seed, name in enumerate(("qa", "nli"))]
    args = ["merge", *folders, "--base", tmp_path / "encoder", "--heads", "nli"]
    run(*args, "--out", tmp_path / "model", "--into-model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(model.classifier.weight, heads(folders[1])["classifier.weight"])


@pytest.mark.filterwarnings("ignore")
def test_the_host_of_folders_that_peft_wrote(tmp_path: Path) -> None:
    """With a head in ``modules_to_save``."""
    origin = base(tmp_path)
    for seed, name in enumerate("ab"):
        bare = AutoModelForSequenceClassification.from_pretrained(origin)
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        model: Any = peft.get_peft_model(bare, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.2)
        model.save_pretrained(tmp_path / name)
    run("merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both", "--heads", "b")
    card = native(tmp_path / "both").card
    assert card.base_model == str(origin)
    host = host_of(origin)
    host.load(tmp_path / "both")
    peer: Any = peft.PeftModel.from_pretrained(host_of(origin).model, tmp_path / "b")
    theirs = peer.base_model.model.classifier.modules_to_save.default.weight
    assert torch.equal(host.model.get_parameter("classifier.weight"), theirs)


# -- diff ----------------------------------------------------------------------------------------


def test_diff_compares_heads(tmp_path: Path) -> None:
    origin = base(tmp_path)
    folders = [saved(tmp_path, name, seed) for seed, name in enumerate(("qa", "nli"))]
    rows = json.loads(run("diff", *folders, "--base", origin, "--json"))["rows"]
    row = next(row for row in rows if row["name"] == "classifier.weight")
    one, other = (heads(folder)["classifier.weight"].double() for folder in folders)
    assert row["relative"] == pytest.approx(float((other - one).norm() / one.norm()), rel=1e-5)
    assert row["rank"] == torch.linalg.matrix_rank(other - one)


def test_diff_compares_the_tensors_of_adapters(tmp_path: Path) -> None:
    """Of one shape; of other widths; beside a change of weights, which has other tensors."""
    origin = base(tmp_path)
    one, two = (saved(tmp_path, n, s, False, mg.Adapter(width=3)) for s, n in enumerate("ab"))
    other = saved(tmp_path, "c", 2, False, mg.Adapter(width=2))
    rows = json.loads(run("diff", one, two, "--base", origin, "--json"))["rows"]
    tensors = [{k.split(":", 1)[1]: t for k, t in kept(folder).items()} for folder in (one, two)]
    assert {row["name"] for row in rows} == set(tensors[0])
    for row in rows:
        a, b = (each[row["name"]].double() for each in tensors)
        assert row["one"] == pytest.approx(float(a.norm()), rel=1e-5)
        assert row["relative"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-4)
        assert row["rank"] == (torch.linalg.matrix_rank(b - a) if a.dim() == 2 else None)
    assert "another shape" in run("diff", one, other, "--base", origin)
    lora = saved(tmp_path, "lora", 3, False)
    text = run("diff", one, lora, "--base", origin)
    assert "only in A" in text
    assert "only in B" in text


def test_prompts_and_what_holds_whole_numbers_are_compared() -> None:
    host = mg.Host(Bert(BertConfig(**CONFIG))).eval()
    for name in ("a", "b"):
        host.implant(name, mg.SoftPrompt(length=2), active=False)
    rows = compare_modules(host, "a", "b")
    assert [row.shape for row in rows] == [(2, 16)]
    assert compare_modules(host, "a", "a")[0].equal


def test_a_folder_of_several_is_named(tmp_path: Path) -> None:
    origin = base(tmp_path)
    host = host_of(origin)
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=2), "query", active=False)
    folder = host.save(["a", "b"], tmp_path / "bundle")
    for verb in (["merge", folder, "--out", tmp_path / "out"], ["diff", folder, folder]):
        with pytest.raises(ModgraftError, match="bundle holds a, b; what is merged or compared"):
            run(*verb, "--base", origin)
