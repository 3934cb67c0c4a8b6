from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from modgraft.core.errors import DataError, MissingFileError
from modgraft.core.files import read_json, whole, write_json
from modgraft.data.scienceqa import load_scienceqa
from modgraft.data.text import FORMS
from questions import CAPTIONS, PROBLEMS, SAMPLE, SPLITS, needs_sample, write_folder

FEATURES = {"11": torch.ones(2, 4), "13": torch.ones(3, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_the_published_files(folder: Path) -> None:
    questions = load_scienceqa(folder)
    assert questions.ids == ("11", "12", "13")
    assert [r.to_json() for r in questions] == list(PROBLEMS.values())
    assert [r.caption for r in questions] == ["A bowl of water.", "", "A map of two continents."]
    assert questions.split("train").ids == ("12", "11")  # in the order of pid_splits.json
    assert questions.split("trainval").ids == ("11", "12")
    assert len(questions.split("val")) == 0
    assert questions.features == {}
    assert questions.skipped == ()
    assert questions.image_path(questions[0]) == folder / "images" / "train" / "11" / "image.png"


def test_without_captions_with_others_and_with_images_elsewhere(folder: Path) -> None:
    (folder / "captions.json").rename(folder / "other.json")
    assert all(r.caption == "" for r in load_scienceqa(folder, captions=False))
    questions = load_scienceqa(folder, captions=folder / "other.json", images="/pictures")
    assert questions[0].caption == CAPTIONS["11"]
    assert questions.image_path(questions[2]) == Path("/pictures/test/13/image.png")
    with pytest.raises(DataError, match="question '12': the question has no image"):
        questions.image_path(questions[1])
    with pytest.raises(MissingFileError, match=r"captions.json: there is no .*captions=False"):
        load_scienceqa(folder)


def test_with_features(folder: Path) -> None:
    questions = load_scienceqa(folder, features=FEATURES, width=4)
    assert {q: m.shape for q, m in questions.features.items()} == {"11": (2, 4), "13": (3, 4)}
    with pytest.raises(DataError, match=r"question '11': the features are 4 wide, expected 5"):
        load_scienceqa(folder, features=FEATURES, width=5)


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if k not in keys}


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    # what the files hold instead, the message, the id that skip_bad leaves out
    "no choices": (
        {"problems": PROBLEMS | {"12": PROBLEMS["12"] | {"choices": []}}},
        r"problems.json, question '12': the record has no choices. Correct the entry, or pass skip",
        "12",
    ),
    "answer out of range": (
        {"problems": PROBLEMS | {"11": PROBLEMS["11"] | {"answer": 9}}},
        r"problems.json, question '11': answer index 9 is out of range for 3 choices",
        "11",
    ),
    "in a split, not in problems": (
        {"pid_splits": SPLITS | {"train": ["11", "12", "99"]}},
        r"pid_splits.json, question '99': listed in 'train', but problems.json does not have it",
        "99",
    ),
    "in problems, in no split": (
        {"pid_splits": SPLITS | {"train": ["11"], "trainval": ["11"]}},
        r"pid_splits.json, question '12': its record says split 'train', but it is here in no list",
        "12",
    ),
    "in another split": (
        {"pid_splits": SPLITS | {"train": ["11"], "val": ["12"]}},
        r"question '12': its record says split 'train', but it is here in 'val', 'trainval'",
        "12",
    ),
    "in two splits": (
        {"pid_splits": SPLITS | {"val": ["12"]}},
        r"question '12': its record says split 'train', but it is here in 'train', 'val'",
        "12",
    ),
    "half a character in a question": (
        {"problems": PROBLEMS | {"12": PROBLEMS["12"] | {"hint": "Run \ud83d"}}},
        r"problems.json, question '12': 'hint' holds half a character",
        "12",
    ),
    "half a character in a caption": (
        {"captions": {"captions": CAPTIONS | {"11": "\ude00"}}},
        r"problems.json, question '11': 'caption' holds half a character",
        "11",
    ),
    "image without caption": (
        {"captions": {"captions": without(CAPTIONS, "13")}},
        r"captions.json, question '13': the image has no caption. Add it, pass captions=False",
        "13",
    ),
    "caption without question": (
        {"captions": {"captions": CAPTIONS | {"98": "x"}}},
        r"captions.json, question '98': a caption for a question that problems.json does not have",
        "98",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_and_what_is_skipped(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    files, message, out = BAD[name]
    folder = write_folder(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        load_scienceqa(folder)
    with caplog.at_level(logging.WARNING):
        questions = load_scienceqa(folder, skip_bad=True)
    assert questions.ids == tuple(q for q in PROBLEMS if q != out)
    (skipped,) = questions.skipped
    assert skipped.id == out
    assert questions.summary().splitlines() == [
        f"{len(questions)} questions, 0 with image features; skipped 1:",
        f"  {out} ({skipped.file}): {skipped.reason}",
    ]
    assert caplog.messages == [questions.summary()]  # listed, never silent
    assert all(out not in ids for ids in (questions.splits or {}).values())


def test_skipping_several_and_their_features(tmp_path: Path) -> None:
    problems = PROBLEMS | {"11": PROBLEMS["11"] | {"choices": []}}
    folder = write_folder(tmp_path, problems=problems)
    maps = {"11": torch.ones(2, 4), "77": torch.ones(2, 4)}  # nothing for 13, one for nobody
    questions = load_scienceqa(folder, features=maps, skip_bad=True)
    assert questions.ids == ("12",)
    assert [(s.id, s.reason) for s in questions.skipped] == [
        ("11", "the record has no choices"),
        ("77", "features for an unknown question"),
        ("13", "the question has an image, but no features"),
    ]


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    problems = {q: raw | {"answer": 9} for q, raw in PROBLEMS.items()}
    with pytest.raises(DataError, match="'11': every question was skipped, the first one because"):
        load_scienceqa(write_folder(tmp_path, problems=problems), skip_bad=True)


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("problems", '{"1": {]', r"problems.json: not JSON: .* at line 1, column 8\. Take"),
        ("problems", "[]", r"problems.json: holds a list, not an object"),
        ("problems", '{"1": {}, "1": {}}', r"problems.json: the key '1' occurs twice"),
        ("problems", None, r"problems.json: there is no such file \(ScienceQA's questions"),
        ("pid_splits", '{"train": "11"}', r"pid_splits.json: the split 'train' is not a list"),
        ("pid_splits", '{"train": ["11", "11"]}', r"question '11': listed twice in 'train'"),
        ("pid_splits", None, r"pid_splits.json: there is no such file"),
        ("captions", "{}", r'captions.json: there is no object "captions"'),
        ("captions", '{"captions": {"11": 3}}', r"question '11': the caption is 3, not a string"),
        ("captions", b"\xff{}", r"captions.json: not UTF-8 text: byte 0"),
    ],
)
def test_broken_files_are_never_skipped(
    folder: Path, file: str, text: str | bytes | None, message: str, skip_bad: bool
) -> None:
    path = folder / f"{file}.json"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        load_scienceqa(folder, skip_bad=skip_bad)


def test_an_id_that_cannot_be_written_is_never_skipped(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, problems=PROBLEMS | {"\ud83d": PROBLEMS["12"]})
    with pytest.raises(DataError, match=r"question '\\ud83d': 'id' holds half a character"):
        load_scienceqa(folder, skip_bad=True)


def test_the_published_form_writes_a_line_break_as_two_characters(folder: Path) -> None:
    ours, theirs = load_scienceqa(folder), load_scienceqa(folder, published=True)
    for name, head, end in (
        ("QCM-LE", "Solution: ", "."),
        ("QCM-LEA", "", " The answer is (B)."),
        ("QCM-ALE", "The answer is (B). BECAUSE: ", ""),
    ):
        ours_text, theirs_text = (FORMS[name].target(each.record("11")) for each in (ours, theirs))
        assert ours_text == f"{head}Light things float. Heavy ones sink. A cork is light.{end}"
        assert theirs_text == f"{head}Light things float.\\nHeavy ones sink. A cork is light.{end}"
    inputs = [FORMS["QCM-A"].input(each.record("11")) for each in (ours, theirs)]
    assert inputs[0] == inputs[1]  # nothing but lecture and solution
    assert theirs.record("12") == ours.record("12")


@needs_sample
def test_the_published_form_of_the_sample() -> None:
    ours, theirs = load_scienceqa(SAMPLE), load_scienceqa(SAMPLE, published=True)
    target, differ = FORMS["QCM-LE"].target, 0
    for record in ours:
        text = f"Solution: {record.lecture} {record.solution}."
        written = " ".join("\\n".join(text.split("\n")).split())
        assert target(theirs.record(record.id)) == written
        differ += written != target(record)
    assert differ == sum("\n" in f"{r.lecture}{r.solution}" for r in ours) > 200


@needs_sample
def test_the_sample() -> None:
    questions = load_scienceqa(SAMPLE)
    assert len(questions) == 300
    assert len(questions.split("train")) == 220
    assert len(questions.split("val")) == 80
    assert sum(r.image is not None for r in questions) == 149
    assert all((r.caption != "") == (r.image is not None) for r in questions)


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_json(file, {"a": None})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(file, {"a": float("nan")})

    def interrupted() -> None:
        with whole(file) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_json(file, what="a value", remedy="") == {"a": None}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert file.stat().st_mode & 0o400
