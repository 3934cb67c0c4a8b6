"""Turn questions into batches of tensors, for ScienceQA and DigitsQA alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from modgraft.core.errors import DataError
from modgraft.core.side import Side
from modgraft.data.records import OR_SKIP, Questions, Record, Skips
from modgraft.data.text import Form, find_form

_log = logging.getLogger(__name__)
IGNORE = -100
"""The label that the loss ignores."""
_MEMORY = 1 << 16  # texts to remember, because tokenizing takes most of a batch's time

_CUT = {"context": True, "rationale": False, "question": True}
"""What an input loses when it is too long, in order, and whether from its end."""


class Example(NamedTuple):
    """One question with its image features `[m, d]`, and the rationale to read."""

    record: Record
    features: Tensor | None = None
    rationale: str | None = None


class QADataset(Dataset[Example]):
    """A data set of questions with their features and, for a second stage, rationales.

    Args:
        questions: The questions; one without features has no image.
        rationales: Id to rationale, gold or written by a first stage; it may have more ids.

    Raises:
        DataError: `rationales` lacks a question's id.
    """

    def __init__(self, questions: Questions, rationales: Mapping[str, str] | None = None) -> None:
        self.questions, self.rationales = questions, rationales
        if rationales is not None:
            missing = [qid for qid in questions.ids if qid not in rationales]
            if missing:
                more = f" (nor {len(missing) - 1} others)" if len(missing) > 1 else ""
                remedy = "Run the first stage on these very questions and hand over all it wrote"
                raise DataError(f"there is no rationale for it{more}", id=missing[0], remedy=remedy)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Example:
        record = self.questions[index]
        rationale = None if self.rationales is None else self.rationales[record.id]
        return Example(record, self.questions.features.get(record.id), rationale)


@dataclass
class Collate:
    """A `collate_fn` that turns examples into one batch of tensors.

    The batch is a dict: `input_ids` and `attention_mask` int64 `[B, n]`, padded to its longest;
    `labels` int64 `[B, t]`, padded with -100; `side` = {source: Side(features float32 `[B, m, d]`,
    mask bool `[B, m]`)}, where an example without an image has a row of False; `ids`, the
    questions'. All texts end in the tokenizer's end token, if it has one, except targets that were
    cut.

    A batch in which no example has an image gets, if `width` is given, a side input `[B, 1, width]`
    of zeros with an all-False mask, which leaves the text untouched, and otherwise no `side` at
    all. Give `width` for every model that has a fusion implanted: it asks for its side input.

    An input longer than `max_input` loses context words from the end, then rationale words from the
    start, then question words from the end, so that options and cue stay; a target loses its end.
    `cut` counts these, and the first of each is logged. (In a loader with workers each worker
    counts for itself.)

    Args:
        tokenizer: A tokenizer of `transformers` with a pad token.
        form: A text form, or its name.
        max_input: Tokens of an input at most.
        max_target: Tokens of a target at most.
        pad_labels_to: Pad labels to this length, not to the longest (to measure what that costs).
        width: The features' width d.
        source: The name of the side input.
        targets: Whether to make `labels`; False for questions whose answer is not known.
        with_ids: Whether to put `ids` in; False where the batch goes straight into a `forward`.

    Raises:
        DataError: features of another width; a question whose options alone exceed `max_input`;
            a rationale missing or out of place.
    """

    tokenizer: PreTrainedTokenizerBase
    form: Form | str
    max_input: int = 512
    max_target: int = 512
    pad_labels_to: int | None = None
    width: int | None = None
    source: str = "image"
    targets: bool = True
    with_ids: bool = True
    cut: dict[str, set[str]] = field(
        default_factory=lambda: {"input": set(), "target": set()}, init=False
    )
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.form = find_form(self.form) if isinstance(self.form, str) else self.form
        if self.tokenizer.pad_token_id is None:
            raise DataError(
                "the tokenizer has no pad token",
                remedy="Set one: tokenizer.pad_token = tokenizer.eos_token",
            )
        if self.pad_labels_to is not None and self.pad_labels_to < self.max_target:
            reason = f"pad_labels_to={self.pad_labels_to} is less than max_target={self.max_target}"
            raise DataError(reason, remedy=f"Pass max_target={self.pad_labels_to}")

    def __call__(self, batch: Sequence[tuple[Record, Tensor | None, str | None]]) -> dict[str, Any]:
        """Make the batch of these examples: (record, features or None, rationale or None)."""
        form, examples = find_form(self.form), [Example._make(item) for item in batch]
        texts = [form.input(e.record, e.rationale) for e in examples]
        inputs = self._encode(texts)
        for i, ids in enumerate(inputs):
            if len(ids) > self.max_input:
                inputs[i] = self._shorten(form, examples[i])
        pad: Any = self.tokenizer.pad_token_id
        input_ids, attention_mask = self._pad(inputs, pad)
        out: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.targets:
            labels = self._encode([form.target(e.record) for e in examples])
            for i, ids in enumerate(labels):
                if len(ids) > self.max_target:
                    labels[i] = ids[: self.max_target]
                    self._note("target", examples[i].record.id, len(ids), self.max_target)
            out["labels"] = self._pad(labels, IGNORE, self.pad_labels_to)[0]
        side = self._side(examples)
        if side is not None:
            out["side"] = {self.source: side}
        if self.with_ids:
            out["ids"] = [e.record.id for e in examples]
        return out

    def check(self, records: Iterable[Record], skips: Skips) -> None:
        """Check that the options of each question alone are no longer than `max_input`.

        Raises:
            DataError: They are, unless `skips` lists the question.
        """
        form, texts = find_form(self.form), dict[str, str]()
        for record in records:
            fields = form.input_fields(record, "" if form.reads_rationale else None)
            fields |= dict.fromkeys(_CUT.keys() & fields.keys(), "")
            texts[record.id] = form.render_input(fields)
        for qid, ids in zip(texts, self._encode(list(texts.values())), strict=True):
            if len(ids) > self.max_input:
                skips(self._too_long(qid, OR_SKIP))

    def _too_long(self, qid: str, otherwise: str) -> DataError:
        reason = f"its options alone are longer than max_input={self.max_input} tokens"
        return DataError(reason, id=qid, remedy=f"Raise max_input, {otherwise}")

    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Tokenize texts, each to int32 `[n]`; the results are remembered for the next epoch."""
        if len(self._known) > _MEMORY:
            self._known.clear()
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            rows: Any = self.tokenizer(new, truncation=False, verbose=False)["input_ids"]
            end: Any = self.tokenizer.eos_token_id
            for text, row in zip(new, rows, strict=True):
                row = row if end is None or row[-1:] == [end] else [*row, end]
                self._known[text] = torch.tensor(row, dtype=torch.int32)
        return [self._known[text] for text in texts]

    def _shorten(self, form: Form, example: Example) -> Tensor:
        fields = form.input_fields(example.record, example.rationale)
        long = len(self._encode([form.render_input(fields)])[0])

        def encode(name: str, words: list[str]) -> Tensor:
            return self._encode([form.render_input(fields | {name: " ".join(words)})])[0]

        for name, from_end in _CUT.items():
            words = fields.get(name, "").split()
            keep = _largest_fitting(
                len(words),
                lambda n, name=name, words=words, from_end=from_end: (
                    len(encode(name, _cut_words(words, n, from_end))) <= self.max_input
                ),
            )
            if keep is not None:
                self._note("input", example.record.id, long, self.max_input)
                return encode(name, _cut_words(words, keep, from_end))
            if name in fields:
                fields[name] = ""
        raise self._too_long(example.record.id, "or leave it out")

    def _note(self, what: str, qid: str, long: int, limit: int) -> None:
        if not self.cut[what]:
            message = "question %r: %s of %d tokens cut to max_%s=%d; Collate.cut counts the others"
            _log.warning(message, qid, what, long, what, limit)
        self.cut[what].add(qid)

    def _pad(
        self, rows: list[Tensor], value: int, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pad rows on the right: the ids and their mask, int64 `[B, longest]`."""
        length = length or max(len(row) for row in rows)
        ids = torch.full((len(rows), length), value, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask

    def _side(self, examples: list[Example]) -> Side | None:
        maps = [e.features for e in examples]
        width = self.width or next((map_.shape[1] for map_ in maps if map_ is not None), None)
        if width is None:
            return None
        patches = max((len(map_) for map_ in maps if map_ is not None), default=1)
        tensor = torch.zeros(len(maps), patches, width)
        mask = torch.zeros(len(maps), patches, dtype=torch.bool)
        for i, map_ in enumerate(maps):
            if map_ is None:
                continue
            if map_.ndim != 2 or map_.shape[1] != width:
                reason = f"features of shape {list(map_.shape)}, expected [patches, {width}]"
                remedy = "Use the features that the module was made for"
                raise DataError(reason, id=examples[i].record.id, remedy=remedy)
            tensor[i, : len(map_)] = map_
            mask[i, : len(map_)] = True
        return Side(tensor, mask)


class SortedBatches(Sampler[list[int]]):
    """Random batches of examples of similar length, so that there is little padding.

    Each epoch, the shuffled examples are cut into pools of `pool` batches, each pool is sorted by
    length and cut into batches, and the batches are shuffled, all by torch's global generator.

    Args:
        lengths: Each example's length, in any unit.
        batch: The number of examples in a batch; the last one may be smaller.
        pool: The number of batches in a pool; with 1, examples are simply shuffled.
    """

    def __init__(self, lengths: Sequence[float], batch: int, pool: int = 16) -> None:
        self.lengths, self.batch, self.pool = lengths, batch, pool

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        order, size = torch.randperm(len(self.lengths)).tolist(), self.batch * self.pool
        made: list[list[int]] = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda i: self.lengths[i])
            made += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        return iter([made[i] for i in torch.randperm(len(made)).tolist()])


def padded(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Pad token ids on the right with `value`, to int64 `[B, longest]`."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def _cut_words(words: list[str], count: int, from_end: bool) -> list[str]:
    """Keep `count` words, and cut the others from the end or from the start."""
    return words[:count] if from_end else words[len(words) - count :]


def _largest_fitting(limit: int, fits: Callable[[int], bool]) -> int | None:
    """Find the largest n in 0..limit that fits, if all smaller ones fit; None if 0 does not."""
    if not fits(0):
        return None
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
