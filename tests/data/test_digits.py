from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from modgraft.data.digit_wordings import PLACES, read_number
from modgraft.data.digits import (
    CODES,
    CUT,
    FAMILIES,
    POSITIONS,
    DigitsQA,
    digits_qa,
    facts,
    false_steps,
    scans,
)
from modgraft.data.records import Record
from modgraft.recipes.mmcot.metrics import classify_error


@pytest.fixture(scope="module")
def data() -> DigitsQA:
    return digits_qa(3000, 300, 300, seed=0)


def rows(data: DigitsQA, *, image: bool | None = None):
    for qid, raw in data.problems.items():
        if image is None or (raw["image"] is not None) == image:
            yield qid, raw


def test_every_record_is_one_of_scienceqas(data):
    for qid, raw in rows(data):
        record = Record.from_json(qid, raw, file="digits")
        assert record.to_json() == raw
        assert record.category in FAMILIES
        assert 3 <= len(record.choices) == len(set(record.choices)) <= 5
        assert (qid in data.strips) == (qid in data.digits) == (record.image is not None)


def test_the_columns_of_the_published_table_all_have_members(data):
    test = [data.problems[qid] for qid in data.splits["test"]]
    assert {r["subject"] for r in test} == {"natural science", "social science", "language science"}
    grades = {int(r["grade"].removeprefix("grade")) for r in test}
    assert grades & set(range(1, 7))
    assert grades & set(range(7, 13))
    assert any(r["hint"] for r in test)
    assert any(not r["hint"] and r["image"] is None for r in test)
    assert Counter(r["category"] for r in test) == dict.fromkeys(FAMILIES, 50)


def test_a_split_shows_only_its_own_scans():
    data = digits_qa(400, 400, 400)
    images, labels = scans()
    for split, cut in CUT.items():
        own = {images[i].tobytes(): int(labels[i]) for i in range(*cut.indices(len(images)))}
        for qid in data.splits[split]:
            if qid in data.strips:
                tiles = [np.ascontiguousarray(t) for t in np.split(data.strips[qid], 3, axis=1)]
                assert tuple(own[tile.tobytes()] for tile in tiles) == data.digits[qid]


def test_strips_are_pictures_in_range(data):
    for strip in data.strips.values():
        assert strip.shape == (8, 24)
        assert strip.dtype == np.float32
        assert 0 <= strip.min() <= strip.max() <= 1


def answer(raw, digits) -> str:
    """The right answer, worked out from the question's text and the true digits alone."""
    family, question = raw["category"], raw["question"]
    if family == "even":
        return str(sum(d % 2 == 0 for d in digits))
    seen = dict(zip(POSITIONS, digits or (), strict=False))
    named = [seen.get(w, w) for w in re.findall(r"left|middle|right|\d", question)]
    values = [int(v) for v in named]
    if "plus" in question:
        return str(sum(values))
    if "larger" in question or "smaller" in question:
        return str(max(values) if "larger" in question else min(values))
    if "code" in question:
        return dict(re.findall(rf"(\d) ([{CODES}])", raw["hint"]))[str(values[0])]
    return str(values[0])


def test_answers_are_right_and_rationales_say_why(data):
    for qid, raw in rows(data):
        digits = data.digits.get(qid)
        right = answer(raw, digits)
        assert raw["choices"][raw["answer"]] == right
        stated = facts(raw["solution"])
        assert stated.conclusion == right
        assert stated.digits == (dict(zip(POSITIONS, digits, strict=True)) if digits else {})
        assert stated.used.items() <= stated.digits.items()


