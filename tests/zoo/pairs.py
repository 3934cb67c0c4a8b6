"""Hosts that read one sequence and write another: encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from torch import nn

from zoo.row import SIZE, SPECIAL, TOKENS, VOCABULARY, Row, hf, ids, pairs, spoken, values

START = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {**START, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {
    **START,
    "d_model": 16,
    "max_position_embeddings": 64,
    **{f"{end}_layers": 2 for end in ("encoder", "decoder")},
    **{f"{end}_attention_heads": 2 for end in ("encoder", "decoder")},
    **{f"{end}_ffn_dim": 24 for end in ("encoder", "decoder")},
}


def _pair(name: str, model: str, base: dict, **config: object) -> Row:
    return hf(name, "encoder-decoder", model, pairs, **{**base, **config})


def _two_berts() -> nn.Module:
    config = transformers.BertConfig(**SIZE)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(both)


def _captions() -> nn.Module:
    eye = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    words = transformers.TrOCRConfig(
        **START,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        is_decoder=True,
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eye, words)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(both)


def _t5gemma() -> dict:
    one = {**SIZE, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    return {"encoder": one, "decoder": {**one, "is_decoder": True}, "vocab_size": VOCABULARY}


def _row(name: str, make: Callable[[], nn.Module], batch: Callable) -> Row:
    return Row(name, "encoder-decoder", make, batch)


ROWS = (
    _pair("t5", "T5ForConditionalGeneration", T5),
    _pair("mt5 gated", "MT5ForConditionalGeneration", T5),
    _pair("umt5", "UMT5ForConditionalGeneration", T5),
    _pair("longt5", "LongT5ForConditionalGeneration", T5, local_radius=3),
    _pair("switch", "SwitchTransformersForConditionalGeneration", T5, num_experts=4,
          expert_capacity=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
          router_jitter_noise=0.0, num_decoder_layers=2),
    _pair("bart", "BartForConditionalGeneration", BART),
    _pair("mbart", "MBartForConditionalGeneration", BART, scale_embedding=True),
    _pair("plbart", "PLBartForConditionalGeneration", BART),
    _pair("pegasus", "PegasusForConditionalGeneration", BART),
    _pair("marian", "MarianMTModel", BART),
    _pair("blenderbot", "BlenderbotForConditionalGeneration", BART),
    _pair("m2m_100", "M2M100ForConditionalGeneration", BART),
    _pair("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", BART,
          attention_type="original_full"),
    _pair("led", "LEDForConditionalGeneration", BART, attention_window=4,
          max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    _pair("prophetnet", "ProphetNetForConditionalGeneration", START, hidden_size=16,
          encoder_ffn_dim=24, decoder_ffn_dim=24, num_encoder_layers=2, num_decoder_layers=2,
          num_encoder_attention_heads=2, num_decoder_attention_heads=2,
          max_position_embeddings=64),
    _pair("fsmt", "FSMTForConditionalGeneration", BART, src_vocab_size=VOCABULARY,
          tgt_vocab_size=VOCABULARY),
    _row("t5gemma", lambda: transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(**_t5gemma())), pairs),
    _row("bert2bert", _two_berts, pairs),
    _row("vit2trocr", _captions, lambda: {
        "pixel_values": values(3, 8, 8), "decoder_input_ids": ids(seed=4)}),
    hf("whisper", "encoder-decoder", "WhisperForConditionalGeneration", spoken(6, 2 * TOKENS),
       **{**BART, "num_mel_bins": 6, "max_source_positions": TOKENS, "max_target_positions": 32,
          "begin_suppress_tokens": None}),
    hf("speech_to_text", "encoder-decoder", "Speech2TextForConditionalGeneration",
       spoken(4 * TOKENS, 6), **{**BART, "input_feat_per_channel": 6, "conv_channels": 8,
          "conv_kernel_sizes": (3, 3), "max_source_positions": 64, "max_target_positions": 64}),
)  # fmt: skip
