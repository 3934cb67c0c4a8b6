from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.digits import digits_qa, facts
from modgraft.data.records import Questions
from modgraft.recipes.mmcot.metrics import (
    accuracy_by_column,
    bleu,
    classify_error,
    evaluate_predictions,
    facts_right,
    grade_answer,
    rouge_l,
    write_predictions,
)
from modgraft.report.run import Prediction, read_run
from questions import record

# subject, grade, hint, image; which of them is answered right is said in each test
SIX = [
    record("12", id="a", subject="natural science", grade="grade1", hint="h", image=None),
    record("12", id="b", subject="natural science", grade="grade6", hint="", image="image.png"),
    record("12", id="c", subject="natural science", grade="grade7", hint="h", image="image.png"),
    record("12", id="d", subject="social science", grade="grade12", hint="", image=None),
    record("12", id="e", subject="social science", grade="grade10", hint="", image="image.png"),
    record("12", id="f", subject="language science", grade="grade2", hint="", image=None),
]


def test_columns_worked_out_by_hand() -> None:
    right = {"a": True, "b": False, "c": True, "d": True, "e": False, "f": False}
    assert accuracy_by_column(SIX, right) == {
        "NAT": pytest.approx(200 / 3),  # a, b, c: two of three
        "SOC": 50.0,  # d, e
        "LAN": 0.0,  # f
        "TXT": 100.0,  # a, c have a hint
        "IMG": pytest.approx(100 / 3),  # b, c, e have an image: c alone is right
        "NO": 50.0,  # d, f have neither
        "G1-6": pytest.approx(100 / 3),  # a, b, f
        "G7-12": pytest.approx(200 / 3),  # c, d, e
        "Avg": 50.0,
    }


def test_a_column_of_nothing_is_none() -> None:
    columns = accuracy_by_column(SIX[:1], {"a": True})
    assert columns["SOC"] is None
    assert columns["IMG"] is None
    assert columns["G7-12"] is None
    assert columns["TXT"] == 100.0


def test_a_grade_that_is_none_is_in_no_grade_column() -> None:
    columns = accuracy_by_column([record("12", id="k", grade="kindergarten")], {"k": True})
    assert columns["G1-6"] is columns["G7-12"] is None
    assert columns["Avg"] == 100.0


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_the_average_is_that_of_disjoint_columns(right: list[bool]) -> None:
    columns = accuracy_by_column(SIX, {r.id: x for r, x in zip(SIX, right, strict=True)})
    by_subject = sum((columns[k] or 0) * n for k, n in (("NAT", 3), ("SOC", 2), ("LAN", 1))) / 6
    assert columns["Avg"] == pytest.approx(by_subject)


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "the cat mat" of 3; precision 3/4, recall 3/6
    value = rouge_l("the cat sat on the mat", "the cat, a Mat!")
    assert value == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert rouge_l("the cats", "the cat") == pytest.approx(1 / 2)  # no stemming


def test_bleu_by_hand() -> None:
    gold, written = "a b c d e.", "a b c x"
    assert bleu(gold, written, 1) == pytest.approx(math.exp(1 - 5 / 4) * 3 / 4)
    assert bleu(gold, "a a a a a", 1) == pytest.approx(1 / 5)  # clipped: one "a" counts
    assert bleu(gold, written, 4) == 0.0  # no common four words
    assert bleu(gold, "a.b c\nd e", 4) == pytest.approx(1.0)
    assert bleu(gold, "", 1) == 0.0


words = st.text(alphabet="ab .", max_size=24)


@given(words.filter(lambda t: t.strip(" .")), words.filter(lambda t: t.strip(" .")))
def test_bleu_is_nltks(gold: str, written: str) -> None:
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    a, b = ([w for w in re.split(r"\s|\.", text) if w] for text in (gold, written))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns of zero counts
        ones, fours = (bleu_score.sentence_bleu([a], b, w) for w in [(1.0,), (0.25,) * 4])
    assert bleu(gold, written, 1) == pytest.approx(ones, abs=1e-9)
    assert bleu(gold, written, 4) == pytest.approx(fours, abs=1e-9)