def test_the_text_alone_does_not_give_the_answer(data):
    """A linear model of words, values and their positions among the options stays at chance."""

    def texts(split):
        for qid in data.splits[split]:
            raw = data.problems[qid]
            if raw["image"]:
                start = f"{raw['question']} {raw['hint']} "
                options = [
                    f"{start} is_{i} value_{c} family_{raw['category']}_{c} rank_"
                    + str(sorted(raw["choices"]).index(c))
                    for i, c in enumerate(raw["choices"])
                ]
                yield options, raw["answer"]

    train, test = list(texts("train")), list(texts("val")) + list(texts("test"))
    counts = CountVectorizer(token_pattern=r"\S+", ngram_range=(1, 2))
    x = counts.fit_transform([o for options, _ in train for o in options])
    y = [i == right for options, right in train for i in range(len(options))]
    model = LogisticRegression(max_iter=300).fit(x, y)
    hits = [
        model.decision_function(counts.transform(options)).argmax() == right
        for options, right in test
    ]
    chance = np.mean([1 / len(options) for options, _ in test])
    assert 0.24 < chance < 0.28
    assert abs(np.mean(hits) - chance) < 3 * np.sqrt(chance * (1 - chance) / len(hits))


def test_positions_of_the_right_option_are_uniform(data):
    for count in (3, 4, 5):
        where = [r["answer"] for _, r in rows(data, image=True) if len(r["choices"]) == count]
        shares = np.bincount(where, minlength=count) / len(where)
        assert np.abs(shares - 1 / count).max() < 0.06


def test_draws_follow_the_seed_and_splits_do_not_depend_on_each_other():
    a, b, c = digits_qa(20, 10, 10), digits_qa(50, 10, 10), digits_qa(20, 10, 10, seed=1)
    assert a.problems == {q: r for q, r in b.problems.items() if q in a.problems}
    assert a.problems != c.problems
    assert all(np.array_equal(a.strips[q], b.strips[q]) for q in a.strips)


def test_weights_choose_the_families_of_training():
    data = digits_qa(200, 12, 0, weights=dict.fromkeys(FAMILIES[1:], 0))
    assert {data.problems[q]["category"] for q in data.splits["train"]} == {"read"}
    assert {data.problems[q]["category"] for q in data.splits["val"]} == set(FAMILIES)
    with pytest.raises(ValueError, match="no family"):
        digits_qa(1, 1, 1, weights={"chess": 1})
    with pytest.raises(ValueError, match="-1 questions"):
        digits_qa(-1)


GOLD = "left 3, middle 7, right 1. middle 7, row 7 K, so K."


def test_facts_of_a_rationale():
    found = facts(GOLD)
    assert found.digits == {"left": 3, "middle": 7, "right": 1}
    assert found.used == {"middle": 7}
    assert found.conclusion == "K"
    assert facts("Solution: left 3, middle 7, right 1. middle 7, so 7.").digits["left"] == 3


@pytest.mark.parametrize("text", ["", ".", "so", "left", "left x, so .", "ü 7 left -"])
def test_facts_of_nonsense_are_none(text):
    found = facts(text)
    assert not found.digits
    assert not found.used
    assert found.conclusion is None


@pytest.mark.parametrize(
    ("written", "choice", "error"),
    [
        (GOLD, 2, None),
        ("nonsense", 2, None),  # right is right
        ("left 3, middle 9, right 1. middle 9, row 9 F, so F.", 1, "perception"),
        ("left 8, middle 7, right 1. middle 7, row 7 F, so F.", 1, "reasoning"),
        ("left 3, middle 7, right 1. left 3, row 3 F, so F.", 1, "reasoning"),
        (GOLD, 1, "option mapping"),
        (GOLD, None, "format"),
        ("left 3, middle 7, right 1. middle 7,", 1, "format"),
        ("", None, "format"),
    ],
)
def test_an_error_is_put_down_to_the_step_that_failed(data, written, choice, error):
    record = next(Record.from_json(q, p) for q, p in data.problems.items() if p["answer"] == 2)
    assert classify_error(record, GOLD, written, choice, facts) == error


# varied questions


@pytest.fixture(scope="module")
def varied() -> DigitsQA:
    return digits_qa(3000, 0, 0, varied=0.5, reworded=600)


def test_varying_leaves_the_published_splits_as_they_are(data) -> None:
    other = digits_qa(100, 300, 300, varied=0.5, reworded=10)
    for split in ("val", "test"):
        assert other.splits[split] == data.splits[split]
        for qid in data.splits[split]:
            assert other.problems[qid] == data.problems[qid]
    assert "reworded" not in data.splits


