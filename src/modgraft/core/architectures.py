"""Where the parts of known architectures are, as data: a row a family.

Rows that share a layout are written as what differs. ``core/roles.py`` finds the known models in a
host. An architecture that is not here has guessed roles, paths and types.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modgraft.core.family import Family
from modgraft.core.parts import Part

# -- where one layer makes queries, keys and values ------------------------------------------------


def _thirds(_: Any) -> tuple[Part, Part, Part]:
    return Part(0, 1, 3), Part(1, 2, 3), Part(2, 3, 3)


def _in_each_head(config: Any) -> tuple[Part, Part, Part]:
    heads = config.num_attention_heads
    return Part(0, 1, 3, heads), Part(1, 2, 3, heads), Part(2, 3, 3, heads)


def _shared_keys(queries: int, keys: int, groups: int = 1) -> tuple[Part, Part, Part]:
    """Return the parts of ``queries`` heads and the ``keys`` heads of keys, and of values."""
    values, units = queries + keys, queries + 2 * keys
    bounds = (0, queries), (queries, values), (values, units)
    query, key, value = (Part(*each, units, groups) for each in bounds)
    return query, key, value


def _grouped(config: Any) -> tuple[Part, Part, Part]:
    return _shared_keys(config.num_attention_heads, config.num_key_value_heads)


def _falcon(config: Any) -> tuple[Part, Part, Part]:
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return _shared_keys(config.num_attention_heads // groups, 1, groups)
    return _bigcode(config)


def _bigcode(config: Any) -> tuple[Part, Part, Part]:
    if config.multi_query:
        return _shared_keys(config.num_attention_heads, 1)
    return _in_each_head(config)


def _latent(config: Any) -> tuple[None, Part, Part]:
    """Return the parts of the layer that makes keys and values of what both are compressed to."""
    heads, key = config.num_attention_heads, config.qk_nope_head_dim
    whole = key + config.v_head_dim
    return None, Part(0, key, whole, heads), Part(key, whole, whole, heads)


# -- decoders --------------------------------------------------------------------------------------

_LLAMA = Family(
    (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo",
        "olmo2", "olmo3", "granite", "cohere", "cohere2", "stablelm", "nemotron", "glm", "glm4",
        "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text",
    ),
    decoder="norm",
)  # fmt: skip
_MOE = replace(
    _LLAMA,
    types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe"),
    up="mlp.{,shared_expert.,shared_experts.}{gate_proj,up_proj}",
    down="mlp.{,shared_expert.,shared_experts.}down_proj",
    experts="mlp.experts",
    router="mlp.{gate,router}.weight",
)
_DEEPSEEK = replace(
    _MOE,
    types=("deepseek_v2", "deepseek_v3"),
    query="{q_proj,q_b_proj}", key="kv_b_proj", value="kv_b_proj", parts=_latent,
)  # fmt: skip
_LLAMA4 = replace(
    _MOE,
    types=("llama4_text",),
    feedforward="feed_forward",
    up="feed_forward.{,shared_expert.}{gate_proj,up_proj}",
    down="feed_forward.{,shared_expert.}down_proj",
    experts="feed_forward.experts",
    router="feed_forward.router.weight",
)
_PHI = replace(
    _LLAMA,
    types=("phi",),
    output="dense", up="mlp.fc1", down="mlp.fc2", decoder="final_layernorm",
)  # fmt: skip
_PHI3 = replace(_LLAMA, types=("phi3",), qkv="qkv_proj", parts=_grouped)
_STARCODER2 = replace(_LLAMA, types=("starcoder2",), up="mlp.c_fc", down="mlp.c_proj")
_GPT2 = Family(
    ("gpt2",),
    block="h.*",
    attention="attn", qkv="c_attn", parts=_thirds, output="c_proj",
    up="mlp.c_fc", down="mlp.c_proj",
    embedding="wte", decoder="ln_f",
    more={
        "query": "crossattention.q_attn",
        "key": "crossattention.c_attn[0/2]",
        "value": "crossattention.c_attn[1/2]",
        "output": "crossattention.c_proj",
        "attention": "crossattention",
        "cross_attention": "crossattention",
    },
)  # fmt: skip
_BIGCODE = replace(_GPT2, types=("gpt_bigcode",), parts=_bigcode)
_GPTJ = Family(
    ("gptj",),
    block="h.*",
    attention="attn", output="out_proj",
    up="mlp.fc_in", down="mlp.fc_out",
    embedding="wte", decoder="ln_f",
)  # fmt: skip
_GPT_NEO = replace(
    _GPTJ, types=("gpt_neo",), attention="attn.attention", up="mlp.c_fc", down="mlp.c_proj"
)
_NEOX = Family(
    ("gpt_neox",),
    attention="attention", qkv="query_key_value", parts=_in_each_head, output="dense",
    up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
    embedding="embed_in", decoder="final_layer_norm",
)  # fmt: skip
_BLOOM = replace(
    _NEOX,
    types=("bloom",),
    block="h.*", attention="self_attention", embedding="word_embeddings", decoder="ln_f",
)  # fmt: skip
_FALCON = replace(_BLOOM, types=("falcon",), parts=_falcon)
_MPT = Family(
    ("mpt",),
    block="blocks.*",
    attention="attn", qkv="Wqkv", parts=_thirds, output="out_proj",
    feedforward="ffn", up="ffn.up_proj", down="ffn.down_proj",
    embedding="wte", decoder="norm_f",
)  # fmt: skip
_OPT = Family(
    ("opt",),
    block="decoder.layers.*",
    output="out_proj",
    feedforward="fc2", up="fc1", down="fc2",
    embedding="decoder.embed_tokens", decoder="decoder",
)  # fmt: skip
_MAMBA = Family(
    ("mamba", "mamba2", "falcon_mamba"),
    attention="", feedforward="", up="mixer.in_proj", down="mixer.out_proj",
    embedding="embeddings", decoder="norm_f",
    more={"mixer": "mixer"},
)  # fmt: skip

# -- encoders and decoders -------------------------------------------------------------------------

_T5 = Family(
    ("t5", "mt5", "umt5"),
    block="{encoder,decoder}.block.*",
    attention="layer.*.SelfAttention", cross="layer.*.EncDecAttention",
    query="q", key="k", value="v", output="o",
    feedforward="layer.*.DenseReluDense",
    up="layer.*.DenseReluDense.{wi,wi_0,wi_1}", down="layer.*.DenseReluDense.wo",
    embedding="{encoder,decoder}.embed_tokens", encoder="encoder", decoder="decoder",
)  # fmt: skip
_BART = Family(
    ("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart"),
    block="{encoder,decoder}.layers.*",
    cross="encoder_attn", output="out_proj",
    feedforward="fc2", up="fc1", down="fc2",
    embedding="{encoder,decoder}.embed_tokens", encoder="encoder", decoder="decoder",
)  # fmt: skip
_WHISPER = replace(_BART, types=("whisper",), embedding="decoder.embed_tokens")
_DETR = replace(
    _BART,
    types=("detr",),
    output="o_proj",
    feedforward="mlp", up="mlp.fc1", down="mlp.fc2",
    embedding="",
    one_input=False,  # positions are added to what becomes queries and keys
    sense="vision",
)  # fmt: skip

# -- encoders of text ------------------------------------------------------------------------------

_BERT = Family(
    (
        "bert", "electra", "roberta", "xlm-roberta", "camembert", "esm", "ernie", "data2vec-text",
        "xlm-roberta-xl", "roberta-prelayernorm",
    ),
    block="encoder.layer.*",
    attention="attention", cross="crossattention", inner="self",
    query="self.query", key="self.key", value="self.value", output="output.dense",
    feedforward="output", up="intermediate.dense", down="output.dense",
    embedding="embeddings.word_embeddings", encoder="encoder",
)  # fmt: skip
_LONGFORMER = replace(
    _BERT,
    types=("longformer",),
    query="self.{query,query_global}",
    key="self.{key,key_global}",
    value="self.{value,value_global}",
)
_DEBERTA2 = replace(
    _BERT,
    types=("deberta-v2",),
    query="self.query_proj", key="self.key_proj", value="self.value_proj", cross="",
)  # fmt: skip
_DEBERTA = replace(_DEBERTA2, types=("deberta",), qkv="self.in_proj", parts=_in_each_head)
_MOBILEBERT = replace(
    _BERT,
    types=("mobilebert",),
    cross="",
    feedforward="{,ffn.*.}output",
    up="{,ffn.*.}intermediate.dense",
    down="{,ffn.*.}output.dense",
    one_input=False,  # queries and keys are made of a bottleneck
)
_MPNET = replace(
    _BERT,
    types=("mpnet",),
    cross="", inner="attn", query="attn.q", key="attn.k", value="attn.v", output="attn.o",
)  # fmt: skip
_DISTILBERT = Family(
    ("distilbert",),
    block="transformer.layer.*",
    attention="attention", query="q_lin", key="k_lin", value="v_lin", output="out_lin",
    feedforward="ffn", up="ffn.lin1", down="ffn.lin2",
    embedding="embeddings.word_embeddings", encoder="transformer",
)  # fmt: skip
_ALBERT = Family(
    ("albert",),
    block="encoder.albert_layer_groups.*.albert_layers.*",
    attention="attention", query="query", key="key", value="value", output="dense",
    feedforward="ffn_output", up="ffn", down="ffn_output",
    embedding="embeddings.word_embeddings", encoder="encoder",
)  # fmt: skip
_MODERNBERT = Family(
    ("modernbert",),
    attention="attn", qkv="Wqkv", parts=_thirds, output="Wo",
    up="mlp.Wi", down="mlp.Wo",
    embedding="embeddings.tok_embeddings", encoder="final_norm",
)  # fmt: skip

# -- images and sound ------------------------------------------------------------------------------

_VIT = Family(
    ("vit", "deit", "vit_mae", "vit_msn"),
    attention="attention", up="mlp.fc1", down="mlp.fc2",
    embedding="embeddings", encoder="layernorm",
    sense="vision",
)  # fmt: skip
_BEIT = replace(_VIT, types=("beit",), encoder="")
_DINO2 = replace(
    _VIT,
    types=("dinov2", "dinov2_with_registers"),
    block="encoder.layer.*", up="mlp.{fc1,gate_proj,up_proj}", down="mlp.{fc2,down_proj}",
)  # fmt: skip
_DINO3 = replace(
    _VIT,
    types=("dinov3_vit",),
    block="model.layer.*", up="mlp.{gate_proj,up_proj}", down="mlp.down_proj", encoder="norm",
)  # fmt: skip
_SWIN = replace(_VIT, types=("swin",), block="encoder.layers.*.blocks.*")
_CLIP_EYE = replace(
    _VIT,
    types=("clip_vision_model", "siglip_vision_model"),
    block="encoder.layers.*", attention="self_attn", output="out_proj", encoder="encoder",
)  # fmt: skip
_CLIP_TEXT = replace(
    _CLIP_EYE,
    types=("clip_text_model", "siglip_text_model"),
    embedding="embeddings.token_embedding", sense="",
)  # fmt: skip
_BLIP2_EYE = replace(
    _CLIP_EYE,
    types=("blip_2_vision_model",),
    qkv="qkv", parts=_thirds, output="projection",
)  # fmt: skip
_QFORMER = replace(
    _BERT,
    types=("blip_2_qformer",),
    inner="attention",
    query="attention.query", key="attention.key", value="attention.value",
    feedforward="{output,output_query}",
    up="{intermediate,intermediate_query}.dense", down="{output,output_query}.dense",
    embedding="",
    sense="qformer",
)  # fmt: skip
_QWEN_EYE = replace(
    _VIT,
    types=("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "glm4v_vision"),
    block="blocks.*",
    attention="attn", qkv="qkv", parts=_thirds, output="proj",
    up="mlp.{fc1,gate_proj,up_proj,linear_fc1}", down="mlp.{fc2,down_proj,linear_fc2}",
    embedding="patch_embed", encoder="merger",
)  # fmt: skip
_LLAMA4_EYE = replace(
    _VIT,
    types=("llama4_vision_model",),
    block="model.layers.*", attention="self_attn",
    embedding="patch_embedding", encoder="layernorm_post",
)  # fmt: skip
_SAM_EYE = replace(
    _VIT,
    types=("sam_vision_model",),
    attention="attn", qkv="qkv", parts=_thirds, output="proj",
    up="mlp.lin1", down="mlp.lin2",
    embedding="patch_embed", encoder="",
)  # fmt: skip
_SAM_MASKS = Family(
    ("sam_mask_decoder",),
    block="transformer.layers.*",
    cross="{cross_attn_token_to_image,cross_attn_image_to_token}", output="out_proj",
    up="mlp.lin1", down="mlp.lin2",
    embedding="",
    one_input=False,  # positions are added to what becomes queries and keys
    sense="mask",
)  # fmt: skip
_WAV2VEC2 = Family(
    ("wav2vec2", "hubert", "unispeech", "unispeech-sat", "data2vec-audio"),
    block="encoder.layers.*",
    attention="attention", output="out_proj",
    feedforward="feed_forward",
    up="feed_forward.intermediate_dense", down="feed_forward.output_dense",
    embedding="", encoder="encoder",
    sense="audio",
)  # fmt: skip

FAMILIES = (
    _LLAMA, _MOE, _DEEPSEEK, _LLAMA4, _PHI, _PHI3, _STARCODER2, _GPT2, _BIGCODE, _GPTJ,
    _GPT_NEO, _NEOX, _BLOOM, _FALCON, _MPT, _OPT, _MAMBA, _T5, _BART, _WHISPER, _DETR, _BERT,
    _LONGFORMER, _DEBERTA2, _DEBERTA, _MOBILEBERT, _MPNET, _DISTILBERT, _ALBERT, _MODERNBERT,
    _VIT, _BEIT, _DINO2, _DINO3, _SWIN, _CLIP_EYE, _CLIP_TEXT, _BLIP2_EYE,
    _QFORMER, _QWEN_EYE, _LLAMA4_EYE, _SAM_EYE, _SAM_MASKS, _WAV2VEC2,
)  # fmt: skip
