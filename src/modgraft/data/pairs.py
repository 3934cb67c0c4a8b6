"""Text-to-text batches: pairs of an input and a target, and what a T5 is pretrained on."""

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
"""Of the tokens that are left out, and how many of them stand together on average."""


class Pair(NamedTuple):
    """Token ids of an input and of its target, both with the end."""

    input: list[int]
    target: list[int]


class Pairs(Dataset[Pair]):
    """Texts and targets, tokenised once.

    Args:
        texts: inputs.
        targets: as many.
        tokenizer: puts the end after a text.
        longest: tokens of an input that are kept, from its start.
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

    def __getitem__(self, index: int) -> Pair:
        return self.rows[index]


class Denoising(Dataset[Pair]):
    """Texts with parts left out: a target is those parts, or by turns the whole text.

    The span corruption of T5 (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4), and its
    BERT-style form with all of the text as target (section 3.3.1), which teaches to copy. What is
    left out is drawn anew at every reading from Python's generator.

    Args:
        texts: what there is to read.
        tokenizer: with sentinels ``<extra_id_0>``, ….
        longest: tokens of a text that are kept, from its start.
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

    def __getitem__(self, index: int) -> Pair:
        ids = self.rows[index]
        given, left = spans_left_out(ids, self.sentinels)
        return Pair(
            [*given, self.end], [*(left if left and random.random() < 0.5 else ids), self.end]
        )


def spans_left_out(ids: list[int], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """``ids`` with a sentinel for each span that is left out, and the spans behind their sentinels.

    About 15 % of the tokens, in spans of one to five, never two side by side.
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
    """Padded on the right to the longest of the batch: int64 ``[B, n]``, ``[B, n]``, ``[B, m]``."""
    inputs = padded([p.input for p in pairs])
    lengths = torch.tensor([len(p.input) for p in pairs])
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    return {
        "input_ids": inputs,
        "attention_mask": mask,
        "labels": padded([p.target for p in pairs], IGNORE),
    }
