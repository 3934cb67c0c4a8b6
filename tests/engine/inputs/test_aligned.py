"""A prompt before a text of which other arguments tell something for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import modgraft as mg
from engine.inputs.text_hosts import LENGTH, SPECIAL, drawn, idefics, ids, outside, prompted
from modgraft.core.aligned import aligned
from modgraft.core.embeddings import _place_of_image, arguments_of

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
SIZE: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 24, **SPECIAL,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
ONE = torch.ones(3, 1, dtype=torch.long)
Case = tuple[nn.Module, int, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
"""A host, how many of its tokens stay first, what it reads beside the text, what goes before that
at the prompt, and what it reads besides."""


def seen(*shape: int) -> Tensor:
    """Return masks ``[3, 7, …]``: an image is seen from the third token on, in one from the
    first."""
    mask = torch.ones(3, 7, *shape, dtype=torch.long)
    mask[1:, :2] = 0
    return mask


def rocbert() -> Case:
    config = tf.RoCBertConfig(
        **SIZE, pronunciation_vocab_size=41, shape_vocab_size=41, pronunciation_embed_dim=8,
        shape_embed_dim=8,
    )  # fmt: skip
    more = {"input_shape_ids": ids(), "input_pronunciation_ids": ids().flip(0)}
    none = torch.zeros(3, LENGTH, dtype=torch.long)
    return tf.RoCBertForMaskedLM(config), 1, more, dict.fromkeys(more, none), {}


def markuplm() -> Case:
    config = tf.MarkupLMConfig(**SIZE, max_depth=4, xpath_unit_hidden_size=4)
    more = {key: torch.randint(0, 9, (3, 7, 4)) for key in ("xpath_tags_seq", "xpath_subs_seq")}
    padding = {"xpath_tags_seq": config.tag_pad_id, "xpath_subs_seq": config.subs_pad_id}
    before = {key: torch.full((3, LENGTH, 4), own) for key, own in padding.items()}
    return tf.MarkupLMForTokenClassification(config), 1, more, before, {}


def mllama() -> Case:
    text = {**SIZE, "num_hidden_layers": 2, "num_key_value_heads": 2, "cross_attention_layers": [1]}
    eye = {
        **EYE, "num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 1,
        "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    config = tf.MllamaConfig(text_config=text, vision_config=eye, image_token_index=40)
    mask = seen(1, 1)
    before = {"cross_attention_mask": mask[:, :1].expand(-1, LENGTH, -1, -1)}
    rest = {
        "pixel_values": torch.randn(3, 1, 1, 3, 8, 8), "aspect_ratio_ids": ONE,
        "aspect_ratio_mask": ONE[..., None],
    }  # fmt: skip
    model = tf.MllamaForConditionalGeneration(config)
    return model, 0, {"cross_attention_mask": mask}, before, rest


def an_idefics() -> Case:
    mask = seen(1)
    before = {"image_attention_mask": mask[:, :1].expand(-1, LENGTH, -1)}
    rest = {"pixel_values": torch.randn(3, 1, 3, 8, 8)}
    return idefics(), 0, {"image_attention_mask": mask}, before, rest


def kosmos() -> Case:
    text = {
        "vocab_size": 41, "embed_dim": 32, "layers": 1, "ffn_dim": 40, "attention_heads": 4,
        "max_position_embeddings": 24, "dropout": 0, **SPECIAL,
    }  # fmt: skip
    eye = {**EYE, "num_attention_heads": 4}
    config = tf.Kosmos2Config(text_config=text, vision_config=eye, latent_query_num=2)
    places = torch.tensor([[0, 0, 1, 1, 0, 0, 0]] * 3)
    key, none = "image_embeds_position_mask", torch.zeros(3, LENGTH, dtype=torch.long)
    rest = {"pixel_values": torch.randn(3, 3, 8, 8)}
    return tf.Kosmos2ForConditionalGeneration(config), 0, {key: places}, {key: none}, rest


def ernie() -> Case:
    task = torch.tensor([0, 1, 2])[:, None]
    before = {"task_type_ids": task.expand(-1, LENGTH)}
    more = {"task_type_ids": task.expand(-1, 7)}
    return tf.ErnieForMaskedLM(tf.ErnieConfig(**SIZE, use_task_id=True)), 1, more, before, {}


CASES = (rocbert, markuplm, mllama, an_idefics, kosmos, ernie)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_equals_the_bare_host_on_all_that_is_longer(case: Any) -> None:
    torch.manual_seed(0)
    model, at, more, before, rest = case()
    host, phi = prompted(drawn(model))
    mask = torch.ones(3, 7, dtype=torch.long)
    ours = host(input_ids=ids(), attention_mask=mask, **more, **rest).logits
    host.use(None)
    longer = {
        key: torch.cat([value[:, :at], before[key], value[:, at:]], 1)
        for key, value in more.items()
    }
    text = outside(model, phi, ids(), at)
    mask = torch.ones(3, 7 + LENGTH, dtype=torch.long)
    whole = model(**text, attention_mask=mask, **longer, **rest).logits
    torch.testing.assert_close(
        ours, torch.cat([whole[:, :at], whole[:, at + LENGTH :]], 1), **CLOSE
    )


@torch.no_grad()
@pytest.mark.parametrize("case", [mllama, an_idefics, kosmos])
def test_writes_what_it_reads_in_one_call(case: Any) -> None:
    torch.manual_seed(0)
    model, _, more, _, rest = case()
    host, _ = prompted(drawn(model))
    mask = torch.ones(3, 7, dtype=torch.long)
    own = {"input_ids": ids(), "attention_mask": mask, **more, **rest}
    out = host.generate(**own, max_new_tokens=1, do_sample=False)
    assert torch.equal(out[:, -1], host(**own).logits[:, -1].argmax(-1))


def test_training_reads_an_image_past_a_prompt() -> None:
    model, _, more, _, rest = mllama()
    host, _ = prompted(drawn(model))
    batch = {"input_ids": ids(), "labels": ids(), **more, **rest}
    host.fit([batch], train="m", steps=1, progress=False)


def test_what_is_told_of_pairs_of_tokens_is_refused() -> None:
    config = tf.XLNetConfig(vocab_size=41, d_model=32, n_layer=1, n_head=4, d_inner=40)
    host, _ = prompted(drawn(tf.XLNetLMHeadModel(config)))
    with pytest.raises(mg.ModgraftError, match=r"perm_mask \[3, 7, 7\] says of each pair"):
        host(input_ids=ids(), perm_mask=torch.zeros(3, 7, 7))


APART: tuple[tuple[Any, str], ...] = (
    (tf.LxmertModel, "visual_attention_mask"),
    (tf.VisualBertModel, "visual_token_type_ids"),
    (tf.BertModel, "encoder_attention_mask"),
    (tf.T5ForConditionalGeneration, "decoder_attention_mask"),
    (tf.LukeModel, "entity_ids"),
    (tf.RoCBertForPreTraining, "attack_input_shape_ids"),
)


@pytest.mark.parametrize(("kind", "name"), APART)
def test_what_is_as_long_as_the_text_by_chance_is_none_of_it(kind: Any, name: str) -> None:
    known = aligned(kind.forward, arguments_of(kind.__new__(kind)))
    assert not known.among({name: ids()}, (3, 7))


# -- an image behind the text, or beside it -----------------------------------------------------


@torch.no_grad()
def test_an_image_behind_the_text_stays_behind_it() -> None:
    config = tf.VisualBertConfig(**SIZE, visual_embedding_dim=12)
    model = drawn(tf.VisualBertForPreTraining(config))
    host, phi = prompted(model)
    image = {"visual_embeds": torch.randn(3, 4, 12), "visual_attention_mask": ONE.expand(-1, 4)}
    labels, mask = torch.randint(0, 41, (3, 11)), torch.ones(3, 7, dtype=torch.long)
    ours = host(input_ids=ids(), attention_mask=mask, labels=labels, **image)
    host.use(None)
    ignored = torch.full((3, LENGTH), -100)
    whole = model(
        **outside(model, phi, ids(), 1), attention_mask=torch.ones(3, 7 + LENGTH), **image,
        labels=torch.cat([labels[:, :1], ignored, labels[:, 1:]], 1),
    )  # fmt: skip
    long = whole.prediction_logits
    expected = torch.cat([long[:, :1], long[:, 1 + LENGTH :]], 1)
    torch.testing.assert_close(ours.prediction_logits, expected, **CLOSE)
    torch.testing.assert_close(ours.loss, whole.loss, **CLOSE)


def test_a_probe_reads_an_image_behind_the_text() -> None:
    config = tf.VisualBertConfig(**SIZE, visual_embedding_dim=12)
    host, _ = prompted(drawn(tf.VisualBertModel(config)))
    batch = {"input_ids": ids(), "visual_embeds": torch.randn(3, 4, 12)}
    batch |= {"attention_mask": ONE.expand(-1, 7), "visual_attention_mask": ONE.expand(-1, 4)}
    assert not host.probe(batch).faults
    assert host(**batch).last_hidden_state.shape[1] == 11


@torch.no_grad()
def test_an_image_beside_the_text() -> None:
    config = tf.LxmertConfig(
        vocab_size=41, hidden_size=32, intermediate_size=40, num_attention_heads=4, l_layers=1,
        x_layers=1, r_layers=1, visual_feat_dim=6,
    )  # fmt: skip
    model = drawn(tf.LxmertModel(config))
    host, phi = prompted(model)
    image = {"visual_feats": torch.randn(3, 10, 6), "visual_pos": torch.rand(3, 10, 4)}
    ours = host(input_ids=ids(), **image)
    host.use(None)
    whole = model(**outside(model, phi, ids(), 1), **image)
    long = whole.language_output
    expected = torch.cat([long[:, :1], long[:, 1 + LENGTH :]], 1)
    torch.testing.assert_close(ours.language_output, expected, **CLOSE)
    torch.testing.assert_close(ours.vision_output, whole.vision_output, **CLOSE)


def test_where_an_image_is() -> None:
    behind = (tf.VisualBertModel, tf.ViltModel, tf.LayoutLMv2Model, tf.LayoutLMv3Model)
    for kind in (*behind, tf.GitModel, tf.BertModel, tf.LxmertModel, tf.LlavaModel):
        place = "behind" if kind in behind else "before" if kind is tf.GitModel else ""
        assert _place_of_image(kind.__new__(kind)) == place, kind


@torch.no_grad()
def test_an_image_before_the_text_stays_before_it() -> None:
    model = drawn(
        tf.GitForCausalLM(tf.GitConfig(**SIZE, vision_config=EYE | {"num_attention_heads": 4}))
    )
    host, phi = prompted(model)
    image = {"pixel_values": torch.randn(3, 3, 8, 8)}
    ours = host(input_ids=ids(), labels=ids(), **image)
    host.use(None)
    labels = torch.cat([torch.full((3, LENGTH), -100), ids()], 1)
    whole = model(**outside(model, phi, ids(), 0), labels=labels, **image)
    expected = torch.cat([whole.logits[:, :5], whole.logits[:, 5 + LENGTH :]], 1)
    torch.testing.assert_close(ours.logits, expected, **CLOSE)
    torch.testing.assert_close(ours.loss, whole.loss, **CLOSE)
