"""``modgraft convert``: there and back, in the formats of other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification
from typer.testing import CliRunner

import modgraft as mg
from modgraft.cli.app import app

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