def test_varied_questions_have_other_counts_of_options_and_of_digits(varied) -> None:
    reworded = [(varied.problems[q], varied.digits.get(q)) for q in varied.splits["reworded"]]
    assert {len(raw["choices"]) for raw, _ in reworded} == set(range(2, 9))
    assert {len(digits) for _, digits in reworded if digits} == {1, 2, 3, 4}
    for raw, digits in reworded:
        Record.from_json("one", raw)
        assert len(set(raw["choices"])) == len(raw["choices"])
        stated = facts(raw["solution"])
        assert stated.conclusion == raw["choices"][raw["answer"]]
        assert stated.digits == (
            dict(zip(PLACES[len(digits)], digits, strict=True)) if digits else {}
        )
        assert stated.used.items() <= stated.digits.items()
        assert not false_steps(raw["solution"], raw["hint"])
    images, _ = scans()
    own = {images[i].tobytes() for i in range(*CUT["val"].indices(len(images)))}
    for qid in varied.splits["reworded"]:
        if (strip := varied.strips.get(qid)) is not None:
            tiles = np.split(strip, strip.shape[1] // 8, axis=1)
            assert own.issuperset(np.ascontiguousarray(tile).tobytes() for tile in tiles)


def test_training_is_in_the_published_words_and_the_rest_is_not(varied) -> None:
    own = re.compile(
        r"(What is (the digit|the \w+ digit|\w+ plus \w+)|Which (digit is|code has)|How many).*\?"
    )
    train = [varied.problems[q] for q in varied.splits["train"]]
    assert all(own.fullmatch(raw["question"]) for raw in train)
    assert {len(raw["choices"]) for raw in train} == set(range(2, 9))
    free = [varied.problems[q]["question"] for q in varied.splits["reworded"]]
    assert np.mean([bool(own.fullmatch(text)) for text in free]) < 0.3
    with pytest.raises(ValueError, match="a share"):
        digits_qa(1, varied=1.5)


def test_numbers_are_read_in_words() -> None:
    read = [read_number(word) for word in ("zero", "Seven", "NINETEEN", "7", "left", "ones")]
    assert read == ["0", "7", "19", "7", "left", "ones"]


@pytest.mark.parametrize(
    ("rationale", "hint", "false"),
    [
        ("left 3, right 4. left 3 plus right 4 is 7, so 7.", "", None),
        ("left 3, right 4. left 3 plus right 4 is 8, so 8.", "", "3 plus 4 is 8"),
        ("left 3, right 4. left 3 plus right 4 is 7, so 8.", "", "so 8"),
        ("3 plus 4 is 6, so 6.", "", "3 plus 4 is 6"),
        ("left 3, right 4. left 3, so 3.", "", None),
        ("left 3, right 4. left 3, so 4.", "", "3, so 4"),
        ("left 3, middle 4. left 3, middle 4, larger 4, so 4.", "", None),
        ("left 3, middle 4. left 3, middle 4, larger 3, so 3.", "", "larger 3"),
        ("3, 4, smaller 4, so 4.", "", "smaller 4"),
        ("left 3, right 4. left 3 odd, right 4 even, so 1.", "", None),
        ("left 3, right 4. left 3 even, right 4 even, so 2.", "", "3 is even"),
        ("left 3, right 4. left 3 odd, right 4 even, so 2.", "", "2 of 2 are even"),
        ("left 3. left 3, row 3 K, so K.", "Code table: 3 K, 7 F.", None),
        ("left 3. left 3, row 3 F, so F.", "Code table: 3 K, 7 F.", "row 3 F"),
        ("left 3. left 3, row 3 K, so F.", "Code table: 3 K, 7 F.", "so F"),
        ("nonsense", "", None),
    ],
)
def test_steps_that_do_not_hold(rationale: str, hint: str, false: str | None) -> None:
    found = false_steps(rationale, hint)
    assert len(found) == (false is not None)
    assert false is None or false in found[0]
