"""Records of questions in the format of ScienceQA, which DigitsQA shares, and collections."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from modgraft.core.errors import DataError, UnknownNameError

if TYPE_CHECKING:  # a report reads records without torch
    from torch import Tensor

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Record:
    """One multiple-choice question, with ScienceQA's fields (Lu et al. 2022), plus id and caption.

    `answer` is an index of `choices`; `image` is the image's file name, or None; `hint` and
    `caption` are the text context. In DigitsQA, `category` is the family ("read", "compare", ...).

    Raises:
        DataError: There are fewer than two or more than 26 choices, the answer is none of them, or
            a text holds half a character.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str | None
    task: str
    grade: str
    subject: str
    topic: str
    category: str
    skill: str
    lecture: str
    solution: str
    split: str
    caption: str = ""

    def __post_init__(self) -> None:
        if reason := _problem_of(self):
            raise DataError(reason, id=self.id, remedy="Correct it")

    @property
    def letter(self) -> str:
        """The right answer's letter: "A" for choice 0."""
        return LETTERS[self.answer]

    @classmethod
    def from_json(
        cls,
        qid: str,
        raw: Mapping[str, Any],
        *,
        file: str | Path = "problems.json",
        caption: str = "",
    ) -> Record:
        """Read the record from an entry of `problems.json`; unknown fields are ignored.

        Args:
            qid: The question's id, the entry's key.
            raw: The entry.
            file: The entry's file, for error messages.
            caption: The image's caption, from `captions.json`.

        Raises:
            DataError: A field is missing or has the wrong type, or the record is invalid; the
                message names file, id and remedy.
        """
        if not isinstance(raw, Mapping):
            raise DataError(
                f"the record is {raw!r:.60}, not an object", id=qid, file=file, remedy=_FIX
            )
        for name in _FIELDS:
            if name not in raw:
                raise DataError(f"the record has no field {name!r}", id=qid, file=file, remedy=_FIX)
            fits, wanted = _TYPES[name]
            if not fits(raw[name]):
                reason = f"{name!r} is {raw[name]!r:.60}, not {wanted}"
                raise DataError(reason, id=qid, file=file, remedy=_FIX)
        values = {name: raw[name] for name in _FIELDS}
        values["choices"] = tuple(raw["choices"])
        try:
            return cls(id=qid, **values, caption=caption)
        except DataError as error:
            # an id that cannot be written down cannot be listed as skipped
            remedy = _FIX if _is_unicode(qid) else "Correct the id"
            raise DataError(error.reason, id=qid, file=file, remedy=remedy) from None

    def to_json(self) -> dict[str, Any]:
        """Return the record as an entry of `problems.json`, without id and caption."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return values | {"choices": list(self.choices)}


_FIELDS = tuple(f.name for f in dataclasses.fields(Record) if f.name not in ("id", "caption"))
OR_SKIP = "or pass skip_bad=True (--skip-bad) to go on without it"
"""The other remedy for one bad question."""
_FIX = f"Correct the entry, {OR_SKIP}"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_FIELDS, (_is_text, "a string")),
    "choices": (lambda v: isinstance(v, list | tuple) and all(map(_is_text, v)),
                "a list of strings"),
    "answer": (lambda v: type(v) is int, "a whole number"),
    "image": (lambda v: v is None or (_is_text(v) and v != ""), "a file name or null"),
}  # fmt: skip
"""Field → whether a value has the right type, and that type's name in errors."""


def _problem_of(record: Record) -> str | None:
    """Return what is wrong with a record, None if nothing is."""
    count = len(record.choices)
    texts = {name: getattr(record, name) or "" for name in (*_FIELDS, "caption")}
    texts |= {"id": record.id, "choices": "".join(record.choices), "answer": ""}
    if not _is_unicode("".join(texts.values())):
        name = next(name for name, text in texts.items() if not _is_unicode(text))
        return f"{name!r} holds half a character (a lone surrogate), which no file or model takes"
    if not record.question.strip():
        return "the question is empty"
    if count < 2:
        return f"the record has {'only one choice' if count else 'no choices'}"
    if count > len(LETTERS):
        return f"{count} choices, but only {len(LETTERS)} letters"
    if not 0 <= record.answer < count:
        return (
            f"answer index {record.answer} is out of range for {count} choices (0 to {count - 1})"
        )
    return None


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written: JSON may hold halves of characters, as "\\ud83d"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Skipped:
    """A question that was left out under `skip_bad`, and why."""

    id: str
    file: str
    reason: str


