"""The two Llamas of the package glassllm, pretrained on the books of one author each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.data import fetch

LANGUAGES = {"en": "Lewis Carroll", "pt": "Machado de Assis"}
"""Language → whose books."""

SPACE = "▁"
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")

_LAYERS = {
    "norm1.gamma": "input_layernorm",
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "norm2.gamma": "post_attention_layernorm",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}
_ROTATED = ("attn.W_Q", "attn.W_K")


def load(
    language: str = "en", folder: str | Path | None = None
) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Load a pretrained Llama and its tokenizer, of 852,608 parameters and 1,024 tokens.

    Args:
        language: of :data:`LANGUAGES`.
        folder: where the package's files are; None: where ``modgraft data fetch glassllm`` puts
            them.

    Returns:
        The model, in float32 and evaluation mode, which sees 128 tokens; and what makes them of a
        text. A character that it has not becomes ``<unk>``.

    Raises:
        UnknownNameError: for another language.
        MissingFileError: where the package was not fetched.
        DataError: where its files were changed, or are of another model.
    """
    if language not in LANGUAGES:
        raise UnknownNameError.among("language of glassllm", language, LANGUAGES)
    home = (fetch.path("glassllm") if folder is None else Path(folder)) / "glassllm" / "weights"
    file = home / f"{language}.npz"
    with np.load(file, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    model = _model(arrays, file)
    return model, _tokenizer(home / f"{language}.tokenizer.json")


def _model(arrays: dict[str, np.ndarray], file: Path) -> LlamaForCausalLM:
    said = json.loads(str(arrays.pop("__config__")))
    width, heads, shared = said["d_model"], said["n_heads"], said["n_kv_heads"]
    config = LlamaConfig(
        vocab_size=said["vocab_size"], hidden_size=width, num_hidden_layers=said["n_layers"],
        num_attention_heads=heads, num_key_value_heads=shared, head_dim=width // heads,
        intermediate_size=int(8 * width / 3), max_position_embeddings=said["max_len"],
        rope_parameters={"rope_type": "default", "rope_theta": said["rope_base"]},
        rms_norm_eps=said["eps"], tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": arrays.pop("E"),
        "model.norm.weight": arrays.pop("norm_f.gamma"),
    }
    for name, array in arrays.items():
        _, number, part = name.split(".", 2)
        value = array.T if array.ndim == 2 else array  # theirs are [in, out]
        if part in _ROTATED:
            value = _halves(value, width // heads)
        state[f"model.layers.{number}.{_LAYERS[part]}.weight"] = value
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    tensors: dict[str, Tensor] = {
        name: torch.from_numpy(np.ascontiguousarray(value, np.float32))
        for name, value in state.items()
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise DataError(f"these are no weights of glassllm 0.1.0: {why:.300}", file=file) from error
    return model


def _halves(weight: np.ndarray, head: int) -> np.ndarray:
    """Order the rows ``[heads · d, in]`` of each head as transformers turns them: theirs turns
    each even row with the odd one after it, and a Llama's the first half with the second."""
    pairs = weight.reshape(-1, head // 2, 2, weight.shape[1])  # [heads, d / 2, 2, in]
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(file: Path) -> Tokenizer:
    """Make the tokenizer: pairs of characters, merged within words that keep the space before."""
    said = json.loads(file.read_text("utf-8"))
    merges = [(first, second) for first, second in said["merges"]]
    tokens = [*SPECIAL, *said["alphabet"], *(first + second for first, second in merges)]
    made = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token=SPECIAL[1])
    )
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    words = Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+")
    made.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.Replace(SPECIAL[1], "⁇"), decoders.Fuse()]
    )
    return made
