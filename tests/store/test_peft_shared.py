"""Layers and weights that a host has at two places, of which PEFT changes one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import modgraft as mg

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

IDS = torch.arange(2, 14).reshape(2, 6)


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Twice(nn.Module):
    """A layer that runs twice, by two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_a_copy_of_one_side_of_a_tied_weight_is_refused(tmp_path: Path, whole: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[whole])
    model: Any = peft.get_peft_model(llama(tied=True), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    host = mg.Host(llama(tied=True)).eval()
    with torch.no_grad():
        before = host(input_ids=IDS).logits
        with pytest.raises(mg.ModgraftError, match="is the same weight, which PEFT leaves"):
            host.load(tmp_path)
        assert torch.equal(host(input_ids=IDS).logits, before)


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_copy_that_stays_tied_is_the_shared_weight(tmp_path: Path, whole: list[str]) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=whole, ensure_weight_tying=True
    )
    model: Any = peft.get_peft_model(llama(tied=True), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "a")
    host = mg.Host(llama(tied=True)).eval()
    with torch.no_grad():
        before = host(input_ids=IDS).logits
        host.load(tmp_path / "a")
        torch.testing.assert_close(host(input_ids=IDS).logits, model(input_ids=IDS).logits)
        host.remove("a")
        assert torch.equal(host(input_ids=IDS).logits, before)


def test_a_lora_of_a_tied_embedding_names_the_option(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    peft.get_peft_model(llama(tied=True), config).save_pretrained(tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(mg.ModgraftError, match="ensure_weight_tying gives lm_head what the embed"):
        mg.Host(llama(tied=True)).load(tmp_path / "a")


def copied(tmp_path: Path, *whole: str) -> tuple[Path, Tensor]:
    """Return PEFT's folder of copies that trained in a tied model, and PEFT's logits."""
    llama(tied=True).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[*whole])
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model: Any = peft.get_peft_model(base, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
        logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", logits


def check_untied(model: Any, folder: Path, logits: Tensor) -> None:
    """Untie a model as the error advises, and compare what it gives with PEFT."""
    model.lm_head = copy.deepcopy(model.lm_head)
    model.config.tie_word_embeddings = False
    host = mg.Host(model)
    host.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(host(input_ids=IDS).logits, logits)


def test_a_host_that_is_untied_as_advised_gives_pefts_logits(tmp_path: Path) -> None:
    folder, logits = copied(tmp_path, "embed_tokens")
    model: Any = llama(tied=True)
    with pytest.raises(mg.ModgraftError) as refused:
        mg.Host(model).load(folder)
    advice = str(refused.value).partition("before it is a host: ")[2]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()  # type: ignore[no-untyped-call]
    assert advice == (
        "model.lm_head = copy.deepcopy(model.lm_head); model.config.tie_word_embeddings = False"
    )
    check_untied(model, folder, logits)


def test_a_random_head_in_place_of_a_tied_one_is_refused(tmp_path: Path) -> None:
    folder, _ = copied(tmp_path, "embed_tokens")
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=False)
    host = mg.Host(model.eval())
    with pytest.raises(mg.ModgraftError, match=r"lm_head\.weight of this host is another"):
        host.load(folder)
    assert not host.implants


def test_copies_of_both_sides_of_a_tie_name_it(tmp_path: Path) -> None:
    folder, logits = copied(tmp_path, "embed_tokens", "lm_head")
    model: Any = llama(tied=True)
    with pytest.raises(
        mg.ModgraftError, match=r"are two weights in the file, .* they are the same weight"
    ):
        mg.Host(model).load(folder)
    check_untied(llama(tied=True), folder, logits)


def test_a_tied_weight_that_trained_is_not_written(tmp_path: Path) -> None:
    host = mg.Host(llama(tied=True))
    host.implant("a", mg.LoRA(rank=2), at="query")
    with host.training_only(["a", "host.lm_head"]):
        with pytest.raises(mg.ModgraftError, match="leave the other as it was"):
            host.save("a", tmp_path / "a", format="peft")
        assert not (tmp_path / "a").exists()
    free = mg.Host(llama(tied=False))
    free.implant("a", mg.LoRA(rank=2), at="query")
    with free.training_only(["a", "host.lm_head"]):
        free.save("a", tmp_path / "a", format="peft")


def test_a_layer_of_two_names_is_refused_both_ways(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["a"])
    peft.get_peft_model(Twice(), config).save_pretrained(tmp_path / "theirs")  # type: ignore[arg-type]
    host = mg.Host(Twice())
    with pytest.raises(mg.ModgraftError, match="a is also b in this host"):
        host.load(tmp_path / "theirs")
    host.implant("m", mg.LoRA(rank=2), at="a")
    with pytest.raises(mg.ModgraftError, match="at a, also b, and PEFT"):
        host.save("m", tmp_path / "ours", format="peft")
    host.save("m", tmp_path / "m")


def test_a_head_whose_name_ends_another_is_written_with_it(tmp_path: Path) -> None:
    def model() -> DistilBertForSequenceClassification:
        torch.manual_seed(0)
        return DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
        ).eval()

    config = peft.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS")
    theirs: Any = peft.get_peft_model(model(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
        expected = theirs.eval()(input_ids=IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    host = mg.Host(model()).eval()
    host.load(tmp_path / "theirs")
    host.save(None, tmp_path / "again", format="peft")
    back: Any = peft.PeftModel.from_pretrained(model(), tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(host(input_ids=IDS).logits, expected)
        torch.testing.assert_close(back(input_ids=IDS).logits, expected)
