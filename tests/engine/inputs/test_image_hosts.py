"""A prompt before a text that holds images: places, masks and positions are the bare host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import modgraft as mg
from engine.inputs.text_hosts import LENGTH, SPECIAL, drawn, idefics, ids, prompted
from modgraft.core.embeddings import reading_of

IMAGE = 40
TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
EYE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
Case = tuple[nn.Module, dict[str, Tensor]]


def text_with_image(first: int = 3) -> Tensor:
    text = ids(2, 11)
    text[text == IMAGE] = 5
    text[:, first : first + 4] = IMAGE
    return text


def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def in_three_dimensions(name: str, **eye: Any) -> Case:
    eye = {
        "depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3,
        "temporal_patch_size": 2, "hidden_size": 32, **eye,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    own = {"rope_parameters": rope, **({"head_dim": 8} if name == "Qwen3VL" else {})}
    if name == "Glm4v":
        rope["partial_rotary_factor"] = 1.0
    others = {f"{kind}_token_id": 50 + i for i, kind in enumerate(("video", "vision_start"))}
    config = getattr(tf, f"{name}Config")(
        text_config={**TEXT, **own}, vision_config=eye, image_token_id=IMAGE, **others
    )
    text = text_with_image()
    patches = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    return drawn(getattr(tf, f"{name}ForConditionalGeneration")(config)), {
        "input_ids": text,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (text == IMAGE).int(),
    }


def gemma3() -> Case:
    config = tf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "sliding_window": 4}, vision_config=EYE,
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=52, eoi_token_index=53,
    )  # fmt: skip
    text = text_with_image()
    types = (text == IMAGE).long()
    batch = {"input_ids": text, "pixel_values": pixels(), "token_type_ids": types}
    return drawn(tf.Gemma3ForConditionalGeneration(config)), batch


def paligemma() -> Case:
    config = tf.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma"},
        vision_config={**EYE, "projection_dim": 32}, image_token_index=IMAGE, projection_dim=32,
    )  # fmt: skip
    text = text_with_image(0)
    batch = {"input_ids": text, "pixel_values": pixels(), "token_type_ids": torch.zeros_like(text)}
    return drawn(tf.PaliGemmaForConditionalGeneration(config)), batch


def llava() -> Case:
    eye = {**EYE, "num_hidden_layers": 2, "projection_dim": 32, "model_type": "clip_vision_model"}
    config = tf.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=eye, image_token_index=IMAGE
    )
    batch = {"input_ids": text_with_image(), "pixel_values": pixels()}
    return drawn(tf.LlavaForConditionalGeneration(config)), batch


def blip2() -> Case:
    text = {
        "model_type": "opt", "vocab_size": 60, "hidden_size": 32, "ffn_dim": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 40, **SPECIAL,
    }  # fmt: skip
    asks = {k: v for k, v in EYE.items() if k not in ("image_size", "patch_size")}
    config = tf.Blip2Config(
        text_config=text, vision_config=EYE, num_query_tokens=4, image_token_index=IMAGE,
        qformer_config={**asks, "num_hidden_layers": 2, "encoder_hidden_size": 32},
    )  # fmt: skip
    batch = {"input_ids": text_with_image(0), "pixel_values": pixels()}
    return drawn(tf.Blip2ForConditionalGeneration(config)), batch


HOSTS: dict[str, Callable[[], Case]] = {
    "qwen2 vl": lambda: in_three_dimensions("Qwen2VL", embed_dim=32, mlp_ratio=2),
    "qwen2.5 vl": lambda: in_three_dimensions(
        "Qwen2_5_VL", out_hidden_size=32, intermediate_size=40, window_size=16,
        fullatt_block_indexes=[0],
    ),
    "qwen3 vl": lambda: in_three_dimensions(
        "Qwen3VL", out_hidden_size=32, intermediate_size=40, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
    "glm4v": lambda: in_three_dimensions(
        "Glm4v", out_hidden_size=32, intermediate_size=40, image_size=16
    ),
    "gemma3": gemma3,
    "paligemma": paligemma,
    "llava": llava,
    "blip2": blip2,
}  # fmt: skip
every = pytest.mark.parametrize("name", HOSTS)


def outside(model: Any, phi: Tensor, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Return the bare model's arguments: φ in the embeddings, all else moved behind it."""
    text = batch["input_ids"]
    call: dict[str, Any] = {k: v for k, v in batch.items() if k != "input_ids"}
    own = phi.expand(len(text), -1, -1)
    call["inputs_embeds"] = torch.cat([own, model.get_input_embeddings()(text)], 1)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in call:
            none = call[key].new_zeros(len(text), LENGTH)
            call[key] = torch.cat([none, call[key]], 1)
    if "image_grid_thw" in call:
        given = {k: batch[k] for k in ("image_grid_thw", "mm_token_type_ids")}
        places, _ = model.model.get_rope_index(text, **given)  # [3, B, T]
        ahead = torch.arange(LENGTH).expand(3, len(text), -1)
        call["position_ids"] = torch.cat([ahead, places + LENGTH], -1)
    return call


