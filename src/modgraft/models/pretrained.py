"""Turns models of transformers into the hosts of this folder, and back: a row for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from modgraft.models.gpt import GPT
from modgraft.models.t5 import T5
from modgraft.models.vit import ViT


@dataclass(frozen=True)
class Layout:
    """How a family of transformers and a model of ours correspond.

    Attributes:
        name: the family's, for errors.
        ours: our class.
        theirs: their class.
        rows: their layer or parameter → ours, in which ``*`` is a block's number. Several of ours
            are one of theirs, one after another.
        settings: their setting → ours; a dot leads into a dictionary. Several of theirs may be one
            of ours, and are then alike.
        given: what else theirs must be set to.
        fixed: what ours is set to.
        follows: our setting → what it must be, by the others.
        words: our setting → their value → ours, where they are called otherwise.
        transposed: the rows whose weight is ``[in, out]`` with them.
    """

    name: str
    ours: type[PreTrainedModel]
    theirs: type[PreTrainedModel]
    rows: Mapping[str, Sequence[str]]
    settings: Mapping[str, str]
    given: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    follows: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    transposed: Sequence[str] = ()

    def read(self, config: Any) -> dict[str, Any]:
        """Return our settings for a config of theirs.

        Raises:
            ModgraftError: for one that ours has not.
        """
        for setting, wanted in self.given.items():
            self._check(setting, _setting(config, setting), wanted)
        found: dict[str, dict[str, Any]] = {}
        for theirs, ours in self.settings.items():
            value = _setting(config, theirs)
            if ours in self.words:
                if value not in self.words[ours]:
                    self._check(theirs, value, " or ".join(self.words[ours]))
                value = self.words[ours][value]
            found.setdefault(ours, {})[theirs] = value
        for several in found.values():
            if len(set(map(str, several.values()))) > 1:
                said = ", ".join(f"{k}={v!r}" for k, v in several.items())
                raise ModgraftError(f"{self.name}: {said}; ours has one value for them")
        return {**self.fixed, **{k: next(iter(some.values())) for k, some in found.items()}}

    def write(self, config: Any) -> dict[str, Any]:
        """Return their settings for a config of ours.

        Raises:
            ModgraftError: where their family has no such model.
        """
        wanted = {**self.fixed, **{name: of(config) for name, of in self.follows.items()}}
        for setting, value in wanted.items():
            self._check(setting, getattr(config, setting), value)
        made: dict[str, Any] = {}
        values = dict(self.given)
        for theirs, ours in self.settings.items():
            value = getattr(config, ours)
            if ours in self.words:
                known = {own: word for word, own in reversed(list(self.words[ours].items()))}
                if value not in known:
                    self._check(ours, value, " or ".join(known))
                value = known[value]
            values[theirs] = value
        for theirs, value in values.items():
            outer, _, inner = theirs.partition(".")
            if inner:
                made.setdefault(outer, {})[inner] = value
            else:
                made[outer] = value
        return made

    def _check(self, setting: str, value: Any, wanted: Any) -> None:
        if value != wanted:
            raise ModgraftError(f"{self.name}: {setting}={value!r}; there is {wanted!r} alone")


def _setting(config: Any, name: str) -> Any:
    outer, _, inner = name.partition(".")
    value: Any = getattr(config, outer, None)
    return value.get(inner, "default") if inner else value


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
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
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


_TOKENS = {name: name for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
_ALIKE = {
    name: name
    for name in ("vocab_size", "tie_word_embeddings", "initializer_range", *_TOKENS)
}  # fmt: skip

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
        "GPT-2", GPT, GPT2LMHeadModel, _GPT2_ROWS,
        settings=_ALIKE | {
            "n_positions": "max_position_embeddings",
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_inner": "intermediate_size",
            "activation_function": "activation",
            "layer_norm_epsilon": "norm_eps",
            "embd_pdrop": "dropout", "attn_pdrop": "dropout", "resid_pdrop": "dropout",
        },
        given={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        fixed={"positions": "learned", "norm": "layer", "bias": True, "ngram_rows": ()},
        follows={
            "num_key_value_heads": lambda ours: ours.num_attention_heads,
            "head_dim": lambda ours: ours.hidden_size // ours.num_attention_heads,
        },
        words={
            "activation": {
                "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu",
            }
        },
        transposed=[row for row in _GPT2_ROWS if ".c_" in row],
    ),
    "llama": Layout(
        "Llama", GPT, LlamaForCausalLM, _LLAMA_ROWS,
        settings=_ALIKE | {
            "max_position_embeddings": "max_position_embeddings",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_attention_heads",
            "num_key_value_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "intermediate_size": "intermediate_size",
            "rope_parameters.rope_theta": "rope_theta",
            "rms_norm_eps": "norm_eps",
            "attention_bias": "bias", "mlp_bias": "bias",
        },
        given={
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "rope_parameters.rope_type": "default",
        },
        fixed={
            "positions": "rotary", "norm": "rms", "activation": "swiglu", "ngram_rows": (),
            "dropout": 0.0,
        },
    ),
    "t5": Layout(
        "T5", T5, T5ForConditionalGeneration, _t5_rows(),
        settings={
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "d_kv": "head_dim",
            "d_ff": "intermediate_size",
            "num_layers": "num_encoder_layers",
            "num_decoder_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "relative_attention_num_buckets": "buckets",
            "relative_attention_max_distance": "max_distance",
            "feed_forward_proj": "activation",
            "dropout_rate": "dropout",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_word_embeddings",
            "scale_decoder_outputs": "scale_output",
            "pad_token_id": "pad_token_id",
            "eos_token_id": "eos_token_id",
            "decoder_start_token_id": "decoder_start_token_id",
        },
        words={"activation": {"relu": "relu", "gated-gelu": "geglu"}},
    ),
    "vit": Layout(
        "ViT", ViT, ViTForImageClassification, _VIT_ROWS,
        settings={
            **{name: name for name in (
                "image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers",
                "num_attention_heads", "intermediate_size", "initializer_range", "id2label",
                "label2id",
            )},
            "layer_norm_eps": "norm_eps",
            "hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "dropout",
        },
        given={"hidden_act": "gelu", "qkv_bias": True},
        fixed={"positions": "learned"},
    ),
}  # fmt: skip
