"""What the recipe MAD-X learns from and is tested on: CLDR's text and names, in many languages."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from unicodedata import combining, normalize

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

import modgraft as mg
from modgraft.core.files import write_text
from modgraft.data import cldr
from modgraft.data.cldr import KINDS, Thing
from modgraft.data.masked import classes, masked_loader
from modgraft.models.bag import train_wordpiece


def part(thing: Thing, seed: int) -> str:
    """The part of a thing in all languages: ``"train"`` (half), ``"named"``, ``"hidden"``.

    What the task learns the English name of; what it does not, and text names; what no text of any
    language names either.
    """
    drawn = random.Random(f"{seed} {thing}").random()
    return "train" if drawn < 0.5 else "named" if drawn < 0.75 else "hidden"


def bare(name: str) -> str:
    """A name as the tokenizer sees it: lower case, no accents."""
    return "".join(c for c in normalize("NFD", name.lower()) if not combining(c))


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, the mean over the kinds; chance is 100 / 5.

    Attributes:
        all: of all names.
        named: of the things that a line of the language's text names.
        hidden: of those that none names.
    """

    all: float
    named: float
    hidden: float


class Corpus:
    """Text and names of the languages of a trial, and the tokenizer made of the text.

    Args:
        source: the task's language; the first of ``known``.
        known: languages that the host is pretrained on.
        targets: languages that it is not.
        vocab: tokens.
        batch: lines, or names, in a batch.
        names: names of a kind that the task learns from, at most.
        seed: of the parts and of the numbers in the text.
        folder: keeps the tokenizer, and has it again: its training breaks ties at random, and
            another tokenizer would make nonsense of what was trained with this one.

    Raises:
        ModgraftError: Babel is not installed, or CLDR has no such language.
    """

    def __init__(
        self, known: Sequence[str], targets: Sequence[str], *, vocab: int, batch: int, names: int,
        seed: int, folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.source, self.known, self.targets = known[0], tuple(known), tuple(targets)
        self.vocab, self.batch, self.seed, self.most = vocab, batch, seed, names
        self.names = {code: cldr.names(code) for code in (*known, *targets)}
        things = {thing for code in self.names for thing in cldr.names(code, shared=True)}
        self.hidden = {thing for thing in things if part(thing, seed) == "hidden"}
        self.lines = {code: cldr.lines(code, self.hidden, seed) for code in self.names}
        text = [line.text for code in known for line in self.lines[code]]
        # a letter that the known languages lack is a token all the same, which the host never saw
        letters = {c for code in targets for name in self.names[code].values() for c in bare(name)}
        kept = None if folder is None else folder / "tokenizer.json"
        if kept is not None and kept.is_file():
            self.tokenizer = Tokenizer.from_file(str(kept))
        else:
            self.tokenizer = train_wordpiece([*text, *sorted(letters)], vocab)
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_text(kept, self.tokenizer.to_str())
        self.text = self.ids(text)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text."""
        return [found.ids for found in self.tokenizer.encode_batch(list(texts))]

    def masked(self, language: str | None = None) -> DataLoader:
        """Text of a language, or of all that the host knows, with tokens masked."""
        if language is None:
            return masked_loader(self.text, self.vocab, self.batch)
        text = self.ids([line.text for line in self.lines[language]])
        return masked_loader(text, self.vocab, self.batch)

    def lessons(self) -> DataLoader:
        """The task in its language: names and their kinds, of the things in ``"train"``."""
        rows, draw = [], random.Random(self.seed)
        for label, kind in enumerate(KINDS):
            named = self.names[self.source].items()
            own = [n for t, n in named if t[0] == kind and part(t, self.seed) == "train"]
            chosen = draw.sample(own, min(self.most, len(own)))
            rows += [(ids, label) for ids in self.ids(chosen)]
        return DataLoader(rows, batch_size=self.batch, shuffle=True, collate_fn=classes)  # type: ignore[arg-type]

    def test(self, language: str) -> dict[Thing, str]:
        """Names of things outside ``"train"``; in other languages, those that are not English."""
        english = {bare(name) for name in self.names[self.source].values()}
        return {
            thing: name
            for thing, name in self.names[language].items()
            if thing[0] in KINDS
            and part(thing, self.seed) != "train"
            and (language == self.source or bare(name) not in english)
        }

    def score(self, host: mg.Host, composition: str | None, language: str) -> Score:
        """How often the host, under a composition, tells the kind of a name of the language."""
        names, right = self.test(language), dict[Thing, bool]()
        things = sorted(names, key=lambda thing: (len(names[thing]), thing))
        with host.using(composition), torch.no_grad():
            for start in range(0, len(things), 256):
                some = things[start : start + 256]
                batch = classes([(ids, 0) for ids in self.ids([names[t] for t in some])])
                logits = host(batch["input_ids"]).logits  # [B, kinds]
                told = logits.argmax(-1).tolist()
                right |= {t: KINDS[k] == t[0] for t, k in zip(some, told, strict=True)}
        told = {thing for line in self.lines[language] for thing in line.things}
        parts = (right, right.keys() & told, right.keys() - told)
        return Score(*(_mean({thing: right[thing] for thing in some}) for some in parts))


def _mean(right: Mapping[Thing, bool]) -> float:
    """The mean over the kinds, in percent."""
    found = [[ok for thing, ok in right.items() if thing[0] == kind] for kind in KINDS]
    return 100 * mean(mean(own) for own in found if own)
