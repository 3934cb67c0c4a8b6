"""The data of the recipe MAD-X: text and names in many languages, from the Unicode CLDR."""

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


def split_of(thing: Thing, seed: int) -> str:
    """Assign a thing to one of three splits, the same for its names in all languages.

    The task is trained on the English names of ``"train"`` (half of all things). It is tested on
    ``"named"``, which the unlabelled text mentions, and on ``"hidden"``, which no text of any
    language mentions.
    """
    drawn = random.Random(f"{seed} {thing}").random()
    return "train" if drawn < 0.5 else "named" if drawn < 0.75 else "hidden"


def normalised(name: str) -> str:
    """Return a name as the tokenizer sees it: in lower case without accents."""
    return "".join(c for c in normalize("NFD", name.lower()) if not combining(c))


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, averaged over the five kinds; chance is 20.

    Attributes:
        all: On all names.
        named: On names of things that the language's text mentions.
        hidden: On names of the other things.
    """

    all: float
    named: float
    hidden: float


class Corpus:
    """Text and names in the languages of a trial, and a tokenizer that is trained on the text.

    Args:
        known: The languages that the host is pretrained on; the task is trained in the first.
        targets: The languages that the host is not pretrained on.
        vocab: The number of tokens.
        batch: Lines, or names, in a batch.
        names: The most names of each kind that the task is trained on.
        seed: Decides the splits and the numbers in the text.
        folder: Where the tokenizer is saved, and read again: its training breaks ties at random,
            and modules that were trained with one tokenizer make no sense with another.

    Raises:
        ModgraftError: Babel is not installed, or CLDR has no such language.
    """

    def __init__(
        self, known: Sequence[str], targets: Sequence[str], *, vocab: int, batch: int, names: int,
        seed: int, folder: Path,
    ) -> None:  # fmt: skip
        self.source, self.known, self.targets = known[0], tuple(known), tuple(targets)
        self.vocab, self.batch, self.seed, self.most_names = vocab, batch, seed, names
        self.names = {code: cldr.names(code) for code in (*known, *targets)}
        things = {thing for code in self.names for thing in cldr.names(code, shared=True)}
        self.hidden = {thing for thing in things if split_of(thing, seed) == "hidden"}
        self.lines = {code: cldr.lines(code, self.hidden, seed) for code in self.names}
        text = [line.text for code in known for line in self.lines[code]]
        # letters that the known languages lack are tokens too, although the host never sees them
        letters = {
            c for code in targets for name in self.names[code].values() for c in normalised(name)
        }
        file = folder / "tokenizer.json"
        if not file.is_file():
            write_text(file, train_wordpiece([*text, *sorted(letters)], vocab).to_str())
        self.tokenizer = Tokenizer.from_file(str(file))
        self.text = self.ids(text)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [found.ids for found in self.tokenizer.encode_batch(list(texts))]

    def masked_loader(self, language: str | None = None) -> DataLoader:
        """Return batches of masked text: of one language, or of all known ones."""
        if language is None:
            return masked_loader(self.text, self.vocab, self.batch)
        text = self.ids([line.text for line in self.lines[language]])
        return masked_loader(text, self.vocab, self.batch)

    def task_loader(self) -> DataLoader:
        """Return batches of the task: names of things in ``"train"``, labelled with their kinds."""
        rows, draw = [], random.Random(self.seed)
        for label, kind in enumerate(KINDS):
            named = self.names[self.source].items()
            own = [n for t, n in named if t[0] == kind and split_of(t, self.seed) == "train"]
            chosen = draw.sample(own, min(self.most_names, len(own)))
            rows += [(ids, label) for ids in self.ids(chosen)]
        return DataLoader(rows, batch_size=self.batch, shuffle=True, collate_fn=classes)  # type: ignore[arg-type]

    def test(self, language: str) -> dict[Thing, str]:
        """Return the test names of a language, without those that are spelled as in English."""
        english = {normalised(name) for name in self.names[self.source].values()}
        return {
            thing: name
            for thing, name in self.names[language].items()
            if thing[0] in KINDS
            and split_of(thing, self.seed) != "train"
            and (language == self.source or normalised(name) not in english)
        }

    def score(self, host: mg.Host, composition: str | None, language: str) -> Score:
        """Measure how often the host under a composition tells the kind of a name."""
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
    """Return the mean over the kinds, in percent."""
    found = [[ok for thing, ok in right.items() if thing[0] == kind] for kind in KINDS]
    return 100 * mean(mean(own) for own in found if own)
