"""Families of tasks: what is said of their items is true, and nothing leaks."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from datetime import date, datetime

import pytest

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.data import library
from modgraft.data.families import FAMILIES, plain_texts, split
from modgraft.data.wordings import KEPT, WORDINGS

SIZES = {"train": 600, "val": 20, "test": 40}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_item_is_in_one_part_and_a_wording_kept(name: str) -> None:
    made = split(name, **SIZES, seed=0)
    assert made == split(name, **SIZES, seed=0) != split(name, **SIZES, seed=1)
    parts = [made.train, made.val, made.test]
    assert [len(p) for p in parts] == list(SIZES.values())
    train, val, test = ({e.item for e in part} for part in parts)
    assert not (train & val) | (train & test) | (val & test)
    assert (len(val), len(test)) == (20, 40)  # each asked once
    same = [(e.target, e.task, e.item) for e in made.test]
    assert [(e.target, e.task, e.item) for e in made.reworded] == same
    assert not {e.text for e in made.train} & {e.text for e in made.test + made.reworded}
    assert {e.task for e in made.train} == set(WORDINGS[name])
    items = FAMILIES[name].items()
    for e in made.train + made.val + made.test + made.reworded:
        text, target = items[e.item][e.task]
        worded = [w for w in WORDINGS[name][e.task] if w.format(x=text) == e.text]
        kept = WORDINGS[name][e.task][-KEPT:]
        assert (e.target, e.family) == (target, name)
        assert worded
        assert any(w in kept for w in worded) == (e in made.reworded)
    targets = [Counter(e.target for e in made.test if e.task == task) for task in WORDINGS[name]]
    commonest = sum(max(count.values(), default=0) for count in targets)
    assert commonest < 0.6 * len(made.test)  # always writing a task's commonest answer fails


def test_wordings_are_of_one_task_each() -> None:
    every = [w for tasks in WORDINGS.values() for own in tasks.values() for w in own]
    assert len(set(every)) == len(every)
    assert all(w.count("{x}") == 1 and w == w.lower() for w in every)
    assert list(WORDINGS) == list(FAMILIES)


def test_what_is_alike_is_one_item() -> None:
    words = FAMILIES["words"].items()
    assert len({frozenset(item["last"][0].split()) for item in words}) == len(words)
    letters = [re.sub("capital |small ", "", i["kind"][0]) for i in FAMILIES["names"].items()]
    assert len(set(letters)) == len(letters)


def test_targets_are_right() -> None:
    for item in FAMILIES["dates"].items()[::2500]:
        iso, long = item["long"]
        assert datetime.strptime(long, "%B %d, %Y").date() == date.fromisoformat(iso)
        assert item["iso"] == (long, iso)
    for item in FAMILIES["words"].items()[::500]:
        text, backwards = item["reverse"]
        assert text.split() == backwards.split()[::-1]
        assert item["last"] == (text, text.split()[-1])
    for item in FAMILIES["names"].items()[::100]:
        sign = unicodedata.lookup(item["kind"][0].upper())
        letter = unicodedata.category(sign)[0] == "L"
        assert letter == (item["kind"][1].endswith("letter"))
        if "capital" in item:
            assert unicodedata.lookup(item["capital"][1].upper()) == sign.upper()
    for item in FAMILIES["identifiers"].items()[::200]:
        assert item["plain"][1].replace(" ", "_") == item["plain"][0] == item["snake"][1]
    own = {item["second"][0]: item for item in FAMILIES["signatures"].items()}
    text = next(t for t in own if t.startswith("b64decode("))
    assert own[text]["second"][1] == "altchars"
    assert own[text]["optional"][1].startswith("altchars, validate")


def test_plain_texts_hold_nothing_that_words_are_asked_of() -> None:
    assert plain_texts(0) == plain_texts(0) != plain_texts(1)
    assert all(8 <= len(t.split()) <= 24 for t in plain_texts())
    read = set(library.docstrings()[::2])
    assert not read & set(library.docstrings()[1::2])


def test_what_others_do_to_the_standard_library_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch replaces ``inspect.getfile``, and transformers adds to ``logging.Logger``."""
    docstrings, signatures, names = library.docstrings(), library.signatures(), library.names()

    def added(added_parameter: int) -> None:
        """Say something that no library says."""

    monkeypatch.setattr(added, "__module__", "logging")
    monkeypatch.setattr(logging.Logger, "added", added, raising=False)
    monkeypatch.delattr("base64.b64decode")
    for read, before in (
        (library.docstrings, docstrings),
        (library.signatures, signatures),
        (library.names, names),
    ):
        library._documented_objects.cache_clear()
        read.cache_clear()
        assert read() == before
    assert "added_parameter" not in names


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="no family is named 'cooking'"):
        split("cooking", **SIZES, seed=0)
    with pytest.raises(DataError, match=r"'signatures' has \d+ items, too few .* smaller val="):
        split("signatures", train=10, val=500, test=2000, seed=0)
