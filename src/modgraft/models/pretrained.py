"""Turns models of transformers into the hosts of this folder, and back: a row for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from modgraft.core.errors import ModgraftError
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.models.t5 import T5, T5Config
from modgraft.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class Layout:
    """How a family of transformers and a model of ours correspond.

    Attributes:
        ours: our class.
        theirs: their class.
        rows: their layer or parameter → ours, in which ``*`` is a block's number. Several of ours
            are one of theirs, one after another.
        read: their config → ours, as arguments.
        write: our config → theirs, as arguments; where that family has no such model, it raises.
        transposed: whether their layers but embeddings hold W as ``[in, out]``.
    """

    ours: type[PreTrainedModel]
    theirs: type[PreTrainedModel]
    rows: Mapping[str, Sequence[str]]
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    transposed: Sequence[str] = ()


def from_transformers(model: PreTrainedModel | str | Path) -> GPT | T5 | ViT:
    """Make a host of ours that computes what a model of transformers does, with its weights.

    Args:
        model: a GPT-2, Llama, T5 (version 1.0 or 1.1) or ViT with its head, or a folder that
            ``save_pretrained`` wrote; nothing is downloaded.

    Returns:
        The host, in the model's dtype and mode, with weights of its own.

    Raises:
        ModgraftError: for another model, or one with a setting that ours has not; it says which.
    """
    if not isinstance(model, PreTrainedModel):
        kind = AutoConfig.from_pretrained(model, local_files_only=True).model_type
        layout = _layout(kind)
        model = layout.theirs.from_pretrained(model, local_files_only=True)
    layout = _layout(model.config.model_type)
    if not isinstance(model, layout.theirs):
        raise ModgraftError(
            f"a {type(model).__name__} has no head that ours has; take a {layout.theirs.__name__}"
        )
    made = _made(layout.ours, layout.read(model.config))
    state = model.state_dict()
    found = {}
    for theirs, ours, transposed in _pairs(layout, model.config, state):
        value = state.pop(theirs)
        value = value.T if transposed else value
        for name, part in zip(ours, value.chunk(len(ours)), strict=True):
            found[name] = part.contiguous().clone()
    if state:
        raise ModgraftError(f"ours has no layer for {', '.join(state)[:200]} of this model")
    _load(made, found)
    return made.to(model.dtype).train(model.training)


def to_transformers(model: GPT | T5 | ViT) -> PreTrainedModel:
    """Make a model of transformers that computes what a host of ours does, with its weights.

    ``save_pretrained`` of what is returned writes the format that other tools read.

    Returns:
        A GPT-2 or a Llama, a T5 or a ViT, in the host's dtype and mode.

    Raises:
        ModgraftError: where no such family has what the host is made of; it says what.
    """
    config, refused = model.config, []
    for layout in (each for each in LAYOUTS.values() if each.ours is type(model)):
        try:
            arguments = layout.write(config)
        except ModgraftError as error:
            refused.append(str(error))
            continue
        made = _made(layout.theirs, arguments)
        state, found = model.state_dict(), {}
        names = made.state_dict()
        for theirs, ours, transposed in _pairs(layout, made.config, names):
            value = torch.cat([state[name] for name in ours])
            found[theirs] = (value.T if transposed else value).contiguous().clone()
        _load(made, found)
        return made.to(model.dtype).train(model.training)
    raise ModgraftError(f"transformers has no such model: {'; '.join(refused)}")


def _made(kind: type[PreTrainedModel], arguments: Mapping[str, Any]) -> Any:
    config: Any = kind.config_class
    return kind(config(**arguments))


def _layout(kind: str) -> Layout:
    if kind not in LAYOUTS:
        raise ModgraftError(
            f"no host of ours computes what a {kind!r} does; there are {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[kind]


def _load(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Fill a model whose tied weights may come once."""
    missing, odd = model.load_state_dict(state, strict=False)
    missing = set(missing) - set(model._tied_weights_keys or {})
    if missing or odd:
        raise ModgraftError(f"{type(model).__name__}: {sorted([*missing, *odd])} do not match")
    model.tie_weights()


def _pairs(
    layout: Layout, config: Any, state: Mapping[str, Tensor]
) -> list[tuple[str, list[str], bool]]:
    """Return their key, ours, and whether theirs is ours transposed, for all keys of theirs."""
    pairs = []
    for theirs, ours in layout.rows.items():
        for block in range(_blocks(theirs, config)) if "*" in theirs else [0]:
            layer = theirs.replace("*", str(block))
            for end in ("", ".weight", ".bias"):
                if layer + end in state:
                    transposed = end == ".weight" and theirs in layout.transposed
                    names = [name.replace("*", str(block)) + end for name in ours]
                    pairs.append((layer + end, names, transposed))
    return pairs


