"""LoRA of PEFT whose rank is above a layer's smaller side, which no LoRA has here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import modgraft as mg
from store.peft_cases import Case, batch_of, lora, model_of, output, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def _shared_gate() -> nn.Module:
    torch.manual_seed(0)
    said: dict[str, Any] = {
        "vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8, "experts_implementation": "eager",
    }  # fmt: skip
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**said)).double().eval()


WIDE: dict[str, tuple[Case, str, tuple[int, int]]] = {
    "head": (lora("bert", "all-linear", r=8), "classifier", (3, 16)),
    "rslora": (lora("bert", "all-linear", r=8, use_rslora=True), "classifier", (3, 16)),
    "dora": (lora("bert", "all-linear", r=8, use_dora=True), "classifier", (3, 16)),
    "bias": (lora("bert", "all-linear", r=8, lora_bias=True), "classifier", (3, 16)),
    "no_alpha": (lora("bert", "all-linear", r=8, lora_alpha=0), "classifier", (3, 16)),
    "pattern": (
        lora("bert", ["query", "classifier"], rank_pattern={"classifier": 5},
             alpha_pattern={"classifier": 9}), "classifier", (3, 16),
    ),
    "embedding": (
        lora("bert", ["word_embeddings", "query"], rank_pattern={"word_embeddings": 20}),
        "bert.embeddings.word_embeddings", (41, 16),
    ),
    "convolution": (
        lora("resnet", ["convolution"], r=12), "resnet.embedder.embedder.convolution", (8, 147)
    ),
    "turned": (lora("gpt2", ["c_proj"], r=20), "transformer.h.0.attn.c_proj", (16, 16)),
    "experts": (
        lora("mixtral", ["q_proj"], target_parameters=["mlp.experts.down_proj", "gate.weight"],
             rank_pattern={"experts.down_proj": 20, "gate.weight": 4}),
        "model.layers.0.mlp.experts.down_proj", (16, 24),
    ),
    "shared_gate": (lora("", "all-linear", r=4), "model.layers.0.mlp.shared_expert_gate", (1, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_a_rank_above_the_smaller_side_is_the_same_change(name: str, tmp_path: Path) -> None:
    case, label, (rows, columns) = WIDE[name]
    model = model_of(case.host) if case.host else _shared_gate()
    batch = batch_of(case.host or "llama")
    made = trained(case, model, tmp_path / "theirs")
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path / "theirs", name="m")
    expected = output(made, batch)
    torch.testing.assert_close(output(host, batch), expected, rtol=0, atol=1e-9)
    place: Any = dict(zip(host["m"].paths, host["m"].places, strict=True))[label]
    least = min(rows, columns)
    assert place.A.shape[-2:] == (least, columns)
    assert place.B.shape[-2:] == (rows, least)
    host.save("m", tmp_path / "ours", format="peft")
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    torch.testing.assert_close(output(again.eval(), batch), expected, rtol=0, atol=1e-9)
    host.save("m", tmp_path / "own")
    other = mg.Host(copy.deepcopy(model)).eval()
    other.load(tmp_path / "own")
    assert torch.equal(output(other, batch), output(host, batch))


def test_both_factors_train_on(tmp_path: Path) -> None:
    case, model, batch = WIDE["head"][0], model_of("bert"), batch_of("bert")
    trained(case, model, tmp_path / "theirs")
    host = mg.Host(model)
    host.load(tmp_path / "theirs", name="m")
    batch["labels"] = torch.tensor([0, 1, 2])
    before = {name: p.detach().clone() for name, p in host["m"].named_parameters()}
    history = host.fit([batch], train=["m"], steps=20, lr=0.01, progress=False)
    assert all(not torch.equal(p, before[name]) for name, p in host["m"].named_parameters())
    assert history.losses[-1] < history.losses[0]
