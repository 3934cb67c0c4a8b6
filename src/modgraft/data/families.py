"""Families of text-to-text tasks over real data, each task worded in several ways, as in FLAN.

A family is a list of items: real things, such as a day, a character of Unicode or a signature of
the standard library. For each of its tasks, an item has an input and a target. Similar things are
one item, and items are split into training, validation and test: nothing in the test was seen in
any task or wording (Wei et al. 2022, "Finetuned Language Models Are Zero-Shot Learners").
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.data import library
from modgraft.data.wordings import KEPT, WORDINGS

Item = Mapping[str, tuple[str, str]]
"""Task → input and target."""


@dataclass(frozen=True)
class Example:
    """One text-to-text example.

    Attributes:
        text: The instruction, with the item's input.
        target: The text that a model should write.
        family, task: The names of its family and task.
        item: The number of the family's item.
    """

    text: str
    target: str
    family: str
    task: str
    item: int


@dataclass(frozen=True)
class Family:
    """Tasks over one kind of thing.

    Attributes:
        title: The name for readers.
        items: Returns the items, in the same order every time.
    """

    title: str
    items: Callable[[], Sequence[Item]]


@dataclass(frozen=True)
class Split:
    """A family's examples; ``reworded`` are those of ``test`` in wordings that training lacks."""

    train: list[Example]
    val: list[Example]
    test: list[Example]
    reworded: list[Example]


def split(name: str, *, train: int, val: int, test: int, seed: int) -> Split:
    """Split a family's items, and word them as examples.

    Each item of validation and test gives one example of one task. Items of training repeat, with
    other tasks and wordings, until there are ``train`` examples.

    Args:
        name: A key of ``FAMILIES``.
        train, val, test: The number of examples.
        seed: Decides the split and the wordings.

    Raises:
        UnknownNameError: There is no such family.
        DataError: The family has too few items.
    """
    if name not in FAMILIES:
        raise UnknownNameError.among("family", name, FAMILIES)
    draw, items = random.Random(f"{name} {seed}"), FAMILIES[name].items()
    order = draw.sample(range(len(items)), len(items))
    held, rest = order[: val + test], order[val + test :]
    if len(rest) < len(held):
        raise DataError(
            f"the family {name!r} has {len(items)} items, too few to keep {val} and {test} from "
            f"training",
            remedy="Take a smaller val= and test=",
        )

    def example(item: int, wordings: slice, task: str | None = None) -> Example:
        task = task or draw.choice(list(items[item]))
        wording = draw.choice(WORDINGS[name][task][wordings])
        text, target = items[item][task]
        return Example(wording.format(x=text), target, name, task, item)

    seen, unseen = slice(None, -KEPT), slice(-KEPT, None)
    asked = [example(item, seen) for item in held]
    return Split(
        train=[example(rest[n % len(rest)], seen) for n in range(train)],
        val=asked[:val],
        test=asked[val:],
        reworded=[example(e.item, unseen, e.task) for e in asked[val:]],
    )


def plain_texts(seed: int = 0) -> list[str]:
    """Return shuffled pieces of docstrings, 8 to 24 words long, that ``words`` does not use."""
    pieces: list[str] = []
    for text in library.docstrings()[::2]:
        found = text.split()
        pieces += [" ".join(found[i : i + 24]) for i in range(0, len(found) - 7, 24)]
    random.Random(seed).shuffle(pieces)
    return [piece for piece in pieces if piece.isascii()]


# -- the items ---------------------------------------------------------------------------------


def _dates() -> list[Item]:
    """Return every day of 1950 to 2049."""
    first, last = date(1950, 1, 1).toordinal(), date(2050, 1, 1).toordinal()
    items, months = [], _MONTHS.split()
    for day in map(date.fromordinal, range(first, last)):
        iso, long = day.isoformat(), f"{months[day.month - 1]} {day.day}, {day.year}"
        items.append({"long": (iso, long), "iso": (long, iso)})
    return items


