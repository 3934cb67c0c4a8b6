"""Text-to-text data: pairs of input and target, and T5's denoising for pretraining."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modgraft.data.batches import IGNORE, padded

SENTINEL = "<extra_id_{}>"
NOISE, SPAN = 0.15, 3
"""The share of tokens that are left out, and the mean length of a span."""


class Pair(NamedTuple):
    """Token ids of an input and of its target, both with the end token."""

    input: list[int]
    target: list[int]


class Pairs(Dataset[Pair]):
    """A data set of texts and targets, tokenised once.

    Args:
        texts: The inputs.
        targets: A target for each input.
        tokenizer: A tokenizer that appends the end token.
        longest: Inputs are cut to this many tokens.
    """

    def __init__(
        self,
        texts: Sequence[str],
        targets: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        longest: int = 64,
    ) -> None:
        inputs = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        outputs = tokenizer(list(targets))["input_ids"]
        self.rows = [Pair(i, o) for i, o in zip(inputs, outputs, strict=True)]  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each input."""
        return [len(row.input) for row in self.rows]

    def __getitem__(self, index: int) -> Pair:
        return self.rows[index]


class Denoising(Dataset[Pair]):
    """A data set of texts with spans left out; a target is these spans or the whole text.

    Half of the targets are as in the span corruption of T5 (Raffel et al. 2020, arXiv:1910.10683,
    section 3.1.4), half as in its BERT-style form (section 3.3.1), which teaches copying. Spans are
    drawn anew at every access from Python's generator.

    Args:
        texts: The texts.
        tokenizer: A tokenizer with sentinels ``<extra_id_0>``, ….
        longest: Texts are cut to this many tokens.
    """

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int = 32
    ) -> None:
        found = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        self.rows: list[list[int]] = [ids[:-1] for ids in found]  # type: ignore[union-attr]
        known = tokenizer.get_vocab()
        self.sentinels = [known[s] for i in range(100) if (s := SENTINEL.format(i)) in known]
        self.end: int = tokenizer.eos_token_id  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each text, before spans are left out of it."""
        return [len(row) + 1 for row in self.rows]

    def __getitem__(self, index: int) -> Pair:
        ids = self.rows[index]
        given, left = spans_left_out(ids, self.sentinels)
        return Pair(
            [*given, self.end], [*(left if left and random.random() < 0.5 else ids), self.end]
        )


def spans_left_out(ids: list[int], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Replace random spans of ``ids`` with sentinels.

    About 15 % of the tokens are left out, in spans of one to five that never touch.

    Returns:
        The ids with a sentinel for each span, and the spans, each after its sentinel.
    """
    given: list[int] = []
    left: list[int] = []
    used, i = 0, 0
    while i < len(ids):
        starts = random.random() < NOISE / SPAN / (1 - NOISE)
        if starts and used < len(sentinels):
            length = random.randint(1, 2 * SPAN - 1)
            given.append(sentinels[used])
            left += [sentinels[used], *ids[i : i + length]]
            used, i = used + 1, i + length
        given += ids[i : i + 1]
        i += 1
    return given, left


def collate(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Pad pairs to a batch: ``input_ids``, ``attention_mask`` ``[B, n]``, ``labels`` ``[B, m]``."""
    inputs = padded([p.input for p in pairs])
    lengths = torch.tensor([len(p.input) for p in pairs])
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": inputs,
        "attention_mask": mask,
        "labels": padded([p.target for p in pairs], IGNORE),
    }
