from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.data.records import Questions, Record
from questions import CAPTIONS, PROBLEMS, record


def test_a_record_is_scienceqas_field_for_field() -> None:
    for qid, raw in PROBLEMS.items():
        one = Record.from_json(qid, raw, caption=CAPTIONS.get(qid, ""))
        assert one.to_json() == raw
        assert list(one.to_json()) == list(raw)
        assert one.letter == "ABCD"[raw["answer"]]
        assert hash(one) == hash(record(qid))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": []}, "the record has no choices"),
        ({"choices": ["x"]}, "the record has only one choice"),
        ({"choices": ["x"] * 27}, "27 choices, but only 26 letters"),
        ({"choices": ["x", 3]}, r"'choices' is \['x', 3\], not a list of strings"),
        ({"choices": "xy"}, "'choices' is 'xy', not a list"),
        ({"answer": 3}, r"answer index 3 is out of range for 3 choices \(0 to 2\)"),
        ({"answer": -1}, "answer index -1 is out of range"),
        ({"answer": True}, "'answer' is True, not a whole number"),
        ({"answer": "1"}, "'answer' is '1', not a whole number"),
        ({"question": " "}, "the question is empty"),
        ({"question": None}, "'question' is None, not a string"),
        ({"image": ""}, "'image' is '', not a file name or null"),
        ({"hint": 3}, "'hint' is 3, not a string"),
        ({"lecture": "a \ud83d b"}, r"'lecture' holds half a character \(a lone surrogate\)"),
        ({"choices": ["x", "\ude00"]}, "'choices' holds half a character"),
    ],
)
def test_bad_records(changes: dict[str, object], message: str) -> None:
    match = (
        rf"^some/problems.json, question '11': {message}.*\. Correct the entry, or pass skip_bad"
    )
    with pytest.raises(DataError, match=match) as caught:
        Record.from_json("11", PROBLEMS["11"] | changes, file="some/problems.json")
    assert (caught.value.id, caught.value.file) == ("11", "some/problems.json")


def test_a_record_that_is_none() -> None:
    with pytest.raises(DataError, match=r"question '7': the record is \[1\], not an object"):
        Record.from_json("7", [1])  # type: ignore[arg-type]
    raw = {k: v for k, v in PROBLEMS["11"].items() if k != "choices"}
    with pytest.raises(DataError, match="the record has no field 'choices'"):
        Record.from_json("7", raw)


def some(n: int = 6, without: tuple[int, ...] = (), split: str = "train") -> Questions:
    records = tuple(record("11", id=str(i), split=split) for i in range(n))
    maps = {str(i): torch.full((2, 3), float(i)) for i in range(n) if i not in without}
    return Questions(records, maps)


def test_questions_are_a_sequence() -> None:
    questions = some(4, without=(1,))
    assert len(questions) == 4
    assert [r.id for r in questions] == list(questions.ids) == ["0", "1", "2", "3"]
    assert questions[1:3].ids == ("1", "2")
    assert set(questions[1:3].features) == {"2"}
    assert "3" in questions
    assert questions[3] in questions
    assert "9" not in questions
    assert questions.width == 3
    assert questions.without_images().width is None
    assert repr(questions) == "Questions(4 questions, 3 with image features of width 3)"
    assert questions.subset(["3", "0"]).ids == ("3", "0")
    with pytest.raises(UnknownNameError, match="no question is named 'x'; there are: '0', '1'"):
        questions.subset(["x"])


def test_splits() -> None:
    records = (record("11"), record("12"), record("13"))
    questions = Questions(records)
    assert questions.split("train").ids == ("11", "12")
    with pytest.raises(
        UnknownNameError, match="no split is named 'val'; there are: 'test', 'train'"
    ):
        questions.split("val")
    listed = Questions.from_json(PROBLEMS, splits={"mini": ["13", "11"], "empty": []})
    assert listed.split("mini").ids == ("13", "11")
    assert listed.split("empty").ids == ()


def test_questions_that_do_not_fit_together() -> None:
    with pytest.raises(DataError, match="question '11': the id occurs 2 times"):
        Questions((record("11"), record("11")))
    with pytest.raises(DataError, match="question 'x': features for a question that is not there"):
        some().with_features({"x": torch.ones(1, 3)})
    with pytest.raises(
        DataError, match=r"question '1': features of shape \(2, 4\), expected .* 3\]"
    ):
        some().with_features({"0": torch.ones(2, 3), "1": torch.ones(2, 4)})


@given(st.integers(2, 12), st.integers(0, 99))
def test_shuffled_images_are_a_derangement(n: int, seed: int) -> None:
    questions = some(n + 1, without=(0,))
    shuffled = questions.shuffle_images(seed)
    assert set(shuffled.features) == set(questions.features)
    now = {qid: int(map_[0, 0]) for qid, map_ in shuffled.features.items()}
    assert sorted(now.values()) == list(range(1, n + 1))
    assert all(int(qid) != value for qid, value in now.items())
    again = questions.shuffle_images(seed)
    assert all(again.features[q] is shuffled.features[q] for q in now)
    assert questions.features["1"][0, 0] == 1  # the original stays


def test_shuffling_keeps_to_the_split_and_to_its_own_numbers() -> None:
    train, test = some(4), some(4, split="test")
    records = (*train, *(record("11", id=f"t{r.id}", split="test") for r in test))
    maps = dict(train.features) | {f"t{q}": -1 - m for q, m in test.features.items()}
    state = random.getstate()
    mixed = Questions(records, maps).shuffle_images(3)
    assert random.getstate() == state
    assert all((m[0, 0] < 0) == q.startswith("t") for q, m in mixed.features.items())
    with pytest.raises(DataError, match="split 'train' has a single image"):
        some(1).shuffle_images(0)
