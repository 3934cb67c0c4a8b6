"""Ask a trained run of the recipe, and say where the question is beyond what it was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modgraft.core.errors import DataError
from modgraft.core.files import read_json
from modgraft.data.digit_questions import restated, unread
from modgraft.data.digit_wordings import read_number
from modgraft.data.extract import encode_images
from modgraft.data.extract import load_vision as load_any_vision
from modgraft.data.picture import open_picture
from modgraft.data.records import LETTERS, Questions, Record
from modgraft.models.strips import Reader, Strip
from modgraft.models.vision import load_vision
from modgraft.recipes.mmcot.contradictions import contradictions
from modgraft.recipes.mmcot.data import is_file, load_run_tokenizer, settings_of
from modgraft.recipes.mmcot.depth import WORDS, Answered, Depth, answers, depth_file, read_depth
from modgraft.recipes.mmcot.nets import load_net, read_card


@dataclass(frozen=True)
class Answer:
    """What a run answers, and why not to trust it.

    Attributes:
        rationale: What stage 1 wrote, as stage 2 read it.
        text: What stage 2 wrote.
        choice: The index of the option that it names, if any.
        probabilities: Of each option, under stage 2; they sum to 1.
        flags: What speaks against the answer, a clause each; empty if nothing does.
        asked: The question, the context and the options as the run read them: on DigitsQA the
            question is put in DigitsQA's words, and other words that training lacks are read in
            lower case, in capitals, or as numbers.
    """

    rationale: str
    text: str
    choice: int | None
    probabilities: tuple[float, ...]
    flags: tuple[str, ...]
    asked: tuple[str, ...]

    @property
    def runner_up(self) -> int:
        """The index of the most probable option but for the answer."""
        others = (i for i in range(len(self.probabilities)) if i != self.choice)
        return max(others, key=lambda i: self.probabilities[i])


def ask(
    folder: Path, image: Path | None, question: str, choices: Sequence[str], hint: str = "",
    seed: int | None = None,
) -> Answer:  # fmt: skip
    """Ask a trained run one question; see `Asker`."""
    return Asker(folder, seed).ask(image, question, choices, hint)


class Asker:
    """A trained run that is asked questions.

    Args:
        folder: The run's folder.
        seed: One of the run's seeds; None takes the first.

    Raises:
        DataError: The run has no such seed.
        MissingFileError: The run or its fused models do not exist.
    """

    def __init__(self, folder: Path, seed: int | None = None) -> None:
        self.folder, self.settings, self.seed = folder, settings_of(folder), _seed(folder, seed)
        for key in ("stage1", "stage2"):
            read_card(folder, self.seed, key)
        self.tokenizer = load_run_tokenizer(folder, self.seed)
        self._hosts = {key: load_net(folder, self.seed, key) for key in ("stage1", "stage2")}
        self._depth: Depth | None = None
        self._reader: Reader | None = None
        if self.settings.data == "digits":
            data = folder / f"seed{self.seed}" / "data"
            self._reader = Reader(load_vision(data / "vision.safetensors"))
            if depth_file(folder, self.seed).is_file():
                self._depth = read_depth(folder, self.seed)

    def ask(
        self, image: Path | None, question: str, choices: Sequence[str], hint: str = ""
    ) -> Answer:
        """Ask one question.

        Args:
            image: An image file; None asks without fusion, that is, the T5 alone.
            question: The question.
            choices: The options, two or more.
            hint: Text context.

        Raises:
            DataError: The question is empty, there are too few or too many options, one is no
                text, or the image cannot be read.
        """
        texts = {"the question": question, "the hint": hint}
        for what, text in (texts | {f"option {i + 1}": c for i, c in enumerate(choices)}).items():
            if not isinstance(text, str):
                raise DataError(f"{what} is {text!r:.40}, not a text", remedy="Write it as one")
        if not question.strip() or not 2 <= len(choices) <= len(LETTERS):
            raise DataError(
                f"a question needs words and 2 to {len(LETTERS)} options; "
                f"here are {len(choices) if question.strip() else 'no words'}",
                remedy='For example: modgraft mmcot ask strip.png "What is the left digit?" 3 5 8',
            )
        strip, features = (None, None) if image is None else self._look(image)
        asked = None
        if self._reader is not None:
            asked = restated(question, hint, 3 if strip is None else len(strip.digits))
        read, unknown, new = self._read(asked or question, hint, choices)
        if self._reader is not None and asked is None:  # which is a flag by itself
            unknown = [word for word in unknown if word in WORDS.findall(hint)]
        blank = dict.fromkeys(
            ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), ""
        )
        record = Record(
            id="asked", question=read[0], choices=tuple(read[2:]), answer=0, hint=read[1],
            image=image.name if image else None, split="test", **blank,
        )  # fmt: skip
        questions = Questions((record,), {} if features is None else {"asked": features})
        said = answers(self._hosts, questions, self.tokenizer, self.settings)["asked"]
        flags = [
            *self._not_asked(question, asked, strip),
            *self._beyond(record, unknown, new, strip),
            *self._doubts(record, said, strip),
        ]
        return Answer(
            said.rationale, said.text, said.choice, said.probabilities, tuple(flags), tuple(read)
        )

    def _read(
        self, question: str, hint: str, choices: Sequence[str]
    ) -> tuple[list[str], list[str], list[str]]:
        """Return the texts in words that the run knows, and the words and options that it lacks.

        On DigitsQA a word that training lacks is read in lower case, as a number in words, or in
        capitals, where it has that; an option likewise, as a whole.
        """
        lacking: tuple[list[str], list[str]] = [], []

        def read(text: str, known: Callable[[str], bool], others: list[str]) -> str:
            ways: list[Callable[[str], str]] = [str]
            if self._depth is not None:
                ways += [str.lower, read_number, str.upper, str.capitalize]
            for way in ways:
                if known(way(text)):
                    return way(text)
            others.append(text)
            return text

        def in_vocabulary(word: str) -> bool:
            ids: Any = self.tokenizer(word, add_special_tokens=False)["input_ids"]
            return self.tokenizer.unk_token_id not in ids

        words = options = in_vocabulary
        if self._depth is not None:
            words, options = self._depth.words.__contains__, self._depth.options.__contains__
        read_texts = [
            WORDS.sub(lambda found: read(found[0], words, lacking[0]), text)
            for text in (question, hint)
        ]
        return [*read_texts, *(read(one.strip(), options, lacking[1]) for one in choices)], *lacking

    def _look(self, image: Path) -> tuple[Strip | None, Tensor]:
        """Return the strip in an image file, where the run is of strips, and features [m, d]."""
        if self._reader is not None:
            limit = float("inf") if self._depth is None else self._depth.strangeness
            strip = self._reader.find(image, limit)
            return strip, self._reader.eye.features(strip.ink[None])[0]
        picture = open_picture(image)
        if self.settings.features is None or is_file(self.settings.features):
            raise DataError(
                "this run's features came from a file, so a new image cannot be looked at",
                file=image,
                remedy="Train with --features VISION_MODEL, the folder or hub name of one",
            )  # fmt: skip
        model, processor = load_any_vision(self.settings.features)
        return None, encode_images([picture], model, processor)[0]

    def _not_asked(self, question: str, asked: str | None, strip: Strip | None) -> Iterator[str]:
        """Say that the question is none of DigitsQA's, where it is asked of a run on these."""
        if self._reader is None or asked is not None:
            return
        words = unread(question, 3 if strip is None else len(strip.digits))
        why = f"; no word there for {', '.join(dict.fromkeys(words))}" if words else ""
        yield (
            "the question is none that the run knows: which digit is at a place, which of two is "
            "larger or smaller, the sum of two, the code of one in a table, how many are even"
            f"{why}"
        )

    def _beyond(
        self, record: Record, unknown: list[str], new: list[str], strip: Strip | None
    ) -> Iterator[str]:
        """Say what of the question is beyond training."""
        options, depth = record.choices, self._depth
        if unknown:
            yield f"words that training lacks: {', '.join(dict.fromkeys(unknown))}"
        if new:
            yield f"options that training lacks: {', '.join(dict.fromkeys(new))}"
        if twice := [option for option, n in Counter(options).items() if n > 1]:
            yield f"options that are there twice: {', '.join(twice)}"
        if self.settings.data != "digits":
            return
        if depth is None:
            yield (
                "the run does not say what it was trained on; write it down: "
                f"modgraft mmcot evaluate --run {self.folder}"
            )
            return
        if not depth.fewest <= len(options) <= depth.most:
            yield f"{len(options)} options, where training had {depth.fewest} to {depth.most}"
        if strip is not None and strip.strangeness > depth.strangeness:
            yield (
                "the picture is no strip of digits as the eye knows them (strangeness "
                f"{strip.strangeness:.0f}, at most {depth.strangeness:.0f})"
            )

    def _doubts(self, record: Record, said: Answered, strip: Strip | None) -> Iterator[str]:
        """Say what of the answer is not sure, or contradicts itself."""
        if said.choice is None:
            yield "the answer names none of the options"
        if self.settings.data != "digits":
            return
        seen = None if strip is None else strip.digits
        yield from contradictions(record, said.rationale, said.choice, seen)
        if (depth := self._depth) is None:
            return
        if said.sureness < depth.sureness:
            yield (
                f"a word of the rationale has a probability of {said.sureness:.2f}, "
                f"of validation's hardly any less than {depth.sureness:.2f}"
            )
        if said.choice is not None and said.probability < depth.probability:
            yield (
                f"the answer has a probability of {said.probability:.2f}, "
                f"of validation's hardly any less than {depth.probability:.2f}"
            )


def _seed(folder: Path, seed: int | None) -> int:
    remedy = "modgraft mmcot train"
    run = read_json(folder / "run.json", what="a run", remedy=remedy, keys=["seeds"])
    seeds = run["seeds"]
    if seed is not None and seed not in seeds:
        remedy = f"Take one of {', '.join(map(str, seeds))}"
        raise DataError(f"the run has no seed {seed}", file=folder, remedy=remedy)
    return seeds[0] if seed is None else seed