@dataclass
class Said:
    digits: dict[str, int] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    conclusion: str | None = None


def read(text: str) -> Said:
    """Facts of "left 3 right 4 | left 3 | so 3"."""
    stated, used, end = [*text.split("|"), "", ""][:3]
    pairs = [{p: int(d) for p, d in re.findall(r"(\w+) (\d)", s)} for s in (stated, used)]
    found = re.search(r"so (\w+)", end)
    return Said(pairs[0], pairs[1], found[1] if found else None)


GOLD = "left 3 right 4 | left 3 | so 3"


@pytest.mark.parametrize(
    ("written", "choice", "error"),
    [
        (GOLD, 0, None),
        ("nonsense", 0, None),  # right is right
        (GOLD, None, "format"),
        ("left 5 right 4 | left 5 | so 5", None, "format"),
        ("left 3 right 4 | left 3", 1, "format"),  # no conclusion
        ("left 5 right 4 | left 5 | so 5", 1, "perception"),
        ("right 4 | | so 5", 1, "perception"),  # the digit is not stated at all
        ("left 3 right 9 | left 3 | so 3", 1, "option mapping"),  # the other digit is not needed
        ("left 3 right 4 | left 3 | so 4", 1, "reasoning"),
        (GOLD, 1, "option mapping"),
    ],
)
def test_classes_of_error(written: str, choice: int | None, error: str | None) -> None:
    assert classify_error(record("12"), GOLD, written, choice, read) == error


def test_without_facts_only_the_format_can_be_told() -> None:
    assert classify_error(record("12"), GOLD, GOLD, 1, None) is None
    assert classify_error(record("12"), None, None, 1, read) is None
    assert classify_error(record("12"), None, None, None, None) == "format"


def test_all_digits_count_where_none_is_singled_out() -> None:
    gold = "left 3 right 4 | | so 1"
    assert classify_error(record("12"), gold, "left 3 right 5 | | so 2", 1, read) == "perception"
    assert classify_error(record("12"), gold, "left 3 right 4 | | so 2", 1, read) == "reasoning"


def test_facts_right_by_hand() -> None:
    assert facts_right(read(GOLD), read("left 3 right 5 | | so 3")) == (2, 3)
    assert facts_right(read(GOLD), read("")) == (0, 3)
    assert facts_right(read(""), read(GOLD)) == (0, 0)


def predictions() -> list[Prediction]:
    texts = {"a": "(A)", "b": "The answer is (B).", "c": "The answer is (A)."}
    return [
        grade_answer(one, texts[one.id], rationale=r, gold_rationale=GOLD, facts=read)
        for one, r in zip(SIX[:3], [GOLD, "left 9 right 4 | left 9 | so 9", GOLD], strict=True)
    ]


def test_exact_is_up_to_white_space() -> None:
    """A tokenizer of whole words writes "so 3." where a template has "so 3 ."."""
    made = [grade_answer(SIX[0], "", rationale="left 3, so 3.", gold_rationale="left 3 , so  3 .")]
    assert evaluate_predictions(made, SIX[:1])["exact"] == 100.0


