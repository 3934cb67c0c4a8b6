"""The paths of the parts of known architectures, as data.

Each family is one row of role → path pattern, relative to the base model. In a pattern ``*`` is a
layer number, ``{a,b}`` is either, and a trailing ``[i/n]`` is the i-th of n equal parts of a fused
projection's output. An architecture that is not here works by path and by type.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        types: the ``config.model_type`` values it covers.
        roles: role → pattern.
        one_input: the layers that are called one after another with the same input: the path of
            their parent, and their names in it.
    """

    types: tuple[str, ...]
    roles: dict[str, str]
    one_input: tuple[tuple[str, tuple[str, ...]], ...] = ()


_T5 = "{encoder,decoder}.block.*.layer.*"

_LLAMA = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "olmo2",
)

_BERT = {
    "query": "encoder.layer.*.attention.self.query",
    "key": "encoder.layer.*.attention.self.key",
    "value": "encoder.layer.*.attention.self.value",
    "output": "encoder.layer.*.attention.output.dense",
    "attention": "encoder.layer.*.attention",
    "self_attention": "encoder.layer.*.attention.self",
    "feedforward": "encoder.layer.*.output",
    "up": "encoder.layer.*.intermediate.dense",
    "down": "encoder.layer.*.output.dense",
    "block": "encoder.layer.*",
    "embedding": "embeddings.word_embeddings",
    "encoder.output": "encoder",
}

FAMILIES = (
    Family(
        ("t5", "mt5", "umt5"),
        {
            "query": f"{_T5}.{{SelfAttention,EncDecAttention}}.q",
            "key": f"{_T5}.{{SelfAttention,EncDecAttention}}.k",
            "value": f"{_T5}.{{SelfAttention,EncDecAttention}}.v",
            "output": f"{_T5}.{{SelfAttention,EncDecAttention}}.o",
            "attention": f"{_T5}.SelfAttention",
            "self_attention": f"{_T5}.SelfAttention",
            "cross_attention": "decoder.block.*.layer.1.EncDecAttention",
            "feedforward": f"{_T5}.DenseReluDense",
            "up": f"{_T5}.DenseReluDense.{{wi,wi_0,wi_1}}",
            "down": f"{_T5}.DenseReluDense.wo",
            "block": "{encoder,decoder}.block.*",
            "embedding": "{encoder,decoder}.embed_tokens",
            "encoder.output": "encoder",
            "decoder.output": "decoder",
        },
        one_input=(
            (f"{_T5}.SelfAttention", ("q", "k", "v")),
            ("decoder.block.*.layer.1.EncDecAttention", ("k", "v")),
            (f"{_T5}.DenseReluDense", ("wi_0", "wi_1")),
        ),
    ),
    Family(
        ("bert", "electra", "roberta", "xlm-roberta", "camembert"),
        _BERT,
        one_input=(("encoder.layer.*.attention.self", ("query", "key", "value")),),
    ),
    Family(
        ("gpt2",),
        {
            "query": "h.*.attn.c_attn[0/3]",
            "key": "h.*.attn.c_attn[1/3]",
            "value": "h.*.attn.c_attn[2/3]",
            "output": "h.*.attn.c_proj",
            "attention": "h.*.attn",
            "self_attention": "h.*.attn",
            "feedforward": "h.*.mlp",
            "up": "h.*.mlp.c_fc",
            "down": "h.*.mlp.c_proj",
            "block": "h.*",
            "embedding": "wte",
            "decoder.output": "ln_f",
        },
    ),
    Family(
        _LLAMA,
        {
            "query": "layers.*.self_attn.q_proj",
            "key": "layers.*.self_attn.k_proj",
            "value": "layers.*.self_attn.v_proj",
            "output": "layers.*.self_attn.o_proj",
            "attention": "layers.*.self_attn",
            "self_attention": "layers.*.self_attn",
            "feedforward": "layers.*.mlp",
            "up": "layers.*.mlp.{gate_proj,up_proj}",
            "down": "layers.*.mlp.down_proj",
            "block": "layers.*",
            "embedding": "embed_tokens",
            "decoder.output": "norm",
        },
        one_input=(
            ("layers.*.self_attn", ("q_proj", "k_proj", "v_proj")),
            ("layers.*.mlp", ("gate_proj", "up_proj")),
        ),
    ),
    Family(
        ("vit",),
        {
            "query": "layers.*.attention.q_proj",
            "key": "layers.*.attention.k_proj",
            "value": "layers.*.attention.v_proj",
            "output": "layers.*.attention.o_proj",
            "attention": "layers.*.attention",
            "self_attention": "layers.*.attention",
            "feedforward": "layers.*.mlp",
            "up": "layers.*.mlp.fc1",
            "down": "layers.*.mlp.fc2",
            "block": "layers.*",
            "embedding": "embeddings",
            "encoder.output": "layernorm",
        },
        one_input=(("layers.*.attention", ("q_proj", "k_proj", "v_proj")),),
    ),
)


def family_of(model: nn.Module) -> Family | None:
    """Return the family of a Hugging Face model, by its ``config.model_type``.

    None for any other.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return next((family for family in FAMILIES if kind in family.types), None)


def base_path(model: nn.Module) -> str:
    """Return the path of the base model inside ``model`` (``"bert"``), empty where it is the
    model."""
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and prefix in dict(model.named_children()) else ""
