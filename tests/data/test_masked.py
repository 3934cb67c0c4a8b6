"""Batches of masked texts, and of texts with a class."""

from __future__ import annotations

import torch

from modgraft.data.masked import Masked, classes, masked_loader

ROWS = [[2, *range(10, 10 + n), 3] for n in (1, 4, 12)]


def test_what_is_picked_is_asked_for_and_the_rest_is_left() -> None:
    batch = Masked(vocab=50)(ROWS)
    ids, labels = batch["input_ids"], batch["labels"]
    for row, (own, asked) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        text = ROWS[row] + [0] * (14 - len(ROWS[row]))
        assert [a for a in asked if a != -100]  # one at least
        for token, got, label in zip(text, own, asked, strict=True):
            assert label in (-100, token)
            assert token >= 5 or label == -100  # special tokens stay
            assert label != -100 or got == token


def test_the_share_is_drawn_for_each_text() -> None:
    torch.manual_seed(0)
    texts = [[2, *range(5, 105), 3]] * 400
    batch = Masked(vocab=200, share=(0.2, 0.6))(texts)
    picked = batch["labels"] != -100
    shares = picked.float().sum(1) / 100
    assert abs(float(shares.mean()) - 0.4) < 0.02
    assert float(shares.min()) < 0.25
    assert float(shares.max()) > 0.55
    hidden = (batch["input_ids"] == 4)[picked].float().mean()
    same = (batch["input_ids"] == batch["labels"])[picked].float().mean()
    assert abs(float(hidden) - 0.8) < 0.02
    assert abs(float(same) - 0.1) < 0.02


def test_a_loader_reads_every_text_once() -> None:
    loader = masked_loader(ROWS * 5, vocab=50, batch=4, longest=9)
    batches = list(loader)
    assert sum(len(b["input_ids"]) for b in batches) == 15
    assert max(b["input_ids"].shape[1] for b in batches) == 9


def test_classes() -> None:
    batch = classes([([2, 7, 3], 1), ([2, 3], 0)])
    assert batch["input_ids"].tolist() == [[2, 7, 3], [2, 3, 0]]
    assert batch["kinds"].tolist() == [1, 0]