def _blocks(row: str, config: Any) -> int:
    return config.num_decoder_layers if row.startswith("decoder") else config.num_hidden_layers


def _refuse(what: str, **settings: tuple[Any, Any]) -> None:
    """Raise for settings that are not what they must be.

    Args:
        what: whose settings.
        settings: name → value, what it must be.
    """
    for name, (value, wanted) in settings.items():
        if value != wanted:
            raise ModgraftError(f"{what}: {name}={value!r}; ours is for {wanted!r}")


def _one(what: str, **settings: Any) -> Any:
    """Return the one value of several settings."""
    if len(set(settings.values())) > 1:
        several = ", ".join(f"{k}={v!r}" for k, v in settings.items())
        raise ModgraftError(f"{what}: {several}; ours has one value for them")
    return next(iter(settings.values()))


_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _tokens(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in _TOKENS}


# -- GPT-2 -----------------------------------------------------------------------------------------

_GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _from_gpt2(config: Any) -> dict[str, Any]:
    _refuse(
        "GPT-2",
        scale_attn_weights=(config.scale_attn_weights, True),
        scale_attn_by_inverse_layer_idx=(config.scale_attn_by_inverse_layer_idx, False),
        add_cross_attention=(config.add_cross_attention, False),
    )
    if config.activation_function not in _GELU:
        raise ModgraftError(f"GPT-2: activation_function={config.activation_function!r}")
    return _tokens(config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.n_positions,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.n_inner,
        "activation": _GELU[config.activation_function],
        "norm_eps": config.layer_norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "dropout": _one(
            "GPT-2",
            embd_pdrop=config.embd_pdrop,
            attn_pdrop=config.attn_pdrop,
            resid_pdrop=config.resid_pdrop,
        ),
    }


