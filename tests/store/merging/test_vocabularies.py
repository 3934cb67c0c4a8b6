"""Checkpoints whose tokenizers give an id to two words are not merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from modgraft.core.errors import CheckpointError
from modgraft.store.merging.checkpoints import merge_checkpoints

CONFIG = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=4, n_positions=8)
OLD, NEW = ["u", "yes", "no"], ["u", "no", "yes"]


def by_id(words: list[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def saved(folder: Path, files: dict[str, Any] | None = None) -> Path:
    GPT2LMHeadModel(CONFIG).save_pretrained(folder)
    for name, said in (files or {}).items():
        text = said if isinstance(said, str) else json.dumps(said)
        (folder / name).write_text(text)
    return folder


def fast(words: list[str], added: str = "") -> str:
    tokenizer = Tokenizer(models.WordLevel(by_id(words), unk_token="u"))
    if added:
        tokenizer.add_special_tokens([AddedToken(added, special=True)])
    return tokenizer.to_str()


def unigram(words: list[str]) -> str:
    return Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0)).to_str()


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"tokenizer.json": fast(OLD)}, {"tokenizer.json": fast(NEW)}, "id 1 is 'yes' in .* 'no'"),
        ({"tokenizer.json": unigram(OLD)}, {"tokenizer.json": unigram(NEW)}, "id 1 is 'yes'"),
        (
            {"tokenizer.json": fast(OLD, "<a>")},
            {"tokenizer.json": fast(OLD, "<b>")},
            "id 3 is '<a>' in .* and '<b>' in",
        ),
        ({"vocab.json": by_id(OLD)}, {"vocab.json": by_id(NEW)}, "id 1 is 'yes'"),
        ({"vocab.txt": "u\nyes\nno\n"}, {"vocab.txt": "u\nno\nyes"}, "id 1 is 'yes'"),
        ({"vocab.txt": "u\nyes\nno\n"}, {"tokenizer.json": fast(NEW)}, "id 1 is 'yes'"),
        (
            {"vocab.json": by_id(OLD), "added_tokens.json": {"<a>": 3}},
            {"vocab.json": by_id(OLD), "added_tokens.json": {"<b>": 3}},
            "id 3 is '<a>'",
        ),
        ({"spiece.model": "one"}, {"tokenizer.model": "other"}, "the sentencepiece model of"),
    ],
)
def test_an_id_of_two_words_is_refused(
    one: dict[str, Any], other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    paths = [saved(tmp_path / "a", one), saved(tmp_path / "b"), saved(tmp_path / "c", other)]
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoints(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoints(paths[1:], tmp_path / "out")  # one alone has a tokenizer
    with pytest.raises(CheckpointError, match=said):
        merge_checkpoints(paths[1:], tmp_path / "on", "arithmetic", base=paths[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tokenizer.json": fast(OLD)}, {"vocab.txt": "u\nyes\nno\n"}),
        ({"tokenizer.json": fast(OLD)}, {"tokenizer.json": fast(OLD, "<a>")}),  # a row is added
        ({"vocab.json": by_id(OLD)}, {"vocab.json": {"no": 2, "yes": 1, "u": 0}}),
        ({"vocab.json": {"en": by_id(OLD)}}, {"vocab.json": {"fr": by_id(NEW)}}),  # no table
        ({"spiece.model": "one"}, {"tokenizer.model": "one"}),
    ],
)
def test_one_vocabulary_in_two_forms_is_merged(
    one: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    merge_checkpoints([saved(tmp_path / "a", one), saved(tmp_path / "b", other)], tmp_path / "out")


def test_what_transformers_saves_is_compared(tmp_path: Path) -> None:
    paths = [saved(tmp_path / "a"), saved(tmp_path / "b")]
    for path, words in zip(paths, (OLD, NEW), strict=True):
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(by_id(words), unk_token="u")), unk_token="u"
        )
        tokenizer.save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"id 1 is 'yes' in .*a and 'no' in .*b: the tokeni"):
        merge_checkpoints(paths, tmp_path / "out")
