"""A small model of every architecture whose roles modgraft knows, and a batch that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, ResNetConfig

Batch = dict[str, torch.Tensor]
IMAGE = 40  # the id that stands for a patch of an image


@dataclass(frozen=True)
class Case:
    """A model and a batch: the model's class, its config, and what makes the batch."""

    cls: str
    config: dict[str, Any]
    batch: Callable[[], Batch]

    def bare(self) -> Any:
        """Make the model."""
        kind = getattr(transformers, self.cls)
        return kind(kind.config_class(**{k: _config(k, v) for k, v in self.config.items()}))

    def model(self) -> Any:
        """Make the model, with weights that leave nothing at zero."""
        torch.manual_seed(0)
        model = self.bare()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()


def _config(name: str, value: Any) -> Any:
    if name.endswith("_config") and isinstance(value, dict) and "model_type" in value:
        return AutoConfig.for_model(**value)
    return value


def first_output(out: Any) -> torch.Tensor:
    """Return the logits, or what a model without a head puts out."""
    for name in ("logits", "last_hidden_state", "pred_masks", "logits_per_image"):
        if name in out:
            return out[name]
    raise AssertionError(list(out))


def _ids(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 39, (rows, length))


def text() -> Batch:
    return {"input_ids": _ids()}


def pair() -> Batch:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(length=5)}


def image(side: int = 8) -> Batch:
    return {"pixel_values": torch.randn(2, 3, side, side)}


def sound() -> Batch:
    return {"input_values": torch.randn(2, 80)}


def beside(patches: int) -> Batch:
    ids = torch.cat([torch.full((1, patches), IMAGE), _ids(1, 5)], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8)}


