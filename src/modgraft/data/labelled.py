"""Texts with a class each, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader


class Labelled(Protocol):
    """A text and the number of its class."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def label(self) -> int: ...  # noqa: D102


class Batches:
    """Batches for ``host.fit``: texts that are tokenised once.

    Args:
        rows: the texts with their classes.
        tokenizer: of transformers.
        longest: the most tokens of a text.
    """

    def __init__(self, rows: Sequence[Labelled], tokenizer: Any, longest: int = 32) -> None:
        self.rows, self.padding = rows, tokenizer.pad_token_id or 0
        texts = [row.text for row in rows]
        self.encoded = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]

    def loader(self, size: int, shuffle: bool) -> DataLoader:
        """Return a loader of batches of ``size`` texts.

        A batch has ``input_ids`` and ``attention_mask`` int64 ``[B, n]``, padded to its longest
        text, and ``labels`` int64 ``[B]``.
        """
        items: Any = list(zip(self.encoded, [row.label for row in self.rows], strict=True))
        collate = partial(_collate, self.padding)
        return DataLoader(items, batch_size=size, shuffle=shuffle, collate_fn=collate)


def _collate(padding: int, rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    more = [longest - len(ids) for ids, _ in rows]
    given = list(zip(rows, more, strict=True))
    return {
        "input_ids": torch.tensor([ids + [padding] * n for (ids, _), n in given]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in given]),
        "labels": torch.tensor([label for _, label in rows]),
    }
