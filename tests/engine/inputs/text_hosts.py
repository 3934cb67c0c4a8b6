"""Small text hosts by config, and prompts put before their input by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import modgraft as mg

LENGTH, PAD = 3, 0
SHAPE: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ROOM: dict[str, Any] = {"max_position_embeddings": 24}
HEADS: dict[str, Any] = {"num_key_value_heads": 2}
SPECIAL: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": PAD}
GPT: dict[str, Any] = {"vocab_size": 41, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
GEMMA: dict[str, Any] = {
    **SHAPE, **ROOM, **HEADS, "head_dim": 8, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
ROWS_EACH_LAYER = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 41}

# the name before Config, Model, ForCausalLM, … → its configuration
DECODERS: dict[str, dict[str, Any]] = {
    "GPT2": GPT,
    "OPT": {
        **{k: v for k, v in SHAPE.items() if k != "intermediate_size"}, **ROOM,
        "ffn_dim": 40, "word_embed_proj_dim": 16,
    },
    "GPTNeoX": {**SHAPE, **ROOM},
    "Phi3": {**SHAPE, **ROOM, **HEADS},
    "Mixtral": {**SHAPE, **ROOM, **HEADS, "num_local_experts": 3},
    "Qwen3Moe": {
        **SHAPE, **ROOM, **HEADS, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Falcon": {**SHAPE, "alibi": True, "new_decoder_architecture": False},
    "Bloom": {"vocab_size": 41, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 41, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 24},
    "GPTJ": {**GPT, "rotary_dim": 8},
    "Gemma3": GEMMA,
    "Gemma3n": {
        **GEMMA, **ROWS_EACH_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2,
    },
    "Gemma4": {**GEMMA, **ROWS_EACH_LAYER, "global_head_dim": 8},
    "Bamba": {
        **SHAPE, **ROOM, **HEADS, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4,
    },
    "Mamba": {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "XLNet": {"vocab_size": 41, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40},
    "CTRL": {**GPT, "dff": 40},
}  # fmt: skip
RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
ENCODERS: dict[str, dict[str, Any]] = {  # whose texts begin with a class token
    "Bert": {**SHAPE, **ROOM},
    "Roberta": {**SHAPE, **ROOM, "pad_token_id": PAD},
    "Electra": {**SHAPE, **ROOM, "embedding_size": 16},
    "Deberta": {**SHAPE, **ROOM, **RELATIVE},
    "DebertaV2": {**SHAPE, **ROOM, **RELATIVE},
    "DistilBert": {
        "vocab_size": 41, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, **ROOM
    },
    "ModernBert": {
        **SHAPE, **ROOM, "local_attention": 4, "global_attn_every_n_layers": 2,
        "classifier_pooling": "cls",
    },
    "Albert": {**SHAPE, **ROOM, "embedding_size": 16},
    "MPNet": {**SHAPE, **ROOM},
    "Esm": {**SHAPE, **ROOM, "position_embedding_type": "rotary", "mask_token_id": 4},
}  # fmt: skip
HOSTS = {**DECODERS, **ENCODERS}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 41, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 24, "decoder_start_token_id": 1, **SPECIAL,
}  # fmt: skip


def drawn(model: nn.Module) -> nn.Module:
    """Draw large weights: the default initialisation is so small that nothing shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.1)
    return model.eval()


def make(name: str, *heads: str) -> nn.Module:
    """Make a small model, with the first of ``heads`` that the architecture has."""
    own = HOSTS[name]
    text = "Text" if name.startswith("Gemma") else ""
    config = getattr(tf, f"{name}{text}Config")(**{**SPECIAL, **own})
    names = [name + head for head in heads] + [f"{name}{text}{head}" for head in heads]
    found = next(getattr(tf, each) for each in names if hasattr(tf, each))
    if text and found.config_class is not None and not isinstance(config, found.config_class):
        found = next(getattr(tf, each) for each in names[::-1] if hasattr(tf, each))
    return drawn(found(config))


def writer(name: str) -> nn.Module:
    return make(name, "ForCausalLM", "LMHeadModel")


def idefics() -> nn.Module:
    """Make an Idefics, whose eye has 5 positions, and whose text's are rotations."""
    eye = {"embed_dim": 16, "image_size": 8, "patch_size": 4, "intermediate_size": 24,
           "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    config = tf.IdeficsConfig(
        vocab_size=41, additional_vocab_size=0, hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, cross_layer_interval=1, use_resampler=False,
        vision_config=eye, **SPECIAL,
    )  # fmt: skip
    return drawn(tf.IdeficsForVisionText2Text(config))


def prompted(model: nn.Module) -> tuple[mg.Host, nn.Parameter]:
    """Implant a soft prompt; return its tokens φ ``[3, d]`` too."""
    host = mg.Host(model).eval()
    host.implant("m", mg.SoftPrompt(length=LENGTH, bound=1.0))
    phi = host["m"].places[0].phi
    assert isinstance(phi, nn.Parameter)
    return host, phi


def ids(batch: int = 3, length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, 41, (batch, length), generator=generator)


def outside(model: nn.Module, phi: Tensor, text: Tensor, at: int) -> dict[str, Any]:
    """Return arguments for the bare model: φ is put into the text's embeddings outside of it.

    Gemma 3n and 4 also have a row of each id for each layer; a token that is no word has the one
    of padding there.
    """
    embeddings = model.get_input_embeddings()(text)  # type: ignore[operator]
    own = phi.expand(len(text), -1, -1)
    joined = {"inputs_embeds": torch.cat([embeddings[:, :at], own, embeddings[:, at:]], 1)}
    rows: Callable[..., Tensor] | None = getattr(
        getattr(model, "model", model), "get_per_layer_inputs", None
    )
    if rows is not None:
        known = torch.cat([torch.full((len(text), LENGTH), PAD), text], 1)
        joined["per_layer_inputs"] = (
            rows(known, None) if "4" in type(model).__name__ else rows(known)
        )
    return joined
