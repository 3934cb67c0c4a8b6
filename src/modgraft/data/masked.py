"""Make batches of masked texts, and of texts with a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modgraft.data.batches import SortedBatches, padded


@dataclass(frozen=True)
class Masked:
    """A ``collate_fn`` for masked language modelling.

    Each text's share of masked tokens is drawn uniformly from ``share``, with at least one token.
    Of the chosen tokens, 8 in 10 become ``mask``, 1 in 10 becomes a random token, and 1 in 10 stays
    (Devlin et al. 2019, arXiv:1810.04805).

    Args:
        vocab: The number of tokens; ids below ``first`` are special and never masked.
        mask: The id of the mask token.
        first: The first ordinary id.
        share: The smallest and the largest share of masked tokens.
    """

    vocab: int
    mask: int = 4
    first: int = 5
    share: tuple[float, float] = (0.3, 0.9)

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``labels`` ``[B, n]``; labels of unmasked tokens are −100."""
        ids = padded(rows)
        least, most = self.share
        drawn = torch.rand(ids.shape).masked_fill(ids < self.first, 2.0)
        lowest = (drawn == drawn.min(dim=1, keepdim=True).values) & (drawn < 2)
        picked = (drawn < least + (most - least) * torch.rand(len(rows), 1)) | lowest
        labels = ids.masked_fill(~picked, -100)
        how = torch.rand(ids.shape)
        ids = ids.masked_fill(picked & (how < 0.8), self.mask)
        other = torch.randint(self.first, self.vocab, ids.shape)
        ids = torch.where(picked & (how >= 0.9), other, ids)
        return {"input_ids": ids, "labels": labels}


def classes(rows: Sequence[tuple[Sequence[int], int]]) -> dict[str, Tensor]:
    """Return a ``collate_fn`` for texts with a class: ``input_ids`` ``[B, n]``, ``kinds``
    ``[B]``."""
    return {
        "input_ids": padded([text for text, _ in rows]),
        "kinds": torch.tensor([k for _, k in rows]),
    }


def masked_loader(
    texts: Sequence[Sequence[int]], vocab: int, batch: int, longest: int = 32
) -> DataLoader:
    """Return batches of texts of similar length, cut to ``longest`` tokens, masked each epoch."""
    rows = [text[:longest] for text in texts]
    order = SortedBatches([len(row) for row in rows], batch)
    return DataLoader(rows, batch_sampler=order, collate_fn=Masked(vocab))  # type: ignore[arg-type]
