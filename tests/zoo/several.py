"""Hosts that read more than one kind of input."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.row import (
    DECODER,
    EXAMPLES,
    IMAGE,
    SIZE,
    Batch,
    Row,
    hf,
    ids,
    seen,
    text,
    values,
)
from zoo.sights import VIT

TEXT = {**DECODER, "model_type": "llama"}
EYE = {**VIT, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = {**VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
GEMMA = {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 8}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 43,
    "vision_start_token_id": 41,
    "vision_end_token_id": 42,
}


def _both(text_batch: Callable[[], Batch] = text) -> Callable[[], Batch]:
    return lambda: {**text_batch(), "pixel_values": values(3, 8, 8)}


def _patches(pixels: int, start: int | None = None) -> Callable[[], Batch]:
    """Texts about an image of 4 × 4 patches, which its eye reads as 2 × 2 tokens."""

    def batch() -> Batch:
        marks = [] if start is None else [torch.full((EXAMPLES, 1), start)]
        after = [] if start is None else [torch.full((EXAMPLES, 1), start + 1)]
        places = torch.full((EXAMPLES, 4), IMAGE)
        words = torch.cat([ids(1, 5), *marks, places, *after, ids(3)], dim=1)
        return {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "mm_token_type_ids": (words == IMAGE).int(),
            "pixel_values": values(16, pixels).flatten(0, 1),  # [examples · patches, pixels]
            "image_grid_thw": torch.tensor([[1, 4, 4]] * EXAMPLES),
        }

    return batch


def _typed() -> Batch:
    batch = seen(4)()
    return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _row(name: str, model: str, batch: Callable[[], Batch], **config: object) -> Row:
    return hf(name, "several inputs", model, batch, **config)


ROWS = (
    _row("clip", "CLIPModel", _both(), text_config={**SIZE, "projection_dim": 16},
         vision_config=EYE, projection_dim=16),
    _row("siglip", "SiglipModel", _both(), text_config={**SIZE, "projection_size": 16},
         vision_config={**VIT, "vision_use_head": True}),
    _row("vilt", "ViltForImageAndTextRetrieval", _both(), class_token=True, **SIZE, image_size=8,
         patch_size=4, max_image_length=-1),
    _row("git", "GitForCausalLM", _both(), **SIZE, vision_config=VIT),
    _row("llava", "LlavaForConditionalGeneration", seen(4), text_config=TEXT, vision_config=EYE,
         image_token_index=IMAGE, image_seq_length=4, vision_feature_layer=-1),
    _row("blip-2", "Blip2ForConditionalGeneration", seen(3), vision_config=VIT,
         qformer_config={**SIZE, "encoder_hidden_size": 16},
         text_config={**SIZE, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16},
         num_query_tokens=3, image_token_index=IMAGE),
    _row("paligemma", "PaliGemmaForConditionalGeneration", _typed,
         text_config={**DECODER, "model_type": "gemma"},
         vision_config={**SIGLIP, "projection_dim": 16}, image_token_index=IMAGE,
         projection_dim=16),
    _row("gemma3 with an eye", "Gemma3ForConditionalGeneration", _typed,
         text_config={**GEMMA, "model_type": "gemma3_text"}, vision_config=SIGLIP,
         mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=41, eoi_token_index=42),
    _row("idefics3", "Idefics3ForConditionalGeneration",
         lambda: {**seen(1)(), "pixel_values": values(1, 3, 8, 8)},
         text_config=TEXT, vision_config=VIT, scale_factor=2, image_token_id=IMAGE),
    _row("qwen2-vl", "Qwen2VLForConditionalGeneration", _patches(3 * 2 * 4 * 4, 41),
         text_config={**DECODER, "rope_parameters": ROPE},
         vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2,
                        "patch_size": 4, "mlp_ratio": 2}, **IDS),
    _row("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", _patches(3 * 2 * 4 * 4, 41),
         text_config={**DECODER, "rope_parameters": ROPE},
         vision_config={"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2,
                        "intermediate_size": 24, "patch_size": 4, "window_size": 16,
                        "fullatt_block_indexes": [0]}, **IDS),
    _row("qwen3-vl", "Qwen3VLForConditionalGeneration", _patches(3 * 2 * 4 * 4, 41),
         text_config={**DECODER, "rope_parameters": ROPE},
         vision_config={"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2,
                        "intermediate_size": 24, "patch_size": 4, "num_position_embeddings": 16,
                        "deepstack_visual_indexes": [0]}, **IDS),
    _row("glm4v", "Glm4vForConditionalGeneration", _patches(3 * 2 * 4 * 4, 41),
         text_config={**DECODER, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
         vision_config={"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2,
                        "intermediate_size": 24, "image_size": 16, "patch_size": 4},
         image_token_id=IMAGE, video_token_id=43, image_start_token_id=41,
         image_end_token_id=42),
)  # fmt: skip
