"""Load ScienceQA (Lu et al. 2022) from its published files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modgraft.core.errors import DataError
from modgraft.core.files import read_json
from modgraft.data.features import check_features, load_features
from modgraft.data.records import OR_SKIP, Questions, Record, Skips

_log = logging.getLogger(__name__)
_GET = "Take the folder data/scienceqa of the published data set (github.com/lupantech/ScienceQA)"


def load_scienceqa(
    folder: str | Path,
    *,
    features: str | Path | Mapping[str, Tensor] | None = None,
    names: str | Path | None = None,
    width: int | None = None,
    captions: bool | str | Path = True,
    images: str | Path | None = None,
    published: bool = False,
    skip_bad: bool = False,
) -> Questions:
    """Load ScienceQA's questions from the published files, and check these against each other.

    `folder` holds `problems.json`, `pid_splits.json` and, unless `captions=False`, `captions.json`.

    Args:
        folder: The folder of the published files.
        features: Vision features of every question with an image, as a file (see `load_features`)
            or {id: `[m, d]`}. None loads none; `extract_features` makes them.
        names: The JSON file {id: row} of a file of features; by default the one beside it.
        width: The width that the features must have (the fusion's `dim`).
        captions: Whether to read `captions.json`, or the file to read instead; every question with
            an image needs a caption.
        images: The folder of `<split>/<id>/image.png`; by default `<folder>/images`.
        published: Write each line break in lecture and solution as the two characters ``\\n``, as
            the code released with Zhang et al. 2023 does; else it becomes a blank in every text
            form.
        skip_bad: Leave out bad questions; `.skipped` and `.summary()` list them all.

    Raises:
        MissingFileError: A file does not exist.
        DataError: JSON is malformed, a record or its features are bad, or an id is in one file
            and not in another. The message names file, id and remedy.
    """
    folder = Path(folder)
    skips = Skips(skip_bad)
    problems_file = folder / "problems.json"
    problems = read_json(problems_file, what="ScienceQA's questions", remedy=_GET)
    captions_file = folder / "captions.json" if captions is True else Path(captions or "")
    texts = {} if captions is False else _captions(captions_file)
    records = _records(problems, texts, problems_file, skips)
    if published:
        records = {qid: _as_published(record) for qid, record in records.items()}
    if captions is not False:
        _check_captions(records, problems, texts, captions_file, skips)
    splits = _splits(folder / "pid_splits.json", records, problems, skips)
    if isinstance(features, Mapping):
        maps = check_features(features, records.values(), width=width, skips=skips)
    elif features is not None:
        maps = load_features(features, records.values(), names=names, width=width, skips=skips)
    else:
        maps = {}
    out = skips.ids
    questions = Questions(
        tuple(records.values()),
        {qid: map_ for qid, map_ in maps.items() if qid not in out},
        splits,
        Path(images) if images is not None else folder / "images",
    ).without(skips)
    if questions.skipped:
        _log.warning("%s", questions.summary())
    return questions


def _records(
    problems: Mapping[str, Any], texts: Mapping[str, str], file: Path, skips: Skips
) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for qid, raw in problems.items():
        try:
            records[qid] = Record.from_json(qid, raw, file=file, caption=texts.get(qid, ""))
        except DataError as error:
            skips(error)
    return records


def _as_published(record: Record) -> Record:
    lecture, solution = (t.replace("\n", "\\n") for t in (record.lecture, record.solution))
    return dataclasses.replace(record, lecture=lecture, solution=solution)


def _captions(file: Path) -> dict[str, str]:
    remedy = f"{_GET}, or pass captions=False to go on without captions"
    texts = read_json(file, what="the images' captions", remedy=remedy).get("captions")
    if not isinstance(texts, dict):
        raise DataError('there is no object "captions" of {id: text}', file=file, remedy=remedy)
    for qid, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"the caption is {text!r:.60}, not a string", id=qid, file=file)
    return texts


def _check_captions(
    records: Mapping[str, Record],
    problems: Mapping[str, Any],
    texts: Mapping[str, str],
    file: Path,
    skips: Skips,
) -> None:
    for qid in texts:
        if qid not in problems:
            reason = "a caption for a question that problems.json does not have"
            skips(DataError(reason, id=qid, file=file, remedy=f"Remove it, {OR_SKIP}"))
    for qid, record in records.items():
        if record.image is not None and qid not in texts:
            remedy = f"Add it, pass captions=False, {OR_SKIP}"
            skips(DataError("the image has no caption", id=qid, file=file, remedy=remedy))


def _splits(
    file: Path, records: Mapping[str, Record], problems: Mapping[str, Any], skips: Skips
) -> dict[str, tuple[str, ...]]:
    """Read the splits; the published file also has parts and unions of train, val and test."""
    lists = read_json(file, what="ScienceQA's splits", remedy=_GET)
    home: dict[str, list[str]] = {}
    for name, ids in lists.items():
        if not isinstance(ids, list) or not all(isinstance(qid, str) for qid in ids):
            raise DataError(f"the split {name!r} is not a list of ids", file=file, remedy=_GET)
        if len(set(ids)) != len(ids):
            twice = next(qid for qid in ids if ids.count(qid) > 1)
            raise DataError(f"listed twice in {name!r}", id=twice, file=file, remedy="Remove one")
        for qid in ids:
            home.setdefault(qid, []).append(name)
    for qid, where in home.items():
        if qid not in problems:
            reason = f"listed in {where[0]!r}, but problems.json does not have it"
            skips(DataError(reason, id=qid, file=file, remedy=f"Remove it, {OR_SKIP}"))
    for qid, record in records.items():
        where = home.get(qid, [])
        if record.split not in where or len({"train", "val", "test"}.intersection(where)) > 1:
            there = f"here in {', '.join(map(repr, where))}" if where else "here in no list"
            reason = f"its record says split {record.split!r}, but it is {there}"
            skips(
                DataError(reason, id=qid, file=file, remedy=f"Make the two files agree, {OR_SKIP}")
            )
    out = skips.ids
    return {name: tuple(q for q in ids if q not in out) for name, ids in lists.items()}
