"""Ours compute what transformers' models do, with the same weights, and become them again."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from modgraft.core.errors import ModgraftError
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.models.pretrained import from_transformers, to_transformers
from modgraft.models.t5 import T5
from modgraft.models.vit import ViT

V, D = 90, 48


def gpt2(**more) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=64, n_embd=D, n_layer=3, n_head=4, bos_token_id=1,
        eos_token_id=1, pad_token_id=0, **more)
    )  # fmt: skip


def llama(**more) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": V, "hidden_size": D, "intermediate_size": 100, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0} | more
        )
    )  # fmt: skip


def t5(**more) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=2,
        num_heads=4, decoder_start_token_id=0, **more)
    )  # fmt: skip


def vit(**more) -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=8, hidden_size=D, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=96, num_labels=10, **more)
    )  # fmt: skip


MODELS = {
    "gpt2": (gpt2, {}),
    "gpt2-gelu": (gpt2, {"activation_function": "gelu", "n_inner": 60}),
    "llama": (llama, {}),
    "llama-wide": (llama, {"head_dim": 16, "num_key_value_heads": 4, "rope_parameters":
                           {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-biased": (llama, {"attention_bias": True, "mlp_bias": True,
                             "tie_word_embeddings": True}),
    "t5-1.0": (t5, {}),
    "t5-1.1": (t5, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "vit": (vit, {}),
}  # fmt: skip
OURS = {"gpt2": GPT, "llama": GPT, "t5": T5, "vit": ViT}


def made(name: str) -> PreTrainedModel:
    """Make a model whose norms, biases and tables are not what they are at first."""
    make, more = MODELS[name]
    torch.manual_seed(0)
    model = make(**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(model: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        pictures = torch.randn(3, 3, 32, 32, generator=generator)
        return [{"pixel_values": pictures, "labels": torch.tensor([1, 5, 9])}]
    ids = torch.randint(2, V, (3, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    labels = {"labels": ids[:, :11].contiguous() if model.config.is_encoder_decoder else ids}
    return [{"input_ids": ids} | labels, {"input_ids": ids, "attention_mask": mask} | labels]


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_weights_are_the_same_both_ways(name):
    theirs = made(name)
    ours = from_transformers(theirs)
    assert type(ours) is OURS[theirs.config.model_type]
    back = to_transformers(ours)
    assert type(back) is type(theirs)
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in theirs.state_dict().items())
    for batch in batches(theirs):
        want, got, again = theirs(**batch), ours(**batch), back(**batch)
        seen = batch.get("attention_mask", torch.ones(3, 1)).bool()
        if want.logits.dim() == 3 and not theirs.config.is_encoder_decoder:
            want.logits, got.logits = (
                want.logits[seen.expand(3, 17)],
                got.logits[seen.expand(3, 17)],
            )
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.loss, want.loss, atol=0, rtol=0)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "vit"])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_same_text_is_written(name, how):
    theirs = made(name)
    ours = from_transformers(theirs)
    for batch in batches(theirs):
        batch.pop("labels")
        want = theirs.generate(**batch, max_new_tokens=20, **how)
        assert torch.equal(ours.generate(**batch, max_new_tokens=20, **how), want)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5-1.1", "vit"])
def test_gradients_are_the_same(name):
    theirs = made(name)
    ours = from_transformers(theirs)
    for model in (theirs, ours):
        model(**batches(theirs)[-1]).loss.backward()
    head = {"gpt2": "lm_head", "llama": "lm_head", "t5-1.1": "lm_head", "vit": "classifier"}[name]
    want, got = theirs.get_parameter(f"{head}.weight").grad, ours.get_parameter("head.weight").grad
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_the_random_state_is_the_callers():
    theirs = made("llama")
    before = torch.get_rng_state()
    to_transformers(from_transformers(theirs))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_is_read_and_the_dtype_is_kept(tmp_path):
    theirs = made("llama").to(torch.float64)
    theirs.save_pretrained(tmp_path)
    ours = from_transformers(tmp_path)
    assert ours.dtype == torch.float64
    batch = batches(theirs)[1]
    torch.testing.assert_close(ours(**batch).loss, theirs(**batch).loss)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"attn_pdrop": 0.3}, "attn_pdrop=0.3"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True, mlp_bias=False"),
        ("t5", {"feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
        ("vit", {"qkv_bias": False}, "qkv_bias=False"),
    ],
)
def test_a_setting_that_ours_has_not_is_refused(name, change, said):
    model = {"gpt2": gpt2, "llama": llama, "t5": t5, "vit": vit}[name](**change)
    with pytest.raises(ModgraftError, match=said):
        from_transformers(model)


def test_what_no_family_has_is_refused_with_what_it_is():
    odd = GPT(GPTConfig(vocab_size=V, hidden_size=D, positions="axial", grid=(8, 8)))
    with pytest.raises(ModgraftError, match=r"GPT-2: positions='axial'.*Llama: positions='axial'"):
        to_transformers(odd)
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ModgraftError, match="what a 'bert' does; there are gpt2, llama, t5, vit"):
        from_transformers(BertForMaskedLM(small))
