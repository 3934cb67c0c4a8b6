"""Texts with a class each: read from files, divided, and made into batches."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modgraft.core.errors import DataError, MissingFileError

TABLES = (".csv", ".tsv", ".jsonl")
"""Endings of files that have a text and its class in each row."""
WORDS = 4
"""The fewest words of a sentence."""
FEWEST = 5
"""The fewest texts of a class, of which one is for validation and one for testing."""


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


class Row(NamedTuple):
    """A text and the number of its class."""

    text: str
    label: int


def read_labelled(
    paths: Sequence[str | Path], *, text: str = "text", label: str = "label"
) -> tuple[list[str], list[Row]]:
    """Read texts and their classes from files.

    Args:
        paths: one table, ``.csv``, ``.tsv`` or ``.jsonl``, with a text and its class in each row;
            or several files, each of which is a class, whose sentences of four words or more are
            the texts.
        text: the table's column of texts.
        label: its column of classes.

    Returns:
        The names of the classes, and the texts. A text that is there twice is kept once, and one
        that has two classes is left out.

    Raises:
        MissingFileError: a file is not there.
        DataError: a file cannot be read, a row lacks a column, or there are too few texts of a
            class, or too few classes.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not file.is_file():
            raise MissingFileError("there is no such file", file=file, remedy="Name one that is")
    tables = [file for file in files if file.suffix in TABLES]
    if tables and len(files) > 1:
        raise DataError("a table stands by itself", file=tables[0], remedy="Name no other file")
    if len(files) == 1 and not tables:
        raise DataError(
            "a single file of text is a single class", file=files[0],
            remedy=f"Name several files, a class each, or one table ({', '.join(TABLES)}) with the "
            f"columns {text} and {label}",
        )  # fmt: skip
    named = _table(files[0], text, label) if tables else _sentences(files)
    kinds: dict[str, set[str]] = {}
    for words, kind in named:
        kinds.setdefault(" ".join(words.split()), set()).add(kind)
    once = {words: next(iter(kind)) for words, kind in kinds.items() if len(kind) == 1 and words}
    count = Counter(once.values())
    classes = sorted(count) if tables else [file.name for file in files]
    few = [name for name in classes if count[name] < FEWEST]
    if few or len(classes) < 2:
        found = f"{count[few[0]]} texts of {few[0]!r}" if few else f"{len(classes)} class"
        raise DataError(
            f"{found}, where {FEWEST} texts of a class and two classes are the least",
            file=files[0], remedy="Give more texts; one that has two classes counts for none",
        )  # fmt: skip
    return classes, [Row(words, classes.index(name)) for words, name in once.items()]


def divide(rows: Sequence[Row], seed: int = 0) -> dict[str, list[Row]]:
    """Divide texts into ``train`` (three fifths), ``validation`` and ``test``, class by class."""
    rng, parts = random.Random(seed), {"train": [], "validation": [], "test": []}
    for label in sorted({row.label for row in rows}):
        own = [row for row in rows if row.label == label]
        rng.shuffle(own)
        fifth = len(own) // 5
        parts["validation"] += own[:fifth]
        parts["test"] += own[fifth : 2 * fifth]
        parts["train"] += own[2 * fifth :]
    for part in parts.values():
        rng.shuffle(part)
    return parts


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text ({error})", file=file, remedy="Save it as UTF-8"
        ) from error


def _sentences(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    names = Counter(file.name for file in files)
    if twice := [name for name, count in names.items() if count > 1]:
        raise DataError("two files have this name", file=twice[0], remedy="Rename one of them")
    for file in files:
        text = re.sub(r"\s+", " ", _text_of(file))
        for sentence in re.split(r"(?<=[.!?:;]) ", text):
            if len(sentence.split()) >= WORDS:
                yield sentence, file.name


def _table(file: Path, text: str, label: str) -> Iterator[tuple[str, str]]:
    rows = _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file)
    for number, row in rows:
        for column in (text, label):
            if not isinstance(row.get(column), str | int) or row.get(column) == "":
                has = ", ".join(map(str, row)) or "nothing"
                raise DataError(
                    f"row {number} has no {column!r}; it has {has}", file=file,
                    remedy="Correct it, or say which columns: --text and --label",
                )  # fmt: skip
        yield str(row[text]), str(row[label])


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = io.StringIO(_text_of(file), newline="")
    reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num}: {error}", file=file, remedy="Correct it"
        ) from error


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_text_of(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"line {number}: {error}", file=file, remedy="Correct it") from error
        yield number, row if isinstance(row, dict) else {}
