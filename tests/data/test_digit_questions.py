"""Freely worded questions are put in DigitsQA's words, or are none of its questions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modgraft.data.digit_questions import restated, unread
from modgraft.data.digit_wordings import PLACES, TEMPLATES, free_words, own_words
from modgraft.data.digits import digits_qa

TABLE = "Code table: 3 Q, 7 K, 9 L."


def test_a_question_in_its_own_words_is_left_as_it_is() -> None:
    made = digits_qa(600, 120, 120, varied=0.5)
    for qid, raw in made.problems.items():
        count = len(made.digits.get(qid, "abc"))
        assert restated(raw["question"], raw["hint"], count) == raw["question"]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["read", "compare", "add", "lookup", "even"])
def test_whatever_the_wording_no_question_becomes_another(family: str, count: int) -> None:
    rng, needs = np.random.default_rng(count), {"compare": 2, "add": 2, "even": 0}.get(family, 1)
    if needs > count:
        return
    found = []
    for _ in range(400):
        compared = ("larger", "smaller")[int(rng.integers(2))]
        asked: list[Any] = [int(i) for i in rng.permutation(count)[:needs]]
        names = [PLACES[count][place] for place in sorted(asked)]
        if family in ("compare", "add", "lookup") and rng.random() < 0.3:
            asked = names = [str(i) for i in rng.permutation(10)[:needs]]
        kind = "single" if (family, count) == ("read", 1) else family
        text = free_words(rng, kind, asked, count, compared)
        read = restated(text, TABLE, count)
        assert read in (None, own_words(kind, names, compared)), text
        found.append(read is not None)
    assert np.mean(found) > (0.99 if count > 1 else 0.8)  # one digit is no second one


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("WHAT IS THE LEFTMOST DIGIT", "What is the left digit?"),
        ("second digit from the right", "What is the middle digit?"),
        ("what's the 3rd number, counting from the left?", "What is the right digit?"),
        ("The sum of the first two numbers, please", "What is left plus middle?"),
        ("Which is bigger: the outer digits?", "Which digit is larger, left or right?"),
        ("What do you get if you add one and two?", "What is 1 plus 2?"),
        ("Of nine and three, which one is less?", "Which digit is smaller, 9 or 3?"),
        ("What does the right digit stand for?", "Which code has the right digit?"),
        ("Which letter is assigned to the central digit?", "Which code has the middle digit?"),
        ("Which number is to be seen on the far right?", "What is the right digit?"),
        ("the digit farthest to the left", "What is the left digit?"),
        ("What is the right-hand numeral?", "What is the right digit?"),
        ("What do the first and the last digit make?", "What is left plus right?"),
        ("How many evens are there?", "How many digits are even?"),
        ("How much is three plus four", "What is 3 plus 4?"),
    ],
)
def test_what_is_read(text: str, read: str) -> None:
    assert restated(text, TABLE) == read


@pytest.mark.parametrize(
    "text",
    [
        "What is the left digit minus the right?",
        "Which digit is not on the left?",
        "Which digit is to the left of the right one?",
        "Is the left digit even?",
        "Are there an even number of digits?",
        "By how much is left larger, compared to right?",
        "What is left less right?",
        "What do I add to left to get right?",
        "What is twice the left digit?",
        "the digit following the left one",
        "the last but one digit",
        "How many digits are odd?",
        "How many digits aren't even?",
        "How many digits are there?",
        "sum of all digits",
        "What is the largest digit?",
        "Which of the three digits is smallest?",
        "What are the left and right digits?",
        "What is the code of the sum of left and right?",
        "Is left a 3?",
        "What is left plus 3?",
        "What is the right answer?",
        "Which is larger, the sum of left and right or 9?",
        "What is the digit between left and right?",
        "Which code does not belong to the left digit?",
        "What is the fourth digit?",
        "What is -3 plus 5?",
        "3! plus 5",
        "Which is larger, 3 or .5?",
        "What is the first code in the table?",
        "Which digit is farthest from the left?",
        "How many digits are left?",
        "How many digits equal the left one?",
        "Count the digits on the left",
        "What is left plus right plus left?",
        "How much is the right digit when the left one is taken from it?",
        "How much is right from left?",
        "How much is left by right?",
        "At which position is the right digit?",
        "Which number do the digits make, read from the left?",
        "How many even numbers can you make with the digits?",
        "Was it written with the left hand?",
        "",
    ],
)
def test_what_is_none_of_its_questions(text: str) -> None:
    assert restated(text, TABLE) is None


def test_a_code_needs_a_table_and_a_place_the_count() -> None:
    assert restated("Which code has the left digit?") is None
    assert restated("What is the second digit?", count=4) == "What is the second digit?"
    assert restated("What is the second digit?", count=2) == "What is the right digit?"
    assert restated("What is the digit?", count=1) == own_words("single", ())
    assert restated("What is the middle digit?", count=2) is None
    assert unread("What is the topmost digit times two?") == ["topmost", "times"]


def test_templates_are_there_once() -> None:
    for family, templates in TEMPLATES.items():
        assert len(set(templates)) == len(templates) > 10, family


@pytest.mark.parametrize(
    ("text", "count", "read"),
    [
        ("Which one is bigger?", 2, "Which digit is larger, left or right?"),
        ("of the two digits, which is the greater", 2, "Which digit is larger, left or right?"),
        ("Add both numbers together", 2, "What is left plus right?"),
        ("whats the sum of the two numbers?", 2, "What is left plus right?"),
        ("What is two plus three?", 2, "What is 2 plus 3?"),
        ("Which code has the digit in the picture?", 1, "Which code has the middle digit?"),
        ("the sum of the two middle digits", 4, "What is second plus third?"),
        ("What is digit number two?", 3, "What is the middle digit?"),
        ("Which one is bigger?", 3, None),
        ("What is digit 3?", 3, None),
    ],
)
def test_the_digits_of_a_short_strip_need_no_name(text: str, count: int, read: str | None) -> None:
    assert restated(text, TABLE, count) == read