def qwen() -> Batch:
    return {
        "input_ids": torch.tensor([[37, IMAGE, 5, 6, 7]]),
        "pixel_values": torch.randn(4, 96),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 0, 0, 0]]),
    }


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {**ENCODER, **TOKENS, "num_key_value_heads": 2}
HEADS_OF_4 = {**DECODER, "head_dim": 4}
MOE = {
    **HEADS_OF_4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20,
}  # fmt: skip
SOME_DENSE = {
    **MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
LATENT = {
    **SOME_DENSE, "num_key_value_heads": 4, "head_dim": 2, "q_lora_rank": 6, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6,
}  # fmt: skip
GPT = {
    "vocab_size": 41, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    **ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1,
}  # fmt: skip
STATES = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
T5 = {
    "vocab_size": 41, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
}  # fmt: skip
BOTH = {
    **TOKENS, "vocab_size": 41, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
EYE = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 24,
}  # fmt: skip
EAR = {
    "vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,),
    "num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
READER = {**ENCODER, **TOKENS, "projection_size": 16}
IMAGE_IDS = {"image_token_id": IMAGE, "image_token_index": IMAGE}
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": 39, "vision_start_token_id": 37,
    "vision_end_token_id": 38,
}  # fmt: skip
GLM_IDS = {
    "image_token_id": IMAGE, "video_token_id": 39, "image_start_token_id": 37,
    "image_end_token_id": 38, "video_start_token_id": 35, "video_end_token_id": 36,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
QWEN_TEXT = {**HEADS_OF_4, "rope_parameters": ROPE, "rope_scaling": ROPE}
QWEN_EYE = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 4, "intermediate_size": 24,
    "patch_size": 4, "spatial_merge_size": 2,
}  # fmt: skip
CLIP_EYE = {**EYE, "model_type": "clip_vision_model"}
SIGLIP_EYE = {
    **EYE, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 16,
}  # fmt: skip
LLAMA4 = {**SOME_DENSE, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 20}


def _rows(batch: Callable[[], Batch], config: dict[str, Any], *names: str) -> dict[str, Case]:
    """Return cases of ``"type: Class"`` that share a config."""
    split = (name.partition(": ") for name in names)
    return {kind: Case(cls, config, batch) for kind, _, cls in split}


def _row(name: str, batch: Callable[[], Batch], **config: Any) -> dict[str, Case]:
    return _rows(batch, config, name)


TEXT = {
    **_rows(
        text, DECODER,
        "llama: LlamaForCausalLM", "mistral: MistralForCausalLM", "qwen2: Qwen2ForCausalLM",
        "smollm3: SmolLM3ForCausalLM", "olmo: OlmoForCausalLM", "olmo2: Olmo2ForCausalLM",
        "olmo3: Olmo3ForCausalLM", "granite: GraniteForCausalLM", "cohere: CohereForCausalLM",
        "stablelm: StableLmForCausalLM", "nemotron: NemotronForCausalLM", "phi: PhiForCausalLM",
        "phi3: Phi3ForCausalLM", "starcoder2: Starcoder2ForCausalLM",
        "falcon: FalconForCausalLM",
    ),
    **_rows(
        text, HEADS_OF_4,
        "qwen3: Qwen3ForCausalLM", "gemma: GemmaForCausalLM", "gemma2: Gemma2ForCausalLM",
        "gemma3_text: Gemma3ForCausalLM", "cohere2: Cohere2ForCausalLM", "glm: GlmForCausalLM",
        "glm4: Glm4ForCausalLM",
    ),
    **_rows(
        text, MOE,
        "mixtral: MixtralForCausalLM", "olmoe: OlmoeForCausalLM", "gpt_oss: GptOssForCausalLM",
    ),
    **_rows(
        text, {**MOE, "mlp_only_layers": [0]},
        "qwen2_moe: Qwen2MoeForCausalLM", "qwen3_moe: Qwen3MoeForCausalLM",
    ),
    **_rows(text, SOME_DENSE, "glm4_moe: Glm4MoeForCausalLM"),
    **_rows(text, LLAMA4, "llama4_text: Llama4ForCausalLM"),
    **_rows(
        text, LATENT, "deepseek_v2: DeepseekV2ForCausalLM", "deepseek_v3: DeepseekV3ForCausalLM"
    ),
    **_rows(text, GPT, "gpt2: GPT2LMHeadModel", "gpt_bigcode: GPTBigCodeForCausalLM"),
    **_row("gpt_bigcode, many keys: GPTBigCodeForCausalLM", text, **GPT, multi_query=False),
    **_row("gptj: GPTJForCausalLM", text, **GPT, rotary_dim=2),
    **_row(
        "gpt_neo: GPTNeoForCausalLM", text,
        vocab_size=41, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64,
    ),
    **_rows(text, ENCODER, "gpt_neox: GPTNeoXForCausalLM"),
    **_row("falcon, many keys: FalconForCausalLM", text, **DECODER, multi_query=False),
    **_row(
        "falcon, grouped: FalconForCausalLM", text,
        **DECODER, new_decoder_architecture=True, num_kv_heads=2,
    ),
    **_row("bloom: BloomForCausalLM", text, vocab_size=41, hidden_size=16, n_layer=2, n_head=4),
    **_row(
        "mpt: MptForCausalLM", text,
        vocab_size=41, d_model=16, n_heads=4, n_layers=2, max_seq_len=64,
    ),
    **_rows(text, OPT, "opt: OPTForCausalLM"),
    **_rows(text, STATES, "mamba: MambaForCausalLM", "falcon_mamba: FalconMambaForCausalLM"),
    **_row(
        "mamba2: Mamba2ForCausalLM", text,
        **STATES, num_heads=4, head_dim=8, n_groups=1, chunk_size=4,
    ),
    **_rows(
        pair, T5,
        "t5: T5ForConditionalGeneration", "mt5: MT5ForConditionalGeneration",
        "umt5: UMT5ForConditionalGeneration",
    ),
    **_rows(text, T5, "t5 encoder: T5EncoderModel"),
    **_rows(
        pair, BOTH,
        "bart: BartForConditionalGeneration", "mbart: MBartForConditionalGeneration",
        "pegasus: PegasusForConditionalGeneration", "marian: MarianMTModel",
        "m2m_100: M2M100ForConditionalGeneration", "plbart: PLBartForConditionalGeneration",
        "blenderbot: BlenderbotForConditionalGeneration",
    ),
    **_rows(
        text, ENCODER,
        "bert: BertForMaskedLM", "roberta: RobertaForMaskedLM", "ernie: ErnieForMaskedLM",
        "mpnet: MPNetForMaskedLM", "xlm-roberta: XLMRobertaForMaskedLM",
        "camembert: CamembertForMaskedLM", "data2vec-text: Data2VecTextForMaskedLM",
        "xlm-roberta-xl: XLMRobertaXLForMaskedLM",
        "roberta-prelayernorm: RobertaPreLayerNormForMaskedLM",
    ),
    **_rows(
        text, {**ENCODER, "embedding_size": 8},
        "electra: ElectraForMaskedLM", "albert: AlbertForMaskedLM",
    ),
    **_row("esm: EsmForMaskedLM", text, **ENCODER, pad_token_id=1),
    **_row("longformer: LongformerForMaskedLM", text, **ENCODER, attention_window=4),
    **_row("modernbert: ModernBertForMaskedLM", text, **ENCODER, **TOKENS),
    **_row(
        "mobilebert: MobileBertForMaskedLM", text,
        **ENCODER, intra_bottleneck_size=8, true_hidden_size=8, embedding_size=8,
    ),
    **_rows(
        text, {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        "deberta: DebertaForMaskedLM", "deberta-v2: DebertaV2ForMaskedLM",
    ),
    **_row(
        "distilbert: DistilBertForMaskedLM", text,
        vocab_size=41, dim=16, n_layers=2, n_heads=4, hidden_dim=24,
    ),
    **_row(
        "encoder-decoder: EncoderDecoderModel", pair,
        encoder={**ENCODER, "model_type": "bert"},
        decoder={
            **ENCODER, "model_type": "bert", "is_decoder": True, "add_cross_attention": True
        },
    ),
    **_rows(text, READER, "clip_text_model: CLIPTextModel", "siglip_text_model: SiglipTextModel"),
}  # fmt: skip

OTHERS = {
    **_row(
        "whisper: WhisperForConditionalGeneration",
        lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _ids(length=5)},
        **BOTH, num_mel_bins=8, max_source_positions=10, max_target_positions=12,
        begin_suppress_tokens=None, suppress_tokens=None,
    ),
    **_rows(
        image, EYE,
        "vit: ViTForImageClassification", "deit: DeiTForImageClassification",
        "vit_msn: ViTMSNForImageClassification", "beit: BeitForImageClassification",
        "dinov2: Dinov2ForImageClassification", "dinov3_vit: DINOv3ViTModel",
        "dinov2_with_registers: Dinov2WithRegistersForImageClassification",
        "clip_vision_model: CLIPVisionModel", "siglip_vision_model: SiglipVisionModel",
    ),
    **_rows(lambda: {**image(), "noise": torch.rand(2, 4)}, EYE, "vit_mae: ViTMAEModel"),
    **_row(
        "swin: SwinForImageClassification", partial(image, 16),
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4,
    ),
    **_row(
        "detr: DetrForObjectDetection", partial(image, 32),
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_queries=5,
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
            out_features=["stage2"],
        ),
    ),
    **_row(
        "sam: SamModel",
        lambda: {
            "pixel_values": torch.randn(1, 3, 16, 16), "input_points": 16 * torch.rand(1, 1, 1, 2)
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 24,
            "image_size": 16, "patch_size": 4, "output_channels": 16, "num_pos_feats": 8,
            "global_attn_indexes": [1], "window_size": 2,
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 16, "patch_size": 4, "image_embedding_size": 4,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "iou_head_hidden_dim": 16,
        },
    ),
    **_rows(
        sound, EAR,
        "wav2vec2: Wav2Vec2ForCTC", "hubert: HubertForCTC", "unispeech: UniSpeechForCTC",
        "unispeech-sat: UniSpeechSatForCTC", "data2vec-audio: Data2VecAudioForCTC",
    ),
    **_rows(
        lambda: text() | image(),
        {"text_config": READER, "vision_config": EYE, "projection_dim": 16},
        "clip: CLIPModel", "siglip: SiglipModel",
    ),
    **_row(
        "llava: LlavaForConditionalGeneration", partial(beside, 4),
        **IMAGE_IDS, vision_config=CLIP_EYE, text_config={**DECODER, "model_type": "llama"},
        vision_feature_layer=-1,
    ),
    **_row(
        "paligemma: PaliGemmaForConditionalGeneration", partial(beside, 4),
        **IMAGE_IDS, vision_config=SIGLIP_EYE, text_config={**HEADS_OF_4, "model_type": "gemma"},
        projection_dim=16, hidden_size=16,
    ),
    **_row(
        "gemma3: Gemma3ForConditionalGeneration", partial(beside, 4),
        **IMAGE_IDS, vision_config=SIGLIP_EYE,
        text_config={**HEADS_OF_4, "model_type": "gemma3_text"},
        mm_tokens_per_image=4, boi_token_index=38, eoi_token_index=39,
    ),
    **_row(
        "blip-2: Blip2ForConditionalGeneration", partial(beside, 3),
        **IMAGE_IDS, vision_config=EYE, text_config={**OPT, "model_type": "opt"},
        qformer_config={**ENCODER, "encoder_hidden_size": 16, "cross_attention_frequency": 2},
        num_query_tokens=3,
    ),
    **_row(
        "qwen2_vl: Qwen2VLForConditionalGeneration", qwen, **QWEN_IDS,
        text_config=QWEN_TEXT,
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2,
            "patch_size": 4, "spatial_merge_size": 2,
        },
    ),
    **_row(
        "qwen2_5_vl: Qwen2_5_VLForConditionalGeneration", qwen, **QWEN_IDS,
        text_config=QWEN_TEXT,
        vision_config={**QWEN_EYE, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    **_row(
        "qwen3_vl: Qwen3VLForConditionalGeneration", qwen, **QWEN_IDS,
        text_config=QWEN_TEXT,
        vision_config={
            **QWEN_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]
        },
    ),
    **_row(
        "glm4v: Glm4vForConditionalGeneration", qwen, **GLM_IDS,
        text_config=QWEN_TEXT, vision_config={**QWEN_EYE, "image_size": 8},
    ),
    **_row(
        "llama4: Llama4ForConditionalGeneration", partial(beside, 1), **IMAGE_IDS,
        text_config={**LLAMA4, "model_type": "llama4_text"},
        vision_config={
            **EYE, "intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16, "pixel_shuffle_ratio": 0.5, "rope_theta": 10000,
        },
    ),
    **_row(
        "vision-encoder-decoder: VisionEncoderDecoderModel",
        lambda: image() | {"decoder_input_ids": _ids(length=5)},
        encoder={**EYE, "model_type": "vit"},
        decoder={**GPT, "model_type": "gpt2", "add_cross_attention": True},
    ),
}  # fmt: skip

CASES = {**TEXT, **OTHERS}


class Wrapped(nn.Module):
    """A model of one's own around a known one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"reader": model})

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.inner["reader"](**batch)
