"""Heads beside an adapter, as ``adapters`` writes them unless it is told not to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapterhub_format import FOLDER, MADE, model
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import modgraft as mg
from modgraft.core.errors import CheckpointError


def t5(tied: bool) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(**MADE["hosts"]["t5"]["config"])
    config.tie_word_embeddings = tied
    made = T5ForConditionalGeneration(config)
    with torch.no_grad():
        made.lm_head.weight.normal_()
    return made.eval()


def with_head(tmp_path: Path, head: torch.Tensor) -> Path:
    """Return the LoRA of a T5, and its head as save_adapter puts it there."""
    folder = Path(shutil.copytree(FOLDER / "saved" / "lora" / "t5", tmp_path / "t5"))
    save_file({"lm_head.weight": head.clone()}, folder / "model_head.safetensors")
    said = {
        "config": None, "hidden_size": 16, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "model_class": "T5ForConditionalGeneration", "model_name": "", "model_type": "t5",
        "name": None, "num_labels": 2, "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "head_config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_a_t5_comes_with_its_adapter(tied: bool, tmp_path: Path) -> None:
    here, there = t5(tied), t5(tied)
    if not tied:
        torch.nn.init.normal_(there.lm_head.weight)
    folder = with_head(tmp_path, there.lm_head.weight.detach())
    alone = Path(shutil.copytree(FOLDER / "saved" / "lora" / "t5", tmp_path / "alone"))
    host, expected = mg.Host(here), mg.Host(there)
    host.load(folder)
    expected.load(alone)
    ids = torch.arange(2, 12).reshape(2, 5)
    with torch.no_grad():
        logits = host(input_ids=ids, decoder_input_ids=ids).logits
        assert torch.equal(logits, expected(input_ids=ids, decoder_input_ids=ids).logits)
    if not tied:  # a tied head is the host's own
        host.save(None, tmp_path / "new", format="adapterhub")
        new = load_file(tmp_path / "new" / "model_head.safetensors")
        assert torch.equal(new["lm_head.weight"], there.lm_head.weight)


def test_another_tied_head_of_a_t5_is_refused(tmp_path: Path) -> None:
    folder = with_head(tmp_path, torch.randn(41, 16))
    host = mg.Host(t5(tied=True))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not the table of words"):
        host.load(folder)
    assert not host.implants


def test_a_bias_that_the_hosts_head_has_not_is_named(tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(FOLDER / "saved" / "head_classification" / "gpt2", tmp_path / "gpt2")
    )
    file = folder / "model_head.safetensors"
    save_file(load_file(file) | {"heads.m.1.bias": torch.ones(3)}, file)
    host = mg.Host(model("gpt2", "head_classification"))
    with pytest.raises(CheckpointError, match="score of this GPT2ForSequenceClassification has no"):
        host.load(folder)
    assert not host.implants


@pytest.mark.parametrize(
    ("model", "at", "head", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "0", "1", "heads of models of transf"),
        (
            ConvNextForImageClassification(
                ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
            ),
            "*.pwconv1", "classifier", "not in a convnext",
        ),
    ],
)  # fmt: skip
def test_a_head_that_adapters_has_not_is_refused(
    model: nn.Module, at: str, head: str, words: str, tmp_path: Path
) -> None:
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at=at)
    host.model.get_submodule(head).requires_grad_(True)
    with pytest.raises(mg.ModgraftError, match=words):
        host.save("a", tmp_path / "a", format="adapterhub")
    assert not (tmp_path / "a").exists()
