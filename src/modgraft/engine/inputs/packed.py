"""Several texts in one row of a batch, told apart by positions that begin again.

A host that is given such positions, and neither a mask nor a cache, lets no text see another. So
tokens that stood before the row would reach its first text alone: they go before each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modgraft.core.embeddings import Reading
from modgraft.core.errors import ModgraftError
from modgraft.engine.inputs.relays import Tokens
from modgraft.engine.inputs.rows import IGNORED, LABELED, POSITIONS, Rows, gather, is_common

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def begins(reading: Reading, rows: Rows, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return where each text of a packed batch begins, ``[B, T]`` bool; None if none is packed.

    Args:
        reading: what the host reads.
        rows: what the call has for each position; none is masked.
        kwargs: the arguments of the call.

    Raises:
        ModgraftError: for lengths of packed texts, which tokens would make untrue.
    """
    if found := [name for name in _LENGTHS if name in kwargs]:
        raise ModgraftError(
            f"{', '.join(found)} count the tokens of packed texts without those of an input "
            f"module; leave them out: position_ids that begin again tell the texts apart "
            f"(DataCollatorWithFlattening without return_flash_attn_kwargs and return_seq_idx)"
        )
    positions = rows.values.get(POSITIONS)
    if positions is None or not reading.packs or positions.shape[-1] not in (1, 4):
        return None  # of four dimensions, the first is that of the text
    follow = positions[:, 1:, 0] == positions[:, :-1, 0] + 1
    if torch.compiler.is_dynamo_compiling():
        said = "a compiled host puts no tokens before packed texts"
        torch.ops.aten._assert_async.msg(follow.all(), said)
        return None
    if bool(follow.all()):
        return None
    return torch.cat([torch.ones_like(follow[:, :1]), ~follow], dim=1)


def insert_in_each(
    rows: Rows,
    groups: Sequence[Tokens],
    new: Sequence[Mapping[str, Tensor]],
    begins: Tensor,
    reading: Reading,
) -> None:
    """Insert the tokens of all modules before each text of every row.

    A row of fewer texts than another ends in padding, in texts of its own.

    Args:
        rows: what there is for each position; no position is masked.
        groups: the tokens, in order.
        new: what there is at those of each module, ``[B, k, …]``; of anything else, 0, or what is
            common.
        begins: ``[B, T]`` bool, where each text begins.
        reading: what the host reads.

    Raises:
        ModgraftError: where some of the tokens are not seen, or positions are too few.
    """
    if names := [own.name for own in groups if own.masked and not bool(own.seen.all())]:
        raise ModgraftError(
            f"{names[0]!r} has tokens that are not seen in some examples, and packed texts have no "
            f"attention_mask to hide them; give each text a row of its own, and attention_mask"
        )
    count, length = sum(own.seen.shape[1] for own in groups), begins.shape[1]
    reading.check_room(count, int(rows.values[POSITIONS][..., 0].max()) + 1)
    text = begins.long().cumsum(dim=1)  # [B, T], from 1
    j, t = (torch.arange(n, device=begins.device) for n in (count, length))
    rows.keep = t + count * text
    index = text.new_full((len(text), length + count * int(text.max())), length + count)
    index.scatter_(1, rows.keep, t.expand_as(text))
    row, first = begins.nonzero(as_tuple=True)
    at = row[:, None], (rows.keep[row, first] - count)[:, None] + j  # [n, k], for n texts
    index[at] = length + j
    for key, value in rows.values.items():
        fill = (reading.padding or 0) if key == "input_ids" else IGNORED if key in LABELED else 0
        end = value.new_full((len(value), 1, *value.shape[2:]), fill)
        there = end.expand(-1, count, *value.shape[2:])
        if key in new[0]:
            there = torch.cat([one[key] for one in new], dim=1).to(value.dtype)
        own = value + count if key == POSITIONS else value
        # [B, T, …], [B, k, …], [B, 1, …] → [B, L, …]
        rows.values[key] = gather(torch.cat([own, there, end], dim=1), index)
        if key == POSITIONS:
            rows.values[key][at] = value[row, first][:, None] + j[:, None]
        elif is_common(key, value):
            rows.values[key][at] = value[row, first][:, None]
    rows.unseen = torch.zeros_like(index, dtype=torch.bool)
