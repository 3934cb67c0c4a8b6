"""The tokens that a host reads: their embedding table, width and number of positions."""

from __future__ import annotations

import inspect

from torch import nn

from modgraft.core.architectures import base_path, family_of
from modgraft.core.errors import ModgraftError
from modgraft.core.family import joined


def token_table(host: nn.Module) -> nn.Embedding:
    """Return the embedding table of a text host's tokens.

    Raises:
        ModgraftError: for a host that has none, or does not take embeddings instead of tokens.
    """
    try:
        table = host.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    takes = inspect.signature(type(host).forward).parameters
    if isinstance(table, nn.Embedding) and "inputs_embeds" in takes:
        return table
    family = family_of(host)
    if family is not None and family.embedded is not None:
        raise ModgraftError(
            f"{type(host).__name__} reads no text and has no vocabulary to look tokens up in; "
            f"what goes before its input here is SoftPrompt(init='random') or a LinearMap"
        )
    raise ModgraftError(
        f"{type(host).__name__} reads no token embeddings that others could be put before; "
        f"implant a module that acts at a layer, such as LoRA(rank=8)"
    )


def token_width(host: nn.Module) -> int:
    """Return the number of features of a token at the host's first layer.

    Raises:
        ModgraftError: for a host that reads no tokens.
    """
    family = family_of(host)
    if family is not None and family.embedded is not None:
        return int(host.config.hidden_size)  # type: ignore[union-attr]
    return token_table(host).embedding_dim


def token_positions(host: nn.Module) -> tuple[int, int] | None:
    """Return the first position and the number of positions, where the host looks them up in a
    table.

    None where it does not: relative and rotary positions have no last one.
    """
    family = family_of(host)
    if family is None or not family.position_table:
        return None
    table = host.get_submodule(joined(base_path(host), family.position_table))
    assert isinstance(table, nn.Embedding)  # noqa: S101
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    return first, table.num_embeddings - first


def check_room(host: nn.Module, count: int, text: int = 0) -> None:
    """Refuse ``count`` tokens before a text of ``text`` tokens, if there are too few positions.

    Raises:
        ModgraftError: with the numbers and what would fit.
    """
    positions = token_positions(host)
    if positions is None or (count + text <= positions[1] and (text or count < positions[1])):
        return
    room = positions[1]
    if text:
        remedy = f"leave the text {room - count} tokens (truncation=True, max_length={room - count}"
        remedy += f" in the tokenizer), or take at most {max(room - text, 0)} before it"
        wanted = f"{count} tokens before a text of {text}, {count + text} in all"
    else:
        remedy = f"take fewer, such as length={max(room // 8, 1)}: the text needs positions too"
        wanted = f"{count} tokens before the text"
    raise ModgraftError(f"{wanted}, and this {type(host).__name__} has {room} positions; {remedy}")
