"""Hosts that look and hosts that listen."""

from __future__ import annotations

from typing import Any

import torch

from zoo.row import EXAMPLES, Row, hf, image, sound, values

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
WAVES = {
    **VIT,
    "vocab_size": 9,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WAVES = {k: v for k, v in WAVES.items() if k not in ("image_size", "patch_size")}
RESNET = {"depths": [1, 1], "hidden_sizes": [16, 24], "embedding_size": 8}


def _eye(name: str, model: str, base: dict, size: int = 8, **config: object) -> Row:
    return hf(name, "vision", model, image(size), **{**base, **config})


def _ear(name: str, model: str, **config: object) -> Row:
    return hf(name, "audio", model, sound(), **{**WAVES, **config})


def _masked_image() -> dict[str, Any]:
    return {
        "pixel_values": values(3, 8, 8),
        "noise": torch.rand(EXAMPLES, 4, generator=torch.Generator().manual_seed(5)),
    }


def _detr_backbone() -> dict:
    return {"model_type": "resnet", **RESNET, "out_features": ["stage2"], "layer_type": "basic"}


ROWS = (
    _eye("vit", "ViTForImageClassification", VIT),
    _eye("deit", "DeiTForImageClassification", VIT),
    _eye("beit", "BeitForImageClassification", VIT, use_relative_position_bias=True),
    hf("vit_mae", "vision", "ViTMAEForPreTraining", _masked_image, **VIT, decoder_hidden_size=16,
       decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=24,
       mask_ratio=0.5),
    _eye("dinov2", "Dinov2ForImageClassification", VIT),
    _eye("dinov3", "DINOv3ViTModel", VIT, num_register_tokens=1),
    _eye("yolos", "YolosForObjectDetection", VIT, image_size=[8, 8], num_detection_tokens=3),
    _eye("clip eye", "CLIPVisionModel", VIT),
    _eye("siglip eye", "SiglipVisionModel", VIT),
    _eye("hiera", "HieraForImageClassification", {}, 16, embed_dim=8, image_size=[16, 16],
         patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], depths=[1, 1],
         num_heads=[1, 2], masked_unit_size=[4, 4], num_query_pool=1,
         masked_unit_attention=[True, False]),
    _eye("swin", "SwinForImageClassification", SWIN, 16),
    _eye("swinv2", "Swinv2ForImageClassification", SWIN, 16,
         pretrained_window_sizes=[0, 0]),
    _eye("focalnet", "FocalNetForImageClassification", {}, 16, image_size=16, patch_size=2,
         embed_dim=8, hidden_sizes=[8, 16], depths=[1, 1], focal_levels=[1, 1],
         focal_windows=[3, 3]),
    _eye("segformer", "SegformerForImageClassification", {}, 32, num_encoder_blocks=2,
         depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
         strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    _eye("pvt", "PvtForImageClassification", {}, 32, image_size=32, num_encoder_blocks=2,
         depths=[1, 1], sequence_reduction_ratios=[2, 1], hidden_sizes=[8, 16],
         patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2]),
    _eye("cvt", "CvtForImageClassification", {}, 32, patch_sizes=[3, 3, 3],
         patch_stride=[2, 2, 2], embed_dim=[8, 8, 16], num_heads=[1, 2, 2], depth=[1, 2, 3],
         mlp_ratio=[2.0, 2.0, 2.0], patch_padding=[1, 1, 1]),
    _eye("levit", "LevitForImageClassification", {}, 32, image_size=32,
         hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
         key_dim=[4, 4, 4], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2]),
    _eye("poolformer", "PoolFormerForImageClassification", {}, 32, num_encoder_blocks=2,
         depths=[1, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
         padding=[1, 1]),
    _eye("convnext", "ConvNextForImageClassification", {}, 16, num_stages=2, depths=[1, 1],
         hidden_sizes=[8, 16], patch_size=2, layer_scale_init_value=0.5),
    _eye("resnet", "ResNetForImageClassification", RESNET, 32, layer_type="basic"),
    _eye("regnet", "RegNetForImageClassification", RESNET, 32, groups_width=8),
    _eye("mobilenet_v2", "MobileNetV2ForImageClassification", {}, 32, depth_multiplier=0.1),
    _eye("mobilevit", "MobileViTForImageClassification", {}, 32, image_size=32,
         hidden_sizes=[8, 12, 16], neck_hidden_sizes=[4, 4, 8, 8, 12, 16, 24],
         num_attention_heads=2),
    _eye("detr", "DetrForObjectDetection", {}, 32, backbone_config=_detr_backbone(),
         num_queries=3, d_model=16, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=24,
         decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
         use_timm_backbone=False, backbone=None),
    _eye("sam eye", "SamVisionModel", {}, 16, hidden_size=16, output_channels=8,
         num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
         window_size=2, global_attn_indexes=[1], num_pos_feats=4, mlp_dim=24),
    hf("videomae", "vision", "VideoMAEForVideoClassification",
       lambda: {"pixel_values": values(2, 3, 8, 8)}, **VIT, num_frames=2, tubelet_size=2),
    # audio
    _ear("wav2vec2", "Wav2Vec2ForCTC"),
    _ear("wav2vec2 stable", "Wav2Vec2ForSequenceClassification", do_stable_layer_norm=True,
         feat_extract_norm="layer", classifier_proj_size=8),
    _ear("hubert", "HubertForCTC"),
    _ear("wavlm", "WavLMForCTC", num_buckets=8, max_bucket_distance=16),
    _ear("unispeech_sat", "UniSpeechSatForCTC"),
    _ear("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", conv_depthwise_kernel_size=3,
         position_embeddings_type="relative", max_source_positions=64),
    _ear("sew", "SEWForCTC", squeeze_factor=2),
    hf("wav2vec2-bert", "audio", "Wav2Vec2BertForSequenceClassification",
       lambda: {"input_features": values(8, 6)}, hidden_size=16, num_hidden_layers=2,
       num_attention_heads=2, intermediate_size=24, feature_projection_input_dim=6,
       classifier_proj_size=8, conv_depthwise_kernel_size=3),
    hf("ast", "audio", "ASTForAudioClassification", lambda: {"input_values": values(8, 8)},
       **{k: v for k, v in VIT.items() if k != "image_size"}, frequency_stride=4, time_stride=4,
       max_length=8, num_mel_bins=8),
    hf("patchtst", "series", "PatchTSTForPrediction", lambda: {"past_values": values(16, 2)},
       num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=16,
       num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, prediction_length=4, loss="mse",
       scaling="std"),
)  # fmt: skip
