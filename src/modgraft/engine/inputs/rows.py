"""What a call holds for each position of its texts, and tokens put among these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modgraft.engine.inputs.relays import Tokens

IGNORED = -100
"""The label that transformers' losses leave out."""

MASK, LABELS, POSITIONS = "attention_mask", "labels", "position_ids"
LABELED = (LABELS, "shift_labels", "targets")  # of what is read at a position, or predicted there
_OF_TEXT = ("langs", "lang_ids", "task_type_ids")  # which a whole text has in common


@dataclass
class Rows:
    """What there is for each position of a batch of texts.

    Attributes:
        values: by the argument's name, ``[B, T, …]``; the mask is among them, and positions are
            ``[B, T, D]`` in D dimensions.
        keep: ``[B, T₀]``, where the text's own positions are.
        unseen: ``[B, T]`` bool, the tokens put in that are not seen.
    """

    values: dict[str, Tensor]
    keep: Tensor
    unseen: Tensor

    @classmethod
    def of(
        cls,
        kwargs: Mapping[str, Any],
        what: str,
        text: Tensor,
        mask: Tensor | None,
        others: Mapping[str, Tensor],
    ) -> Rows:
        """Begin with what a call has without any token, but its labels.

        Args:
            kwargs: its arguments.
            what: the name of the argument that is the text.
            text: ids ``[B, T]`` or embeddings ``[B, T, d]``.
            mask: ``[B, T]``; None: all of it is seen.
            others: the arguments that hold something else for each token, ``[B, T, …]``.
        """
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        values = {what: text, MASK: mask, **others}
        if POSITIONS in kwargs:  # [B or 1, T], or in several dimensions [D, B, T]
            positions = kwargs[POSITIONS]
            positions = positions.reshape(-1, *positions.shape[-2:]).permute(1, 2, 0)
            values[POSITIONS] = positions.expand(*mask.shape, -1)  # [B, T, D]
        own = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        return cls(values, own, torch.zeros_like(mask, dtype=torch.bool))

    def as_arguments(self) -> dict[str, Tensor]:
        """Return the arguments of a call: positions ``[B, T]``, or ``[D, B, T]`` in several
        dimensions."""
        found = dict(self.values)
        if POSITIONS in found:
            moved = found[POSITIONS].permute(2, 0, 1)  # [B, T, D] → [D, B, T]
            found[POSITIONS] = moved if len(moved) > 1 else moved[0]
        return found

    def insert(self, own: Tokens, new: Mapping[str, Tensor], padded: bool) -> None:
        """Insert the tokens of one module into every row.

        Args:
            own: the tokens.
            new: what there is at them, ``[B, k, …]``; of anything else, 0, or what is common.
            padded: whether texts may begin with padding, which they then stay behind.
        """
        mask, seen = self.values[MASK], own.seen
        (batch, length), count = mask.shape, seen.shape[1]
        start = torch.full((batch, 1), own.after, device=mask.device)
        if padded:  # argmax: the first that is seen
            start = start + (mask != 0).int().argmax(dim=1, keepdim=True)
        start = start.clamp(max=length)
        j = torch.arange(length + count, device=mask.device)[None]  # [1, T + k]
        old = torch.where(j < start, j, j - count)
        index = torch.where((j >= start) & (j < start + count), length + j - start, old)
        out = {}
        for key, value in self.values.items():
            none = value.new_zeros(batch, count, *value.shape[2:])
            there = new.get(key, none)
            if key == MASK:
                there = seen
            elif key in LABELED:
                there = none + IGNORED
            elif key == POSITIONS:
                value, there = _moved(value, start, seen)
            elif is_common(key, value):
                there = gather(value, start.clamp(max=length - 1).expand(-1, count))
            # [B, T, …], [B, k, …] → [B, T + k, …]
            out[key] = gather(torch.cat([value, there.to(value.dtype)], dim=1), index)
        self.values = out
        self.unseen = gather(torch.cat([self.unseen, ~seen], dim=1), index)
        t = torch.arange(length, device=mask.device)[None]
        self.keep = torch.where(t < start, t, t + count).gather(1, self.keep)

    def move_unseen(self, front: bool) -> None:
        """Move tokens that are not seen to the end of each row, or to its front."""
        order = (~self.unseen if front else self.unseen).int().argsort(dim=1, stable=True)
        self.values = {key: gather(value, order) for key, value in self.values.items()}
        self.keep = order.argsort(dim=1).gather(1, self.keep)


def is_common(key: str, value: Tensor) -> bool:
    """Return whether tokens have what the token has that they go before: the language of the text,
    or which images it sees, ``[B, T, …]``."""
    return key in _OF_TEXT or (key.endswith("_mask") and value.dim() > 2)


def _moved(positions: Tensor, start: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the text's positions ``[B, T, D]``, moved by the tokens at ``start``, and theirs.

    The tokens take the place of what they go before.
    """
    shown = seen.long().cumsum(1)[..., None]  # [B, k, 1]
    beyond = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    there = gather(beyond, start) + (shown - 1).clamp(min=0)
    after = torch.arange(positions.shape[1], device=start.device)[None] >= start
    return positions + after[..., None] * shown[:, -1:], there


def gather(value: Tensor, index: Tensor) -> Tensor:
    """Return ``value`` ``[B, n, …]`` at ``index`` ``[B, m]``: ``[B, m, …]``."""
    index = index.reshape(*index.shape, *(1,) * (value.dim() - 2))
    return value.gather(1, index.expand(*index.shape[:2], *value.shape[2:]))