def test_evaluate_predictions_by_hand() -> None:
    made = predictions()
    got = evaluate_predictions(made[::-1], SIX[:3], facts=read)
    assert got["accuracy"] == pytest.approx(100 / 3)
    assert got["image"] == 50.0
    assert got["text"] == 0.0
    assert got["columns"]["SOC"] is None
    assert got["families"] == {"Word study": pytest.approx(100 / 3)}
    assert got["exact"] == pytest.approx(200 / 3)
    assert got["facts"] == pytest.approx(700 / 9)  # 3 + 1 + 3 of 3 each
    # words: left 3 right 4 left 3 so 3 against left 9 right 4 left 9 so 9: five of eight in order
    assert got["rouge_l"] == pytest.approx(100 * (1 + 5 / 8 + 1) / 3)
    assert got["errors"] == {"perception": 1, "reasoning": 0, "option mapping": 0, "format": 1}
    assert (got["unclassified"], got["n"]) == (0, 3)
    few = evaluate_predictions(made, SIX[:3], columns=("IMG", "Avg"))
    assert few["columns"] == {"IMG": 50.0, "Avg": got["accuracy"]}
    guess = [100 / len(r.choices) for r in SIX[:3]]
    assert few["chance"] == {  # b and c have an image
        "IMG": pytest.approx(sum(guess[1:]) / 2), "Avg": pytest.approx(sum(guess) / 3)
    }  # fmt: skip
    assert got["chance"]["SOC"] is None


def test_what_was_not_measured_is_none() -> None:
    made = [grade_answer(one, "The answer is (A).") for one in SIX]
    got = evaluate_predictions(made, SIX)
    assert got["accuracy"] == 100.0
    for name in ("rouge_l", "bleu_1", "bleu_4", "exact", "facts"):
        assert got[name] is None, name


def test_a_rationale_that_was_not_written_scores_nothing() -> None:
    one = grade_answer(SIX[0], "", rationale="", gold_rationale="left 3")
    got = evaluate_predictions([one], SIX[:1], facts=read)
    assert (got["rouge_l"], got["exact"], got["facts"]) == (0.0, 0.0, 0.0)


def test_predictions_and_questions_must_be_the_same() -> None:
    made = predictions()
    with pytest.raises(DataError, match=r"question 'c': the question has no prediction"):
        evaluate_predictions(made[:2], SIX[:3])
    with pytest.raises(DataError, match=r"question 'c': a prediction for an unknown question"):
        evaluate_predictions(made, SIX[:2])
    with pytest.raises(DataError, match=r"question 'a': the question has several predictions"):
        evaluate_predictions([*made, made[0]], SIX[:3])


def test_predictions_are_written_and_read(tmp_path: Path) -> None:
    file = tmp_path / "seed0" / "fused" / "predictions.jsonl"
    made = predictions()
    write_predictions(file, made)
    assert read_run(tmp_path).predictions["fused"][0] == made
    assert [p.name for p in file.parent.iterdir()] == ["predictions.jsonl"]
    assert list(json.loads(file.read_text().partition("\n")[0])) == [
        "id", "category", "question", "choices", "answer", "image", "gold_rationale",
        "rationale", "text", "choice", "correct", "error",
    ]  # fmt: skip
    file.write_text(file.read_text() + '{"id": "z"}\n')
    with pytest.raises(DataError, match=r"line 4: question: Field required .*'id': 'z'"):
        read_run(tmp_path)
    file.write_text("{\n")
    with pytest.raises(DataError, match=r"line 1: not JSON"):
        read_run(tmp_path)
    with pytest.raises(MissingFileError, match="Train first"):
        read_run(tmp_path / "seed0" / "fused")


def test_digits_qa_rationales_have_facts_and_classes() -> None:
    questions = Questions.from_json(digits_qa(train=0, val=0, test=60).problems)
    assert len({r.category for r in questions}) == 6
    for one in questions:
        gold, wrong = one.solution, (one.answer + 1) % len(one.choices)
        right, total = facts_right(facts(gold), facts(gold))
        assert right == total == (4 if one.image else 1)  # three digits and the conclusion
        assert classify_error(one, gold, gold, wrong, facts) == "option mapping"
        head, _, _ = gold.rpartition(", so ")
        assert classify_error(one, gold, f"{head}, so Q.", wrong, facts) == "reasoning"
        assert classify_error(one, gold, head, wrong, facts) == "format"
        if one.image:
            blind = re.sub(r"(left|middle|right) \d", r"\1 77", gold)
            assert classify_error(one, gold, blind, wrong, facts) == "perception"