class Skips:
    """Handles bad questions: `skips(error)` raises the error or, under `skip_bad`, lists it."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.entries: list[Skipped] = []

    def __call__(self, error: DataError) -> None:
        """Raise `error`, or list the question that it names, if its id can be written down."""
        if not self.skip_bad or error.id is None or not _is_unicode(error.id):
            raise error
        self.entries.append(Skipped(error.id, str(error.file or ""), error.reason))

    @property
    def ids(self) -> set[str]:
        """The ids of the questions to leave out."""
        return {entry.id for entry in self.entries}


@dataclass(frozen=True, repr=False, eq=False)
class Questions(Sequence[Record]):
    """Records in order, their image features, and what was skipped in loading them.

    Args:
        records: The questions; ids are unique.
        features: Id to floating-point `[m, d]` (m patches of width d); a question without features
            has no image.
        splits: Name to ids, as in ScienceQA's `pid_splits.json`; None groups by `record.split`.
        images: The folder of image files `<split>/<id>/<image>`, if known.
        skipped: Questions that were left out in loading.

    Raises:
        DataError: An id occurs twice, features have no question, or their widths differ.
    """

    records: tuple[Record, ...]
    features: Mapping[str, Tensor] = field(default_factory=dict)
    splits: Mapping[str, tuple[str, ...]] | None = None
    images: Path | None = None
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", tuple(self.records))
        index = {record.id: record for record in self.records}
        if len(index) != len(self.records):
            twice = [qid for qid, n in Counter(r.id for r in self.records).items() if n > 1]
            raise DataError(
                f"the id occurs {len(self.records) - len(index) + 1} times", id=twice[0]
            )
        object.__setattr__(self, "_index", index)
        width = None
        for qid, map_ in self.features.items():
            if qid not in index:
                raise DataError(
                    "features for a question that is not there", id=qid, remedy="Use .subset(ids)"
                )
            if map_.ndim != 2 or (width is not None and map_.shape[1] != width):
                reason = (
                    f"features of shape {tuple(map_.shape)}, expected [patches, {width or 'width'}]"
                )
                raise DataError(
                    reason, id=qid, remedy="Extract all features with one and the same model"
                )
            width = map_.shape[1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Questions: ...
    def __getitem__(self, index: int | slice) -> Record | Questions:
        if isinstance(index, slice):
            return self.subset(record.id for record in self.records[index])
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __contains__(self, item: object) -> bool:
        """Return whether a record, or an id, is among the questions."""
        return item in self._index if isinstance(item, str) else item in self.records

    def __repr__(self) -> str:
        return f"Questions({self.summary()})"

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(record.id for record in self.records)

    @property
    def width(self) -> int | None:
        """The features' width d; None if no question has any."""
        return next((map_.shape[1] for map_ in self.features.values()), None)

    @classmethod
    def from_json(
        cls,
        problems: Mapping[str, Mapping[str, Any]],
        *,
        features: Mapping[str, Tensor] | None = None,
        splits: Mapping[str, Sequence[str]] | None = None,
        file: str | Path = "problems.json",
    ) -> Questions:
        """Read questions from raw records {id: record}, as in `problems.json` and DigitsQA.

        Raises:
            DataError: As `Record.from_json` and the constructor.
        """
        records = tuple(Record.from_json(qid, raw, file=file) for qid, raw in problems.items())
        lists = None if splits is None else {name: tuple(ids) for name, ids in splits.items()}
        return cls(records, features or {}, lists)

    def image_path(self, record: Record) -> Path:
        """Return the path of the record's image, `<images>/<split>/<id>/<image>`, as in ScienceQA.

        Raises:
            DataError: The record has no image, or the folder is not known.
        """
        if record.image is None:
            raise DataError("the question has no image", id=record.id)
        if self.images is None:
            remedy = "Load the questions with images=<folder of <split>/<id>/image.png>"
            raise DataError("the folder of images is not known", id=record.id, remedy=remedy)
        return self.images / record.split / record.id / record.image

    def without(self, skips: Skips) -> Questions:
        """Leave out the skipped questions, and list them in `skipped`.

        Raises:
            DataError: No question is left.
        """
        out = skips.ids
        kept = self.subset(qid for qid in self.ids if qid not in out)
        if not kept and skips.entries:
            first = skips.entries[0]
            reason = f"every question was skipped, the first one because: {first.reason}"
            raise DataError(reason, id=first.id, file=first.file)
        return dataclasses.replace(kept, skipped=(*self.skipped, *skips.entries))

    def record(self, qid: str) -> Record:
        """Return the record with this id.

        Raises:
            UnknownNameError: There is none.
        """
        if qid not in self._index:
            raise UnknownNameError.among("question", qid, self._index)
        return self._index[qid]

    def split(self, name: str) -> Questions:
        """Return the questions of one split, in the order of `splits`.

        Raises:
            UnknownNameError: No split has this name.
        """
        splits = self.splits
        if splits is None:
            names = dict.fromkeys(record.split for record in self.records)
            splits = {key: tuple(r.id for r in self.records if r.split == key) for key in names}
        if name not in splits:
            raise UnknownNameError.among("split", name, splits)
        return self.subset(splits[name])

    def subset(self, ids: Iterable[str]) -> Questions:
        """Return the questions with these ids, in this order, with their features.

        Raises:
            UnknownNameError: An id does not exist.
        """
        records = tuple(self.record(qid) for qid in ids)
        keep = {record.id for record in records}
        features = {qid: map_ for qid, map_ in self.features.items() if qid in keep}
        splits = self.splits and {
            k: tuple(q for q in v if q in keep) for k, v in self.splits.items()
        }
        return dataclasses.replace(self, records=records, features=features, splits=splits)

    def with_features(self, features: Mapping[str, Tensor]) -> Questions:
        """Return the same questions with other image features (id to `[m, d]`)."""
        return dataclasses.replace(self, features=dict(features))

    def without_images(self) -> Questions:
        """Return the text-only control: the same records, captions included, without features."""
        return self.with_features({})

    def shuffle_images(self, seed: int) -> Questions:
        """Return the shuffled-images control: each question gets another question's features.

        Features are permuted along one random cycle in each split (Sattolo 1986). A question may
        still get an equal image, if the data holds the same one twice.

        Raises:
            DataError: A split has a single image, so there is none to swap it with.
        """
        groups: dict[str, list[str]] = {}
        for record in self.records:
            if record.id in self.features:
                groups.setdefault(record.split, []).append(record.id)
        rng, features = random.Random(seed), dict(self.features)
        for name, ids in groups.items():
            if len(ids) < 2:
                reason = f"split {name!r} has a single image, so there is none to swap it with"
                raise DataError(reason, id=ids[0], remedy="Shuffle over more questions")
            source = list(ids)
            for i in range(len(ids) - 1, 0, -1):
                j = rng.randrange(i)  # never i itself, which makes it one cycle
                source[i], source[j] = source[j], source[i]
            features |= {qid: self.features[other] for qid, other in zip(ids, source, strict=True)}
        return self.with_features(features)

    def summary(self) -> str:
        """Summarise in one line what there is, with one more line for each skipped question."""
        text = f"{len(self)} questions, {len(self.features)} with image features"
        if self.width is not None:
            text += f" of width {self.width}"
        if not self.skipped:
            return text
        lines = [f"  {s.id} ({s.file}): {s.reason}" for s in self.skipped]
        return "\n".join([f"{text}; skipped {len(self.skipped)}:", *lines])

    _index: Mapping[str, Record] = field(init=False, repr=False, compare=False)