@torch.no_grad()
@every
def test_equals_the_bare_host_on_embeddings(name: str) -> None:
    model, batch = HOSTS[name]()
    host, phi = prompted(model)
    ours = host(**batch).logits
    host.use(None)
    call = outside(model, phi, batch)
    if name == "blip2":  # asks for both
        call |= {"input_ids": None, "attention_mask": torch.ones(2, LENGTH + 11, dtype=torch.long)}
    expected = model(**call).logits
    torch.testing.assert_close(ours, expected[:, LENGTH:], rtol=1e-4, atol=2e-5)
    assert not torch.allclose(ours, host(**batch).logits, atol=0.1)


@torch.no_grad()
@every
def test_writes_as_one_step_after_another(name: str) -> None:
    """With and without a cache, and by beams for each example as for it alone."""
    model, batch = HOSTS[name]()
    host, _ = prompted(model)
    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    text = batch["input_ids"]
    length, step = text.shape[1], dict(batch)
    for _ in range(3):
        logits = host(**step).logits[:, -1]
        logits[:, 1] = -torch.inf
        new = logits.argmax(-1, keepdim=True)
        step["input_ids"] = torch.cat([step["input_ids"], new], 1)
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in step:
                kind = int(name == "paligemma")  # where 0 is what is seen from both sides
                step[key] = torch.cat([step[key], torch.full_like(new, kind).to(step[key])], 1)
    for own in ({}, {"use_cache": False}):
        if own and name == "paligemma":  # gives what is new the kind of the text, 0
            continue
        assert torch.equal(host.generate(**batch, **settings, **own), step["input_ids"])
    beams = host.generate(**batch, **settings, num_beams=2)
    assert torch.equal(beams[:, :length], text)
    for row in range(2):
        size = len(batch["pixel_values"]) // 2
        alone = {k: v[row : row + 1] for k, v in batch.items()}
        alone["pixel_values"] = batch["pixel_values"][row * size : (row + 1) * size]
        expected = host.generate(**alone, **settings, num_beams=2)
        assert torch.equal(beams[row : row + 1], expected)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_text_and_an_image_in_one_sequence(masked: bool) -> None:
    """ViLT's tokens go into its text, after the class token, and not among the patches."""
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = tf.ViltConfig(
        vocab_size=41, num_attention_heads=2, image_size=8, patch_size=4, max_image_length=-1,
        **size,
    )  # fmt: skip
    model = drawn(tf.ViltModel(config))
    host, phi = prompted(model)
    text, image = torch.randint(20, 41, (3, 6)), torch.randn(3, 3, 8, 8)
    batch = {"input_ids": text, "pixel_values": image}
    longer = {"attention_mask": torch.ones(3, 6)} if masked else {}
    ours = host(**batch, **longer)
    model.get_input_embeddings().weight[5 : 5 + LENGTH] = phi  # words that nobody wrote
    words = torch.arange(5, 5 + LENGTH).expand(3, -1)
    batch["input_ids"] = torch.cat([text[:, :1], words, text[:, 1:]], 1)
    whole = host(**batch, modules=None)
    torch.testing.assert_close(ours.pooler_output, whole.pooler_output, rtol=1e-4, atol=1e-5)


def test_the_positions_of_an_eye_are_not_those_of_the_text() -> None:
    eye = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 24, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = tf.GitConfig(
        vision_config=eye, vocab_size=41, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=12, **SPECIAL,
    )  # fmt: skip
    host = mg.Host(tf.GitForCausalLM(config)).eval()
    host.implant("p", mg.SoftPrompt(length=4))
    words = torch.randint(3, 41, (2, 7))
    assert host(input_ids=words).logits.shape[:2] == (2, 7)  # an eye of 5 positions
    with pytest.raises(mg.ModgraftError, match="has 12 positions"):
        host(input_ids=words.repeat(1, 2))


def test_a_text_of_rotations_has_the_room_of_no_eye() -> None:
    assert reading_of(idefics()).room is None


def test_why_a_host_with_a_table_takes_no_prompt() -> None:
    size: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24,
                            "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    clap = tf.ClapTextModelWithProjection(tf.ClapTextConfig(**size))
    with pytest.raises(mg.ModgraftError, match="its forward takes no inputs_embeds in their place"):
        mg.Host(clap).implant("p", mg.SoftPrompt(length=2))
    quantised = tf.IBertForMaskedLM(tf.IBertConfig(**size))
    with pytest.raises(mg.ModgraftError, match="looks its tokens up in a QuantEmbedding"):
        mg.Host(quantised).implant("p", mg.SoftPrompt(length=2))
