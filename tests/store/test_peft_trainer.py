"""A real adapter for a pretrained host, made by transformers' Trainer with a head of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import modgraft as mg
from modgraft.models import minilm

pytestmark = pytest.mark.filterwarnings("ignore")


def _folder() -> Path:
    try:
        return minilm.folder()
    except mg.ModgraftError as error:
        pytest.skip(str(error))


def test_an_adapter_with_a_head_that_the_trainer_made(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(_folder(), num_labels=2).eval()

    texts = ["read a file", "open a folder", "add two numbers", "the sine of a number"] * 2
    tokenizer = AutoTokenizer.from_pretrained(_folder())
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    rows = [{k: v[i] for k, v in batch.items()} | {"labels": i // 2 % 2} for i in range(len(texts))]
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value"]
    )
    trainer = Trainer(
        peft.get_peft_model(model(), config),
        TrainingArguments(
            str(tmp_path / "run"), max_steps=4, learning_rate=0.01, report_to="none",
            per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits

        host = mg.Host(model())
        before = host(**batch).logits
        implant = host.load(tmp_path / "adapter")
        assert implant.beside == {"classifier.weight", "classifier.bias"}
        torch.testing.assert_close(host(**batch).logits, expected, rtol=0, atol=1e-5)
        assert (before - expected).abs().max() > 0.1

        host.save("adapter", tmp_path / "again", format="peft")
        again = peft.PeftModel.from_pretrained(model(), str(tmp_path / "again")).eval()
        torch.testing.assert_close(again(**batch).logits, expected, rtol=0, atol=1e-5)
        one, two = (
            load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "again")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
        assert said["task_type"] == "SEQ_CLS"

        host.remove("adapter")
        torch.testing.assert_close(host(**batch).logits, before, rtol=0, atol=0)
