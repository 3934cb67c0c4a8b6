from __future__ import annotations

import pytest

from modgraft.core.errors import ModgraftError
from modgraft.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

TEXT = "Question: What is left plus right?\nContext: N/A\nOptions: (A) 12 (B) 7 Solution:"


def test_marks_headings_and_numbers_are_one_token_each():
    tokenizer = train_tokenizer([TEXT])
    tokens = "Question: What is left plus right ? Context: N/A Options: (A) 12 (B) 7 Solution:"
    assert tokenizer.tokenize(TEXT) == tokens.split()


def test_pad_end_and_unknown():
    tokenizer = train_tokenizer([TEXT])
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    ids = tokenizer(["left plus right", "right upstairs"], padding=True)["input_ids"]
    assert [row[-1] for row in ids] == [1, 0]
    assert ids[1][1:] == [2, 1, 0]


@pytest.mark.parametrize(
    "text", ["left 3, middle 7, right 1. left 3, so 3.", "7. The answer is (C).", "Is it so?"]
)
def test_templates_survive_the_round_trip(text):
    tokenizer = train_tokenizer([text])
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_spaced_punctuation_gives_the_same_tokens():
    tokenizer = train_tokenizer(["7. The answer is (C)."])
    assert tokenizer.tokenize("7 . The answer is (C) .") == tokenizer.tokenize(
        "7. The answer is (C)."
    )


def test_the_vocabulary_is_limited_to_the_most_frequent_words():
    tokenizer = train_tokenizer(["often often often rare"], vocab_size=4)
    assert tokenizer.tokenize("often rare") == ["often", "<unk>"]


def test_it_is_saved_and_loaded(tmp_path):
    tokenizer = train_tokenizer([TEXT])
    file = save_tokenizer(tokenizer, tmp_path / "folder")
    for path in (file, tmp_path / "folder"):
        again = load_tokenizer(path)
        assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert again.get_vocab() == tokenizer.get_vocab()
        assert (again.pad_token, again.eos_token) == ("<pad>", "</s>")


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ModgraftError, match="no word"):
        train_tokenizer(["", "  "])
    with pytest.raises(ModgraftError, match="no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModgraftError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
