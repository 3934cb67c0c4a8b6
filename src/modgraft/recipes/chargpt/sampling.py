"""Write on from a text, token by token, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modgraft.core.errors import ModgraftError
from modgraft.data.shards import tokens_of
from modgraft.models.gpt import GPT


@torch.inference_mode()
def written(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield what a model writes after a text, in pieces of whole characters.

    The model sees as many tokens as it was trained on. Where they are full it reads the later half
    anew, and goes on.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: what comes before; not empty.
        tokens: how many are written.
        temperature: what the logits are divided by; 0: the likeliest token is taken each time.
        top_k: how many of the likeliest tokens there are to choose from; 0: all.
        top_p: how much probability the likeliest ones to choose from have together.
        seed: of the choices.

    Raises:
        ModgraftError: for an empty text, an unknown character, or a setting that means nothing.
    """
    if not text:
        raise ModgraftError("sampling needs a text to begin with, such as a line break")
    for name, value, good in (
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("tokens", tokens, tokens >= 1),
    ):
        if not good:
            raise ModgraftError(f"{name}={value} means nothing here; see modgraft recipe --help")
    shaped = LogitsProcessorList()
    if temperature not in (0, 1):
        shaped.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        shaped.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        shaped.append(TopPLogitsWarper(top_p))
    generator, room = torch.Generator().manual_seed(seed), model.config.max_position_embeddings
    ids = torch.from_numpy(tokens_of(tokenizer, text))[None]
    shown, cache, new = DecodeStream(skip_special_tokens=False), None, ids
    for _ in range(tokens):
        if cache is None or cache.get_seq_length() + 1 > room:
            cache, new = DynamicCache(), ids[:, -(room if cache is None else room // 2) :]
        out = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = shaped(ids, out.logits[:, -1])  # type: ignore[arg-type]  # [1, V]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], 1)
        if piece := shown.step(tokenizer, int(new)):
            yield piece


def writer(folder: Path) -> tuple[GPT, Tokenizer]:
    """Load the best model of a run's first seed, and its tokenizer.

    Raises:
        ModgraftError: there is none.
    """
    homes = sorted(folder.glob("seed*/fast_long/model"))
    if not homes:
        raise ModgraftError(
            f"{folder}: no trained model is here; train one: modgraft recipe chargpt --run {folder}"
        )
    model = GPT.from_pretrained(homes[0], local_files_only=True).eval()
    return model, Tokenizer.from_file(str(homes[0].parents[1] / "tokenizer.json"))
