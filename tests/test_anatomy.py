"""Every role of every family finds its sites on a real model of the family."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Model,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    ViTModel,
)

import modgraft as mg
from hosts import HOSTS
from modgraft.core.architectures import FAMILIES, family_of

SHAPE = {
    "vocab_size": 41,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DECODER = {**SHAPE, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    **{name: HOSTS[name].make for name in ("t5", "bert", "gpt2", "llama", "vit")},
    "gated t5": lambda: MT5ForConditionalGeneration(
        MT5Config(vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "t5 encoder": lambda: T5EncoderModel(
        T5Config(vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=1)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER)),
    "bare bert": lambda: BertModel(HOSTS["bert"].make().config),
    "bare gpt2": lambda: GPT2Model(HOSTS["gpt2"].make().config),
    "bare llama": lambda: LlamaModel(HOSTS["llama"].make().config),
    "bare vit": lambda: ViTModel(HOSTS["vit"].make().config),
}
ONCE = ("embedding", "encoder.output", "decoder.output")


@pytest.mark.parametrize("name", MODELS)
def test_every_role_finds_its_sites(name: str) -> None:
    model = MODELS[name]()
    family = family_of(model)
    assert family is not None
    host = mg.Host(model)
    for role in family.roles:
        if name == "t5 encoder" and role in ("cross_attention", "decoder.output"):
            with pytest.raises(mg.ModgraftError, match="matches no site"):
                host.sites(role)
            continue
        sites = host.sites(role)
        layers = len(sites)
        if role in ONCE:
            assert layers == (2 if role == "embedding" and name in ("t5", "gated t5") else 1)
        else:
            assert layers % 2 == 0  # two layers
        for site in sites:
            assert site.width in (8, 16, 24, 64)
            if role in ("query", "key", "value", "output", "up", "down"):
                host.implant("m", mg.LoRA(rank=2), at=site.label, expect=1)
                host.remove("m")


def test_families_do_not_overlap() -> None:
    kinds = [kind for family in FAMILIES for kind in family.types]
    assert len(kinds) == len(set(kinds))
    assert family_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["qwen2", "roberta"])
@torch.no_grad()
def test_a_module_acts_where_the_role_says(name: str) -> None:
    model = MODELS[name]().eval()
    host, batch = mg.Host(model).eval(), {"input_ids": torch.randint(3, 41, (2, 6))}
    bare = host(**batch).logits
    host.implant("m", mg.LoRA(rank=2), at=["query", "value"], expect=4)
    assert torch.equal(host(**batch).logits, bare)
    for place in host["m"].places:
        place.B.normal_()
    changed = host(**batch).logits
    assert not torch.allclose(changed, bare)
    torch.testing.assert_close(host.merge("m")(**batch).logits, changed, rtol=1e-4, atol=1e-5)
