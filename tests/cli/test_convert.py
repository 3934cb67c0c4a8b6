"""``modgraft convert``: there and back, in the formats of other tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification
from typer.testing import CliRunner

import modgraft as mg
from modgraft.cli.app import app
from modgraft.store.folder import native
from modgraft.store.verify import verify

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip
IDS = torch.arange(2, 14).reshape(2, 6)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, words)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def host_of(model: Path) -> mg.Host:
    return mg.Host(BertForMaskedLM.from_pretrained(model)).eval()


@pytest.mark.parametrize("to", ["peft", "adapterhub"])
def test_there_and_back_it_computes_the_same(model: Path, tmp_path: Path, to: str) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2, alpha=4.0), at=["query", "value"])
    with torch.no_grad():
        for parameter in host["qa"].parameters():
            parameter.normal_(0, 0.3)
        expected = host(input_ids=IDS).logits
    host.save("qa", tmp_path / "ours")
    said = run(tmp_path / "ours", tmp_path / "theirs", "--to", to, "--host", model)
    assert said.exit_code == 0, said.output
    assert "LoRA" in said.output
    said = run(tmp_path / "theirs", tmp_path / "again", "--host", model, "--json")
    assert said.exit_code == 0, said.output
    report = json.loads(said.stdout)
    assert [each["sites"] for each in report["modules"]] == [4]
    back = host_of(model)
    back.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(back(input_ids=IDS).logits, expected)


def test_a_class_and_its_settings_are_given(tmp_path: Path) -> None:
    kind = BertForSequenceClassification
    model = tmp_path / "model"
    kind(BertConfig(**SHAPE, num_labels=3)).save_pretrained(model)
    said = json.loads((model / "config.json").read_text("utf-8"))
    said |= {"architectures": ["BertModel"], "id2label": None, "label2id": None}  # as a bare one
    (model / "config.json").write_text(json.dumps(said), "utf-8")
    host = mg.Host(kind.from_pretrained(model, num_labels=3))
    host.implant("c", mg.LoRA(rank=2), at="query")
    with torch.no_grad():
        host.model.get_submodule("classifier").weight.normal_()  # type: ignore[operator, union-attr]
    with host.training_only(["c", "host.classifier"]):
        host.save("c", tmp_path / "c", format="peft")
    named = ["--class", kind.__name__, "--set", "num_labels=3"]
    done = run(tmp_path / "c", tmp_path / "again", "--host", model, *named)
    assert done.exit_code == 0, done.output
    back = mg.Host(kind.from_pretrained(model, num_labels=3))
    back.load(tmp_path / "again")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(host.model.get_parameter(name), back.model.get_parameter(name))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--host", "MODEL", "--class", "BertForNothing"], "BertForNothing"),
        (["--host", "MODEL", "--to", "onnx"], "there are modgraft, peft, adapterhub"),
        ([], "does not say which model it is for"),
    ],
)
def test_bad_input(model: Path, tmp_path: Path, words: list[str], why: str) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.save("qa", tmp_path / "ours")
    given = [str(model) if word == "MODEL" else word for word in words]
    said = run(tmp_path / "ours", tmp_path / "out", *given)
    assert said.exit_code != 0
    assert why in str(said.exception)
    assert not (tmp_path / "out").exists()


def test_what_is_no_module_is_said(model: Path, tmp_path: Path) -> None:
    for folder, why in (
        (tmp_path / "nope", "there is no such folder"),
        (model, "there is no module in .*: a model is there"),
        (tmp_path, "there is no module in"),
    ):
        said = run(folder, tmp_path / "out")
        assert said.exit_code != 0
        assert re.search(why, str(said.exception))
        assert not (tmp_path / "out").exists()


ABOUT: dict[str, Any] = {
    "metrics": {"f1": 0.75, "em": 0.5}, "licence": "apache-2.0", "description": "Answers questions",
    "task": "question-answering", "data": "SQuAD", "command": "make qa", "base_model": "me/model",
    "provenance": {"from": "a run"},
}  # fmt: skip


def about(folder: Path) -> dict[str, Any]:
    card = native(folder).card
    return {field: getattr(card, field) for field in ABOUT}


def test_what_is_known_goes_along(model: Path, tmp_path: Path) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.save("qa", tmp_path / "ours", **ABOUT)
    given = ["--host", model]
    assert run(tmp_path / "ours", tmp_path / "copy", *given, "--name", "squad").exit_code == 0
    assert about(tmp_path / "copy") == ABOUT
    assert native(tmp_path / "copy").card.names == ["squad"]
    for to in ("peft", "adapterhub"):
        theirs, again = tmp_path / to, tmp_path / f"{to}-again"
        assert run(tmp_path / "ours", theirs, "--to", to, *given).exit_code == 0
        page = (theirs / "README.md").read_text("utf-8")
        assert all(word in page for word in ("apache-2.0", "Answers questions", "| f1 | 0.75 |"))
        done = run(theirs, again, *given, "--name", "squad", "--json")
        assert done.exit_code == 0, done.output
        assert [each["name"] for each in json.loads(done.stdout)["modules"]] == ["squad"]
        fields = ("metrics", "licence", "task", "base_model")
        assert {f: about(again)[f] for f in fields} == {f: ABOUT[f] for f in fields}
        assert (again / "README.md").read_text("utf-8") == page  # somebody's own, with the rest
        assert verify(again).problems == []


def test_one_module_stays_one_and_several_their_composition(model: Path, tmp_path: Path) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.implant("b", mg.LoRA(rank=2), at="value")
    host.use("0.5*qa + b")
    host.save("qa", tmp_path / "one")
    host.save(["qa", "b"], tmp_path / "two")
    host.save("qa", tmp_path / "theirs", format="peft")
    for folder, together in (("one", False), ("theirs", False), ("two", True)):
        done = run(tmp_path / folder, tmp_path / f"{folder}-new", "--host", model)
        assert done.exit_code == 0, done.output
        assert native(tmp_path / f"{folder}-new").card.together == together
    assert native(tmp_path / "two-new").card.composition == "0.5*qa + b"
    said = run(tmp_path / "two", tmp_path / "x", "--host", model, "--name", "squad")
    assert "holds qa, b, which --name 'squad' cannot all be called" in str(said.exception)


def test_a_readme_that_cannot_be_read_is_said(model: Path, tmp_path: Path) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    folder = host.save("qa", tmp_path / "theirs", format="peft")
    for number, page in enumerate(("---\n- a\n---\n", "---\na: [\n---\n", "---\n3\n---\n")):
        (folder / "README.md").write_text(page)
        done = run(folder, tmp_path / f"{number}", "--host", model)
        assert done.exit_code == 0, done.output
        assert "its head cannot be read" in done.stderr
        assert (tmp_path / f"{number}" / "README.md").read_text() == page
    (folder / "README.md").write_text("no head")
    assert run(folder, tmp_path / "plain", "--host", model).exit_code == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--class", "set_seed"], "config is a BertConfig, and set_seed makes no models of it"),
        (["--class", "BertConfig"], "BertConfig makes no models|BertConfig makes models"),
        (["--class", "Trainer"], "Trainer makes no models of it"),
        (["--class", "GPT2LMHeadModel"], "GPT2LMHeadModel makes models of a GPT2Config"),
        (["--class", "AutoModelForSpeechSeq2Seq"], "makes no models of it"),
        (["--set", "num_labels=many"], "See whether --set num_labels=many is right"),
        (["--set", "hidden_size=20"], "See whether --set hidden_size=20 is right"),
        (["--set", "num_hidden_layers=null"], "See whether --set num_hidden_layers=None is right"),
        (["--set", "num_lables=3"], "a BertConfig has no num_lables"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_classes_and_settings_that_cannot_be(
    model: Path, tmp_path: Path, words: list[str], why: str
) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.save("qa", tmp_path / "ours")
    said = run(tmp_path / "ours", tmp_path / "out", "--host", model, *words)
    assert isinstance(said.exception, mg.ModgraftError), said.exception
    assert re.search(why, str(said.exception)), said.exception
    assert not (tmp_path / "out").exists()


def test_an_auto_class_is_one_of_models(model: Path, tmp_path: Path) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.save("qa", tmp_path / "ours")
    words = ["--host", model, "--class", "AutoModelForMaskedLM"]
    assert run(tmp_path / "ours", tmp_path / "out", *words).exit_code == 0


def test_a_host_of_other_weights_is_refused_in_the_commands_words(
    model: Path, tmp_path: Path
) -> None:
    host = host_of(model)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    for name in ("ours", "again"):
        host.save("qa", tmp_path / name)
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(model)
    said = run(tmp_path / "ours", tmp_path / "out", "--host", model)
    assert str(said.exception).endswith("or say --no-strict to try it all the same")
    with pytest.warns(UserWarning, match=r"qa is loaded into another host .*: .+ by \d+ %"):
        assert (
            run(tmp_path / "ours", tmp_path / "out", "--host", model, "--no-strict").exit_code == 0
        )
    for command in (["diff"], ["merge", "--out", str(tmp_path / "merged")]):
        words = [*command, str(tmp_path / "ours"), str(tmp_path / "again"), "--base", str(model)]
        said = CliRunner().invoke(app, words)
        assert str(said.exception).endswith("or say --no-strict to try it all the same")
        with pytest.warns(UserWarning, match="qa is loaded into another host") as told:
            assert CliRunner().invoke(app, [*words, "--no-strict"]).exit_code == 0
        for folder, each in zip(("ours", "again"), told, strict=True):  # of either, once
            assert re.search(rf"{folder}: qa is .*tensors: .+ by \d+ %", str(each.message))
    with pytest.raises(mg.ModgraftError, match="or say strict=False to try it all the same"):
        host_of(model).load(tmp_path / "ours")
