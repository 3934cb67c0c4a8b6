"""Tokens on disk: every position once, errors that say where, windows that can be replayed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from modgraft.core.errors import ModgraftError
from modgraft.data.shards import (
    Shards,
    Windows,
    bpe_tokenizer,
    character_tokenizer,
    tokens_of,
    write_shards,
)
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.training.fit import fit

TEXT = "the cat sat on the mat,\nand the dog\ton the log.\n\nÄ 日本 🙂\r\n" * 40


@pytest.mark.parametrize("make", [character_tokenizer, lambda text: bpe_tokenizer(text, 300)])
def test_a_text_comes_back_from_its_tokens(make):
    tokenizer = make(TEXT)
    assert tokenizer.decode(tokens_of(tokenizer, TEXT).tolist()) == TEXT


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=200))
def test_any_text_comes_back_from_its_characters_and_bytes(text):
    for tokenizer in (character_tokenizer(text), BYTES):
        assert tokenizer.decode(tokens_of(tokenizer, text).tolist()) == text


BYTES = bpe_tokenizer("some text, some bytes", 256)


def test_characters_are_numbered_in_their_order():
    tokenizer = character_tokenizer("banana\n")
    assert tokens_of(tokenizer, "nab\n").tolist() == [3, 1, 2, 0]


def test_a_long_text_is_tokenized_whole():
    text = ("x" * 1000 + "\n") * 200
    tokenizer = character_tokenizer(text)
    assert tokens_of(tokenizer, text).tolist() == [0 if c == "\n" else 1 for c in text]
    assert len(tokens_of(character_tokenizer("ab"), "ab" * 100_000)) == 200_000


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_shards_hold_every_token_once(tmp_path, size):
    tokenizer = character_tokenizer(TEXT)
    want = tokens_of(tokenizer, TEXT[:500])
    shards = write_shards(tmp_path, tokenizer, [TEXT[:200], "", TEXT[200:500]], size=size)
    assert len(shards) == 500
    assert np.array_equal(shards[:], want)
    for start, stop in ((0, 5), (13, 200), (499, 500), (450, 900), (5, 5)):
        assert np.array_equal(shards[start:stop], want[start:stop])
    assert shards[-1] == want[-1]
    assert np.array_equal(Shards.open(tmp_path, check=True)[::3], want[::3])


def test_many_tokens_take_four_bytes(tmp_path):
    tokenizer = character_tokenizer("".join(chr(i) for i in range(0x4E00, 0x4E00 + 70_000)
                                            if not 0xD800 <= i < 0xE000))  # fmt: skip
    assert write_shards(tmp_path, tokenizer, ["一"]).files[0].dtype.itemsize == 4


def test_damage_is_found(tmp_path):
    tokenizer = character_tokenizer(TEXT)
    write_shards(tmp_path, tokenizer, [TEXT], size=500)
    first, second = sorted(tmp_path.glob("tokens-*.bin"))[:2]
    data = first.read_bytes()
    first.write_bytes(data[:-3])
    with pytest.raises(ModgraftError, match=r"tokens-00000\.bin.* has 997 bytes, of 1000"):
        Shards.open(tmp_path)
    first.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    Shards.open(tmp_path)
    with pytest.raises(ModgraftError, match=r"tokens-00000\.bin.*bytes were changed"):
        Shards.open(tmp_path, check=True)
    first.write_bytes(data)
    second.unlink()
    with pytest.raises(ModgraftError, match=r"tokens-00001\.bin.*is missing"):
        Shards.open(tmp_path)
    card = tmp_path / "shards.json"
    card.write_text(json.dumps({"format": 1}))
    with pytest.raises(ModgraftError, match="dtype"):
        Shards.open(tmp_path)
    with pytest.raises(ModgraftError, match="write_shards"):
        Shards.open(tmp_path / "nothing")


def test_bad_input_says_what_and_where(tmp_path):
    tokenizer = character_tokenizer("abc\n")
    with pytest.raises(ModgraftError, match=r"text 1, line 2: the character 'x' is none of the 4"):
        write_shards(tmp_path, tokenizer, ["abc", "abc\naxc"])
    with pytest.raises(ModgraftError, match="corpus is empty"):
        write_shards(tmp_path, tokenizer, [])
    with pytest.raises(ModgraftError, match="corpus is empty"):
        character_tokenizer("")
    with pytest.raises(ModgraftError, match="256 bytes"):
        bpe_tokenizer("abc", 100)
    with pytest.raises(ModgraftError, match="no two windows of 64"):
        Windows(np.arange(100), 64)
    shards = write_shards(tmp_path, tokenizer, ["abc"])
    with pytest.raises(ModgraftError, match=r"another tokenizer.*3 tokens here, 4 there"):
        shards.check_tokenizer(character_tokenizer("abc"))
    shards.check_tokenizer(character_tokenizer("cba\n"))


def test_a_run_is_not_resumed_with_tokens_of_another_tokenizer(tmp_path):
    """Of as many tokens, so that nothing else would fail."""
    text, given = TEXT[:2000], {"folder": tmp_path / "run", "progress": False, "note": False}
    tokenizers = (bpe_tokenizer(text, 270), bpe_tokenizer(text[::-1], 270))
    shards = [write_shards(tmp_path / str(i), t, [text]) for i, t in enumerate(tokenizers)]
    sizes = {"vocab_size": 270, "hidden_size": 8, "num_attention_heads": 1}
    loaders = [Windows(each, 16).loader(4) for each in shards]
    fit(GPT(GPTConfig(**sizes)), loaders[0], steps=2, **given)
    with pytest.raises(ModgraftError, match=r"made with other data .*the tokenizer: .* there"):
        fit(GPT(GPTConfig(**sizes)), loaders[1], steps=2, **given)
    with pytest.raises(ValueError, match=r"of a vocabulary of 60; .*another tokenizer"):
        fit(GPT(GPTConfig(**{**sizes, "vocab_size": 60})), loaders[0], steps=2, progress=False)
    short = GPT(GPTConfig(**sizes, max_position_embeddings=8))
    with pytest.raises(ValueError, match=r"position 15 of a model with 8 learned positions"):
        fit(short, loaders[0], steps=2, progress=False)


def test_a_character_that_a_vocabulary_of_pairs_lacks_is_told():
    known = {"?": 0, "a": 1, "b": 2, "\n": 3, "ab": 4}
    pairs = Tokenizer(models.BPE(known, [("a", "b")], unk_token="?"))
    assert tokens_of(pairs, "abba").tolist() == [4, 2, 1]
    with pytest.raises(ModgraftError, match=r"line 2: the character 'c' is none of the 5 tokens"):
        tokens_of(pairs, "ab\nac")


@given(st.integers(20, 300), st.integers(1, 9), st.integers(0, 5))
def test_windows_read_every_token_once_an_epoch(n, length, epoch):
    windows = Windows(np.arange(n), length, seed=3)
    windows.set_epoch(epoch)
    batch = windows.__getitems__(range(len(windows)))
    read = batch["input_ids"].flatten()
    assert torch.equal(read, torch.arange(int(read[0]), int(read[0]) + len(read)))
    assert torch.equal(batch["targets"].flatten(), read + 1)
    assert len(read) > n - 3 * length


def test_a_fit_reads_the_same_windows_again_and_others_each_epoch(tmp_path):
    shards = write_shards(tmp_path, character_tokenizer(TEXT), [TEXT], size=300)
    seen = []

    class Spy(GPT):
        def forward(self, input_ids, **more):
            seen.append(input_ids.tolist())
            return super().forward(input_ids, **more)

    for _ in range(2):
        torch.manual_seed(0)
        model = Spy(GPTConfig(vocab_size=shards.vocab_size, hidden_size=8))
        loader = Windows(shards, 32, seed=1).loader(8)
        fit(model, loader, epochs=2, progress=False)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert sorted(map(str, seen[: half // 2])) != sorted(map(str, seen[half // 2 : half]))


def test_an_evaluation_of_the_same_windows_moves_no_window():
    """It reads them as in the first epoch, and training as in its own."""
    tokens = tokens_of(character_tokenizer(TEXT), TEXT)
    windows = Windows(tokens, 32, seed=1)
    seen = []

    class Spy(GPT):
        def forward(self, input_ids, **more):
            seen.extend([input_ids.tolist()] if self.training else [])
            return super().forward(input_ids, **more)

    for evaluate in (None, windows.loader(16)):
        model = Spy(GPTConfig(vocab_size=int(tokens.max()) + 1, hidden_size=8))
        fit(model, windows.loader(8), epochs=3, evaluate=evaluate, evaluate_every=2, progress=False)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
