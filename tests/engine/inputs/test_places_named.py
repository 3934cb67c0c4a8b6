"""What a call says of places and lengths in its text is moved by the tokens before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import modgraft as mg

B, T = 2, 9
WORDS = (7, 8, 9)
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
ONE = torch.ones(B, 1, dtype=torch.long)


def xlm() -> Any:
    return tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4))


def xlnet() -> Any:
    config = tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return tf.XLNetForTokenClassification(config)


def luke() -> Any:
    config = tf.LukeConfig(**SMALL, entity_vocab_size=9, entity_emb_size=16)
    return tf.LukeForEntitySpanClassification(config)


def visual() -> Any:
    config = tf.VisualBertConfig(**SMALL, visual_embedding_dim=16)
    return tf.VisualBertForRegionToPhraseAlignment(config)


EYE = torch.randn(B, 4, 16, generator=torch.Generator().manual_seed(0))
HOSTS: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]]]] = {
    "lengths": (xlm, lambda k: {"lengths": torch.tensor([T, 7]) + k}),
    "entities": (
        luke,
        lambda k: {
            "entity_ids": ONE,
            "entity_attention_mask": ONE,
            "entity_position_ids": torch.tensor([[[1, 2, 3]]] * B) + k,
            "entity_start_positions": ONE + k,
            "entity_end_positions": 3 * ONE + k,
        },
    ),
    "phrases": (
        visual,
        lambda k: {
            "attention_mask": torch.ones(B, T + k, dtype=torch.long),
            "region_to_phrase_position": torch.tensor([[2, 5, 6]] * B) + k,
            "visual_embeds": EYE,
            "visual_attention_mask": torch.ones(B, 4),
        },
    ),
    "input_mask": (
        xlnet,
        lambda k: {"input_mask": torch.cat([torch.zeros(B, k), PADDED], 1)},
    ),
}
PADDED = torch.zeros(B, T)
PADDED[1, 7:] = 1


@pytest.mark.parametrize("what", HOSTS)
@torch.no_grad()
def test_it_is_as_with_the_words_in_the_text(what: str) -> None:
    torch.manual_seed(0)
    make, given = HOSTS[what]
    bare = make().eval()
    host = mg.Host(copy.deepcopy(bare)).eval()
    host.implant("p", mg.Prompt("x", ids=WORDS, at_start=True))
    ids = torch.randint(10, 99, (B, T))
    longer = torch.cat([torch.tensor([WORDS] * B), ids], 1)
    wanted = bare(input_ids=longer, **given(len(WORDS))).logits
    if wanted.shape[1] == longer.shape[1]:
        wanted = wanted[:, len(WORDS) :]
    torch.testing.assert_close(host(input_ids=ids, **given(0)).logits, wanted)
    each = host(input_ids=ids, **given(0), modules=["p", None]).logits
    torch.testing.assert_close(each[:1], wanted[:1], atol=2e-5, rtol=1e-5)
    alone = bare(input_ids=ids, **given(0)).logits
    torch.testing.assert_close(each[1:], alone[1:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_question_is_as_long_as_it_is() -> None:
    config = tf.BigBirdConfig(**SMALL, attention_type="original_full")
    model = tf.BigBirdForQuestionAnswering(config).eval()
    host = mg.Host(model).eval()
    host.implant("p", mg.SoftPrompt(length=3))
    ids = torch.randint(10, 65, (B, T))
    given = {"input_ids": ids, "question_lengths": torch.tensor([[4], [6]])}
    none, with_tokens = (host(**given, modules=m).start_logits < -1e5 for m in (None, "p"))
    assert torch.equal(none, with_tokens)
    assert none[0].sum() == 3


@torch.no_grad()
def test_logits_of_cells_are_as_many_as_the_cells() -> None:
    config = tf.TapasConfig(**SMALL, type_vocab_sizes=[3, 8, 8, 2, 2, 4, 4])
    host = mg.Host(tf.TapasForQuestionAnswering(config).eval()).eval()
    host.implant("p", mg.SoftPrompt(length=3))
    types = torch.zeros(B, 12, 7, dtype=torch.long)
    types[:, 4:, 0] = types[:, 4:, 2] = 1
    types[:, 4:, 1] = torch.tensor([1, 2] * 4)
    out = host(input_ids=torch.randint(5, 99, (B, 12)), token_type_ids=types)
    assert out.logits.shape == (B, 12)


def test_logits_of_as_many_classes_as_positions_are_kept() -> None:
    config = tf.BertConfig(**SMALL, num_labels=T + 3)
    host = mg.Host(tf.BertForSequenceClassification(config)).eval()
    host.implant("p", mg.SoftPrompt(length=3))
    assert host(input_ids=torch.randint(5, 99, (B, T))).logits.shape == (B, T + 3)


SMALL_T5 = {
    "vocab_size": 99, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8,
    "decoder_start_token_id": 0,
}  # fmt: skip


def test_a_text_of_choices_and_a_class_of_a_decoder_are_told_of_a_prefix() -> None:
    host = mg.Host(tf.BertForMultipleChoice(tf.BertConfig(**SMALL)))
    host.implant("p", mg.SoftPrompt(length=3))
    with pytest.raises(mg.ModgraftError, match="the choices of a question are; implant a Prefix"):
        host(input_ids=torch.randint(5, 99, (B, 3, T)))
    host = mg.Host(tf.T5ForSequenceClassification(tf.T5Config(**SMALL_T5)))
    host.implant("p", mg.SoftPrompt(length=3))
    with pytest.raises(mg.ModgraftError, match="given none for its decoder; implant a Prefix"):
        host(input_ids=torch.randint(5, 99, (B, T)))


def test_a_prompt_of_an_encoder_decoder_is_probed() -> None:
    host = mg.Host(tf.T5ForConditionalGeneration(tf.T5Config(**SMALL_T5)))
    host.implant("p", mg.SoftPrompt(length=3))
    ids = torch.randint(5, 99, (B, T))
    found = host.probe({"input_ids": ids, "labels": ids})
    assert not found.faults
    assert found.modules[0].each == "equal"


VISION = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def test_a_head_that_folds_patches_into_a_map_is_refused() -> None:
    beit = tf.BeitForSemanticSegmentation(tf.BeitConfig(**VISION, out_indices=[1, 2, 3, 4]))
    host = mg.Host(beit).eval()
    host.implant("p", mg.SoftPrompt(length=3))
    with pytest.raises(mg.ModgraftError, match="does not run with tokens before its patches"):
        host(pixel_values=torch.randn(2, 3, 32, 32))


@torch.no_grad()
def test_a_prefix_in_a_tower_of_packed_images_is_of_each_example() -> None:
    text = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    eye = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8,
        "mlp_ratio": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = tf.Qwen2VLConfig(text_config=text, vision_config=eye, image_token_id=90)
    host = mg.Host(tf.Qwen2VLForConditionalGeneration(config)).eval()
    host.implant("p", mg.Prefix(length=3), at="vision.attention")
    for parameter in host.implants.parameters():
        parameter.normal_(0, 0.3)
    image = torch.full((B, 4), 90)
    batch: dict[str, Tensor] = {
        "input_ids": torch.cat([image, torch.randint(5, 80, (B, T))], 1),
        "pixel_values": torch.randn(32, 384),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * B),
        "mm_token_type_ids": torch.tensor([[1] * 4 + [0] * T] * B),
    }
    each = host(**batch, modules=["p", None]).logits
    with_it, without = (host(**batch, modules=m).logits for m in ("p", None))
    assert (with_it - without).abs().max() > 1e-4
    torch.testing.assert_close(each, torch.stack([with_it[0], without[1]]))