def _to_gpt2(config: GPTConfig) -> dict[str, Any]:
    _refuse(
        "GPT-2",
        positions=(config.positions, "learned"),
        norm=(config.norm, "layer"),
        bias=(config.bias, True),
        ngram_rows=(config.ngram_rows, ()),
        num_key_value_heads=(config.num_key_value_heads, config.num_attention_heads),
        head_dim=(config.head_dim, config.hidden_size // config.num_attention_heads),
    )
    name = {ours: theirs for theirs, ours in reversed(_GELU.items())}.get(config.activation)
    if name is None:
        raise ModgraftError(f"GPT-2: activation={config.activation!r}")
    return _tokens(config) | {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "activation_function": name,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
    }


_GPT2_ROWS = {
    "transformer.wte": ["embedding"],
    "transformer.wpe": ["positions"],
    "transformer.h.*.ln_1": ["blocks.*.attention_norm"],
    "transformer.h.*.attn.c_attn": [
        f"blocks.*.attention.{name}" for name in ("query", "key", "value")
    ],
    "transformer.h.*.attn.c_proj": ["blocks.*.attention.output"],
    "transformer.h.*.ln_2": ["blocks.*.feedforward_norm"],
    "transformer.h.*.mlp.c_fc": ["blocks.*.feedforward.up"],
    "transformer.h.*.mlp.c_proj": ["blocks.*.feedforward.down"],
    "transformer.ln_f": ["norm"],
    "lm_head": ["head"],
}

# -- Llama -----------------------------------------------------------------------------------------


def _from_llama(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    _refuse(
        "Llama",
        hidden_act=(config.hidden_act, "silu"),
        rope_type=(rope.get("rope_type", "default"), "default"),
        attention_dropout=(config.attention_dropout, 0.0),
    )
    return _tokens(config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "positions": "rotary",
        "rope_theta": rope["rope_theta"],
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "activation": "swiglu",
        "bias": _one("Llama", attention_bias=config.attention_bias, mlp_bias=config.mlp_bias),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }


def _to_llama(config: GPTConfig) -> dict[str, Any]:
    _refuse(
        "Llama",
        positions=(config.positions, "rotary"),
        norm=(config.norm, "rms"),
        activation=(config.activation, "swiglu"),
        ngram_rows=(config.ngram_rows, ()),
        dropout=(config.dropout, 0.0),
    )
    return _tokens(config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }


_LLAMA_ROWS = {
    "model.embed_tokens": ["embedding"],
    "model.layers.*.input_layernorm": ["blocks.*.attention_norm"],
    "model.layers.*.self_attn.q_proj": ["blocks.*.attention.query"],
    "model.layers.*.self_attn.k_proj": ["blocks.*.attention.key"],
    "model.layers.*.self_attn.v_proj": ["blocks.*.attention.value"],
    "model.layers.*.self_attn.o_proj": ["blocks.*.attention.output"],
    "model.layers.*.post_attention_layernorm": ["blocks.*.feedforward_norm"],
    "model.layers.*.mlp.gate_proj": ["blocks.*.feedforward.gate"],
    "model.layers.*.mlp.up_proj": ["blocks.*.feedforward.up"],
    "model.layers.*.mlp.down_proj": ["blocks.*.feedforward.down"],
    "model.norm": ["norm"],
    "lm_head": ["head"],
}

# -- T5 --------------------------------------------------------------------------------------------

_T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu"}


def _from_t5(config: Any) -> dict[str, Any]:
    if config.feed_forward_proj not in _T5_ACTIVATIONS:
        raise ModgraftError(f"T5: feed_forward_proj={config.feed_forward_proj!r}")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "head_dim": config.d_kv,
        "intermediate_size": config.d_ff,
        "num_encoder_layers": config.num_layers,
        "num_hidden_layers": config.num_decoder_layers,
        "num_attention_heads": config.num_heads,
        "buckets": config.relative_attention_num_buckets,
        "max_distance": config.relative_attention_max_distance,
        "activation": _T5_ACTIVATIONS[config.feed_forward_proj],
        "dropout": config.dropout_rate,
        "norm_eps": config.layer_norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "scale_output": config.scale_decoder_outputs,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def _to_t5(config: T5Config) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _T5_ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": theirs[config.activation],
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "scale_decoder_outputs": config.scale_output,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def _t5_rows() -> dict[str, list[str]]:
    rows = {
        "shared": ["shared"],
        "encoder.embed_tokens": ["encoder.embedding"],
        "decoder.embed_tokens": ["decoder.embedding"],
        "lm_head": ["head"],
    }
    for stack, feedforward in (("encoder", 1), ("decoder", 2)):
        block, ours = f"{stack}.block.*.layer", f"{stack}.blocks.*"
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        rows |= {bias: [f"{stack}.bias.table"], f"{stack}.final_layer_norm": [f"{stack}.norm"]}
        attentions = [("0", "SelfAttention", "attention"), ("1", "EncDecAttention", "cross")]
        for number, name, own in attentions[: 2 if stack == "decoder" else 1]:
            rows[f"{block}.{number}.layer_norm"] = [f"{ours}.{own}_norm"]
            for short, layer in zip("qkvo", ("query", "key", "value", "output"), strict=True):
                rows[f"{block}.{number}.{name}.{short}"] = [f"{ours}.{own}.{layer}"]
        rows[f"{block}.{feedforward}.layer_norm"] = [f"{ours}.feedforward_norm"]
        for theirs, layer in (("wi", "up"), ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            rows[f"{block}.{feedforward}.DenseReluDense.{theirs}"] = [f"{ours}.feedforward.{layer}"]
    return rows


# -- ViT -------------------------------------------------------------------------------------------


def _from_vit(config: Any) -> dict[str, Any]:
    _refuse("ViT", hidden_act=(config.hidden_act, "gelu"), qkv_bias=(config.qkv_bias, True))
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "dropout": _one(
            "ViT",
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        ),
    }


def _to_vit(config: ViTConfig) -> dict[str, Any]:
    _refuse("ViT", positions=(config.positions, "learned"))
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.initializer_range,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


_VIT_ROWS = {
    "vit.embeddings.cls_token": ["embeddings.cls_token"],
    "vit.embeddings.position_embeddings": ["embeddings.positions"],
    "vit.embeddings.patch_embeddings.projection": ["embeddings.projection"],
    "vit.layers.*.attention.q_proj": ["blocks.*.attention.query"],
    "vit.layers.*.attention.k_proj": ["blocks.*.attention.key"],
    "vit.layers.*.attention.v_proj": ["blocks.*.attention.value"],
    "vit.layers.*.attention.o_proj": ["blocks.*.attention.output"],
    "vit.layers.*.layernorm_before": ["blocks.*.attention_norm"],
    "vit.layers.*.layernorm_after": ["blocks.*.feedforward_norm"],
    "vit.layers.*.mlp.fc1": ["blocks.*.feedforward.up"],
    "vit.layers.*.mlp.fc2": ["blocks.*.feedforward.down"],
    "vit.layernorm": ["layernorm"],
    "classifier": ["head"],
}

LAYOUTS = {
    "gpt2": Layout(
        GPT, GPT2LMHeadModel, _GPT2_ROWS, _from_gpt2, _to_gpt2,
        transposed=[row for row in _GPT2_ROWS if ".c_" in row],
    ),
    "llama": Layout(GPT, LlamaForCausalLM, _LLAMA_ROWS, _from_llama, _to_llama),
    "t5": Layout(T5, T5ForConditionalGeneration, _t5_rows(), _from_t5, _to_t5),
    "vit": Layout(ViT, ViTForImageClassification, _VIT_ROWS, _from_vit, _to_vit),
}  # fmt: skip
