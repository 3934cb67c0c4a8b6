"""Pairs and what T5 is pretrained on: nothing of a text is lost, and padding is not learned."""

from __future__ import annotations

import random

import pytest
import torch

from modgraft.core.errors import ModgraftError
from modgraft.data.pairs import Denoising, Pair, Pairs, collate, spans_left_out
from modgraft.data.tokenizer import train_pieces

TEXTS = ["set_name(self, name=None) returns 42 things", "the Cosine of an angle, in radians"] * 9


def test_pieces_keep_digits_and_signs_apart_and_small_letters() -> None:
    tokenizer = train_pieces(TEXTS, vocab_size=90, sentinels=2)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]) == [3, 4]
    ids = tokenizer("set_name 42, Angle")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "set _ name 4 2 , angle"
    assert (
        tokenizer.get_vocab() == train_pieces(TEXTS[::-1], vocab_size=90, sentinels=2).get_vocab()
    )
    with pytest.raises(ModgraftError, match="train_pieces: the texts hold no word"):
        train_pieces([""])
    with pytest.raises(ModgraftError, match="signs do not fit into vocab_size=20"):
        train_pieces(TEXTS, vocab_size=20)


def test_spans_and_what_is_left_make_the_whole() -> None:
    sentinels, left, total = [100, 101, 102, 103, 104, 105], 0, 0
    for _ in range(300):
        ids = [random.randrange(100) for _ in range(random.randrange(30))]
        given, out = spans_left_out(ids, sentinels)
        spans: dict[int, list[int]] = {}
        for token in out:
            if token in sentinels:
                spans[token] = own = []
            else:
                own.append(token)
        assert [t for g in given for t in spans.get(g, [g])] == ids
        assert list(spans) == sentinels[: len(spans)] == [g for g in given if g in sentinels]
        left, total = left + sum(map(len, spans.values())), total + len(ids)
    assert 0.1 < left / total < 0.2


def test_denoising_asks_for_the_spans_or_for_the_whole() -> None:
    tokenizer = train_pieces(TEXTS, vocab_size=90, sentinels=8)
    rows = Denoising(TEXTS, tokenizer, longest=12)
    random.seed(3)
    read = [rows[i % len(rows)] for i in range(200)]
    random.seed(3)
    assert read == [rows[i % len(rows)] for i in range(200)]
    whole = sum(pair.target[:-1] == rows.rows[i % len(rows)] for i, pair in enumerate(read))
    assert 70 < whole < 180
    state = random.getstate()
    assert set(rows.lengths) == {len(ids) + 1 for ids in rows.rows}
    assert random.getstate() == state  # how long a text is, is no draw
    assert all(pair.input[-1] == pair.target[-1] == tokenizer.eos_token_id for pair in read)


def test_batches_are_padded_with_nothing_to_learn() -> None:
    batch = collate([Pair([5, 6, 1], [7, 1]), Pair([5, 1], [8, 9, 1])])
    assert batch["input_ids"].tolist() == [[5, 6, 1], [5, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100], [8, 9, 1]]
    assert all(t.dtype == torch.int64 for t in batch.values())
    tokenizer = train_pieces(TEXTS, vocab_size=90)
    rows = Pairs(TEXTS, ["angle"] * len(TEXTS), tokenizer, longest=5)
    assert len(rows) == len(TEXTS)
    assert max(len(row.input) for row in rows.rows) == 5
