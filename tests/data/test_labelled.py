"""Texts with a class each: what is read from files, how it is divided, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.labelled import Batches, Row, divide, read_labelled
from modgraft.models.bag import train_wordpiece


def table(folder: Path, lines: list[str], name: str = "texts.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines), "utf-8")
    return path


def many(word: str, count: int = 6) -> list[str]:
    return [f"{word} number {i},{word}" for i in range(count)]


def test_a_table_of_each_kind_holds_the_same(tmp_path: Path) -> None:
    rows = [(f"{word} number {i}", word) for i in range(6) for word in ("good", "bad")]
    commas = table(tmp_path, ["text,label", *(",".join(row) for row in rows)])
    tabs = table(tmp_path, ["label\ttext", *(f"{b}\t{a}" for a, b in rows)], "texts.tsv")
    lines = [json.dumps({"text": a, "label": b, "more": 1}) for a, b in rows]
    found = read_labelled([commas])
    assert found[0] == ["bad", "good"]
    assert found[1][:2] == [Row("good number 0", 1), Row("bad number 0", 0)]
    assert read_labelled([tabs]) == found
    assert read_labelled([table(tmp_path, [*lines, ""], "texts.jsonl")]) == found
    renamed = table(tmp_path, ["review,stars", *(f"{a},{b}" for a, b in rows)], "other.csv")
    assert read_labelled([renamed], text="review", label="stars") == found


def test_quotes_and_lines_within_a_text(tmp_path: Path) -> None:
    rows = [f'"a, ""quoted""\ntext {i}",x' for i in range(5)] + [f"b {i},y" for i in range(5)]
    _, texts = read_labelled([table(tmp_path, ["text,label", *rows])])
    assert texts[0] == Row('a, "quoted" text 0', 0)


def test_a_text_that_is_there_twice_counts_once_and_one_of_two_classes_not(tmp_path: Path) -> None:
    rows = [*many("good"), *many("good"), *many("bad"), "both ways,good", "both  ways,bad"]
    _, texts = read_labelled([table(tmp_path, ["text,label", *rows])])
    assert Counter(row.label for row in texts) == {0: 6, 1: 6}
    assert not [row for row in texts if "both" in row.text]


def test_sentences_of_files_are_texts_of_their_class(tmp_path: Path) -> None:
    for name in ("rain", "food"):
        words = "".join(f"There is {name} in sentence {i}. Too short. " for i in range(5))
        (tmp_path / f"{name}.txt").write_text(words, "utf-8")
    classes, texts = read_labelled([tmp_path / "rain.txt", tmp_path / "food.txt"])
    assert classes == ["rain.txt", "food.txt"]
    assert len(texts) == 10
    assert texts[0] == Row("There is rain in sentence 0.", 0)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["text,label", *many("good")], "1 class"),
        (["text,label", *many("good"), *many("bad", 4)], "4 texts of 'bad'"),
        (["words,label", *many("good")], "row 2 has no 'text'; it has words, label"),
        (["text,label", *many("good"), "alone"], "row 8 has no 'label'"),
        (["text,label", 'a,"b'], "unexpected end of data"),
        ([], "0 class"),
    ],
)
def test_a_table_that_cannot_be_used(lines: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_labelled([table(tmp_path, lines)])


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    good = table(tmp_path, ["text,label", *many("good"), *many("bad")])
    (tmp_path / "a.txt").write_text("Only one sentence of words.")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("Another one of the same name.")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xff")
    table(tmp_path, ["{"], "bad.jsonl")
    table(tmp_path, ["[1]"], "list.jsonl")
    for paths, words in (
        ([good, tmp_path / "a.txt"], "a table stands by itself"),
        ([tmp_path / "a.txt"], "a single file of text is a single class"),
        ([tmp_path / "a.txt", tmp_path / "b" / "a.txt"], "two files have this name"),
        ([tmp_path / "a.txt", tmp_path / "c.txt"], "not UTF-8"),
        ([tmp_path / "bad.jsonl"], "line 1: Expecting"),
        ([tmp_path / "list.jsonl"], "row 1 has no 'text'; it has nothing"),
    ):
        with pytest.raises(DataError, match=words):
            read_labelled(paths)
    with pytest.raises(MissingFileError, match=r"nowhere.csv: there is no such file"):
        read_labelled([tmp_path / "nowhere.csv"])


def test_each_class_is_divided_alike_and_nothing_is_in_two_parts() -> None:
    rows = [Row(f"{label} {i}", label) for label in range(3) for i in range(10 * (label + 1))]
    parts = divide(rows, seed=3)
    assert parts == divide(rows, seed=3)
    assert parts != divide(rows, seed=4)
    for name, fifths in (("train", 3), ("validation", 1), ("test", 1)):
        counts = Counter(row.label for row in parts[name])
        assert counts == {label: 2 * fifths * (label + 1) for label in range(3)}
    assert sorted(row for part in parts.values() for row in part) == sorted(rows)


def test_batches_are_padded_to_their_longest() -> None:
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=train_wordpiece(["good bad"], 30), pad_token="[PAD]"
    )
    rows = [Row("good", 0), Row("good bad good", 1), Row("bad", 0)]
    first, last = Batches(rows, tokens, longest=4).loader(2, shuffle=False)
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]  # cut at four
    assert first["input_ids"].shape == (2, 4)
    assert first["labels"].tolist() == [0, 1]
    assert last["attention_mask"].tolist() == [[1, 1, 1]]
    assert last["input_ids"].dtype == torch.int64
