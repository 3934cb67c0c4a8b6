"""Prompts and prefixes as PEFT has them, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modgraft.computation.prefix import Prefix, key_value_shape
from modgraft.computation.prompts import SoftPrompt
from modgraft.core.embeddings import reading_of
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site, find
from modgraft.store.formats.peft.folder import Folder, Group, Piece, Written
from modgraft.store.formats.peft.options import PrefixOptions, PromptOptions

_WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
"""The names that configurations give to how far back tokens see."""


def read_prompt(folder: Folder, said: PromptOptions) -> Group:
    """Return a soft prompt."""
    length, twice = said.num_virtual_tokens, said.num_transformer_submodules == 2
    if said.num_transformer_submodules not in (None, 1, 2) or (
        twice and said.task_type != "SEQ_2_SEQ_LM"
    ):
        folder.refuse(
            f"num_transformer_submodules={said.num_transformer_submodules} with "
            f"task_type={said.task_type!r} is not understood"
        )
    method = SoftPrompt(length=length, at_start=True)
    width = reading_of(folder.model).width
    key = "prompt_embeddings"
    folder.take(key, length * (1 + twice), width)  # PEFT puts the first half before the encoder
    piece = Piece(":phi", (length, width), lambda: folder.tensor(key)[:length])
    return Group(method, [""], [piece])


def write_prompt(name: str, method: SoftPrompt, model: nn.Module, place: SoftPrompt) -> Written:
    """Return a soft prompt as PEFT has it."""
    reading = reading_of(model)
    if not method.at_start and method.after(reading.first):
        raise ModgraftError(
            f"{name!r} stands after the class token, and PEFT puts a prompt before it; PEFT has "
            f"the place of SoftPrompt(length={method.length}, at_start=True)"
        )
    if reading.inside:
        raise ModgraftError(f"{name!r} stands among image patches, where PEFT has no prompt")
    said = {
        "num_virtual_tokens": method.length, "token_dim": reading.width,
        "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    return Written({"prompt_embeddings": place.phi}, said, [])


def read_prefix(folder: Folder, said: PrefixOptions) -> Group:
    """Return a prefix: [k, 2·L·d], the keys and the values of each layer in turn."""
    if said.num_transformer_submodules not in (None, 1):
        folder.refuse(
            f"a prefix of an encoder-decoder (num_transformer_submodules="
            f"{said.num_transformer_submodules}) is a cache whose relative positions are counted, "
            f"which is not computed here"
        )
    length, heads, layers = said.num_virtual_tokens, said.num_attention_heads, said.num_layers
    sites = find(folder.model, "self_attention")
    if len(sites) != layers or heads < 1:
        folder.refuse(f"it has keys of {layers} layers, and this host attends in {len(sites)}")
    if why := _within_window(sites):
        folder.refuse(f"{why}; load it in PEFT, or make the host without the window")
    for i, site in enumerate(sites):
        here = key_value_shape("Prefix", site)
        width = said.token_dim // heads
        if here != (heads, width, width) or getattr(site.module, "layer_idx", i) != i:
            folder.refuse(
                f"{site.label} attends with keys of {here[0]} heads of {here[1]} features, and it "
                f"has {heads} of {width}"
            )
    key = "prompt_embeddings"
    folder.take(key, length, 2 * layers * said.token_dim)
    shape = (length, heads, said.token_dim // heads)
    pieces = [
        Piece(
            f"{site.label}:{ours}", shape,
            lambda n=2 * i + j: folder.tensor(key).view(length, 2 * layers, *shape[1:])[:, n],
        )
        for i, site in enumerate(sites)
        for j, ours in enumerate(("keys", "values"))
    ]  # fmt: skip
    method = Prefix(length=length, counted=True)
    return Group(method, [site.label for site in sites], pieces)


def write_prefix(
    name: str, method: Prefix, sites: Sequence[tuple[Site, Prefix]], model: nn.Module
) -> Written:
    """Return a prefix as PEFT has it."""
    length = method.length
    if not method.counted:
        raise ModgraftError(
            f"{name!r} leaves the text its positions, and PEFT counts on after the prefix; it has "
            f"the place of Prefix(length={length}, counted=True)"
        )
    if method.reparametrise is not None:
        raise ModgraftError(
            f"{name!r} comes from an MLP, which PEFT does not save; mg.fold_prefix(host, {name!r}, "
            f"into=…) makes the prefix that it computes"
        )
    if why := _within_window([site for site, _ in sites]):
        raise ModgraftError(f"{name!r}: {why}; save it without format='peft'")
    every = [site.label for site in find(model, "self_attention")]
    shapes = {(p.heads, p.width, p.value_width) for _, p in sites}
    if [site.label for site, _ in sites] != every or len(shapes) != 1:
        raise ModgraftError(
            f"{name!r} is at {len(sites)} of {len(every)} layers that attend, and PEFT has one "
            f"at all of them, of one shape"
        )
    heads, width, values = shapes.pop()
    if width != values:
        raise ModgraftError(f"{name!r} has keys and values of unequal width, which PEFT has not")
    both: list[Tensor] = [
        t for _, place in sites for t in (place.keys, place.values)
    ]  # 2·L of [k, heads, d]
    said = {
        "num_virtual_tokens": length, "token_dim": heads * width, "num_layers": len(sites),
        "num_attention_heads": heads, "num_transformer_submodules": 1,
        "encoder_hidden_size": None, "prefix_projection": False,
    }  # fmt: skip
    return Written({"prompt_embeddings": torch.stack(both, 1).flatten(1)}, said, [])


def _within_window(sites: Sequence[Site]) -> str | None:
    """Say which layer attends within a window, None where every token sees all before it.

    A prefix of PEFT stands in the KV cache, and falls out of a window as the text goes on. One that
    is as long as the longest text of the host is none.
    """
    for i, site in enumerate(sites):
        config = getattr(site.module, "config", None)
        types, at = getattr(config, "layer_types", None), getattr(site.module, "layer_idx", i)
        if types and isinstance(at, int) and "full" in str(types[at]):
            continue
        most = getattr(config, "max_position_embeddings", None)
        for option in _WINDOWS:
            size = getattr(site.module if hasattr(site.module, option) else config, option, None)
            if size and (not isinstance(most, int) or size < most):
                return (
                    f"{site.label} attends within a window ({option}={size}), out of which PEFT's "
                    f"prefix falls as the text goes on, where every token sees one of ours"
                )
    return None