# English, whatever the locale
_MONTHS = "January February March April May June July August September October November December"


def _words() -> list[Item]:
    """Find four different words in a row from a docstring; no set of words occurs twice."""
    found: dict[frozenset[str], Item] = {}
    for text in library.docstrings()[1::2]:
        own = [w for w in re.findall(r"[a-z]+", text.lower()) if 3 <= len(w) <= 8]
        for i in range(0, len(own) - 3, 4):
            four = own[i : i + 4]
            text = " ".join(four)
            if len(set(four)) == 4:
                tasks = {"reverse": (text, " ".join(four[::-1])), "last": (text, four[-1])}
                found.setdefault(frozenset(four), tasks)
    return list(found.values())


_KINDS = {
    "Lu": "capital letter", "Ll": "small letter", "Lo": "other letter", "Nd": "digit",
    "No": "other number", "Nl": "letter number", "Sm": "mathematical sign", "So": "other sign",
    "Po": "punctuation", "Mn": "combining mark", "Mc": "spacing mark", "Lm": "modifier letter",
}  # fmt: skip
_OF_A_KIND, _PAIRS = 150, 900  # the number of characters of each kind, and of letter pairs


def _names() -> list[Item]:
    """Find Unicode's names of characters; a letter's capital and small form are one item."""
    kinds: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    pairs: list[str] = []
    for sign in map(chr, range(0x80, 0x20000)):
        name, kind = unicodedata.name(sign, ""), unicodedata.category(sign)
        if kind in kinds and name and not re.search(r"\d|IDEOGRAPH|HANGUL", name):
            cased = kind == "Ll" and len(sign.upper()) == 1 and sign.upper() != sign
            (pairs if cased else kinds[kind]).append(sign)
    items: dict[str, Item] = {}
    for sign in _evenly(pairs, _PAIRS):
        name, capital = unicodedata.name(sign).lower(), unicodedata.name(sign.upper()).lower()
        items[_caseless(name)] = {"kind": (name, _KINDS["Ll"]), "capital": (name, capital)}
    for kind, signs in kinds.items():
        for name in (unicodedata.name(sign).lower() for sign in _evenly(signs, _OF_A_KIND)):
            items.setdefault(_caseless(name), {"kind": (name, _KINDS[kind])})
    return list(items.values())


def _caseless(name: str) -> str:
    return re.sub(r"\b(capital|small) ", "", name)


def _evenly(found: list[str], count: int) -> list[str]:
    """Take about ``count`` of them, at even distances."""
    return found[:: max(1, len(found) // count)]


def _signatures() -> list[Item]:
    """Find functions of the standard library; no list of parameters occurs twice."""
    found: dict[tuple[str, ...], Item] = {}
    for name, parameters in library.signatures().items():
        shown = [p.name if p.default is None else f"{p.name}={p.default}" for p in parameters]
        text = f"{name.rpartition('.')[2]}({', '.join(shown)})"
        if not (2 <= len(parameters) <= 5 and len(text) <= 45 and text.isascii()):
            continue
        optional = ", ".join(p.name for p in parameters if p.default is not None) or "none"
        tasks = {"second": (text, parameters[1].name), "optional": (text, optional)}
        found.setdefault(tuple(p.name for p in parameters), tasks)
    return list(found.values())


def _identifiers() -> list[Item]:
    """Find names of the standard library that are written with underscores."""
    found: dict[str, Item] = {}
    for name in library.names():
        parts = name.strip("_").split("_")
        if 2 <= len(parts) <= 4 and all(re.fullmatch("[a-z]{2,}", part) for part in parts):
            bare, text = "_".join(parts), " ".join(parts)
            found.setdefault(bare, {"plain": (bare, text), "snake": (text, bare)})
    return list(found.values())


FAMILIES: dict[str, Family] = {
    "dates": Family("Dates", _dates),
    "words": Family("Words", _words),
    "names": Family("Characters", _names),
    "signatures": Family("Signatures", _signatures),
    "identifiers": Family("Identifiers", _identifiers),
}
