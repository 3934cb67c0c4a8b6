from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.data.records import LETTERS, Record
from modgraft.data.text import (
    FORMS,
    Form,
    extract_answer,
    find_form,
    gold_rationale,
    options_text,
    rationale_of,
)
from questions import SAMPLE, needs_sample, record

# The table worked out by hand for three questions of our own: hint and caption, neither, caption.
HEADS = {
    "11": "Question: Which one floats? Context: Tom puts three things in water. A bowl of water. "
    "Options: (A) a stone (B) a cork (C) a nail",
    "12": "Question: Is this a verb: run? Context: N/A Options: (A) yes (B) no",
    "13": "Question: Which is further north? Context: A map of two continents. "
    "Options: (A) Rome (B) Oslo (C) Cairo (D) Lagos",
}
CUES = {
    "QCM-A": "Answer:",
    "QCM-LE": "Solution:",
    "QCM-E": "Solution:",
    "QCMG-A": "Solution: because so. Answer:",
    "QCM-LEA": "Solution:",
    "QCM-EA": "Solution:",
    "QCM-ALE": "Solution:",
    "QCM-VA": "Answer:",
    "QCMG-VA": "Solution: because so. Answer:",
    "QCM-EVA": "Solution:",
}
TARGETS = {
    "11": {
        "QCM-A": "The answer is (B).",
        "QCM-LE": "Solution: Light things float. Heavy ones sink. A cork is light..",
        "QCM-E": "Solution: A cork is light.",
        "QCMG-A": "The answer is (B).",
        "QCM-LEA": "Light things float. Heavy ones sink. A cork is light. The answer is (B).",
        "QCM-EA": "A cork is light. The answer is (B).",
        "QCM-ALE": "The answer is (B). BECAUSE: Light things float. Heavy ones sink. "
        "A cork is light.",
        "QCM-VA": "a cork . The answer is (B) .",
        "QCMG-VA": "a cork . The answer is (B) .",
        "QCM-EVA": "A cork is light. a cork . The answer is (B) .",
    },
    "12": {
        "QCM-A": "The answer is (A).",
        "QCM-LE": "Solution: To run is to do something..",
        "QCM-E": "Solution: To run is to do something.",
        "QCMG-A": "The answer is (A).",
        "QCM-LEA": "To run is to do something. The answer is (A).",
        "QCM-EA": "To run is to do something. The answer is (A).",
        "QCM-ALE": "The answer is (A). BECAUSE: To run is to do something.",
        "QCM-VA": "yes . The answer is (A) .",
        "QCMG-VA": "yes . The answer is (A) .",
        "QCM-EVA": "To run is to do something. yes . The answer is (A) .",
    },
    "13": {
        "QCM-A": "The answer is (B).",
        "QCM-LE": "Solution: North is up on a map. .",
        "QCM-E": "Solution:",
        "QCMG-A": "The answer is (B).",
        "QCM-LEA": "North is up on a map. The answer is (B).",
        "QCM-EA": "The answer is (B).",
        "QCM-ALE": "The answer is (B). BECAUSE: North is up on a map.",
        "QCM-VA": "Oslo . The answer is (B) .",
        "QCMG-VA": "Oslo . The answer is (B) .",
        "QCM-EVA": "Oslo . The answer is (B) .",
    },
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("qid", HEADS)
def test_every_string_of_the_table(qid: str, name: str) -> None:
    form = FORMS[name]
    rationale = "because\n so." if form.reads_rationale else None
    assert form.input(record(qid), rationale) == f"{HEADS[qid]} {CUES[name]}"
    assert form.target(record(qid)) == TARGETS[qid][name]


@needs_sample
@pytest.mark.parametrize("qid", ["1", "6", "13"])
def test_every_string_of_the_table_on_the_sample(qid: str) -> None:
    raw = json.loads((SAMPLE / "problems.json").read_text())[qid]
    caption = json.loads((SAMPLE / "captions.json").read_text())["captions"].get(qid, "")
    one = Record.from_json(qid, raw, caption=caption)
    q, le, e = raw["question"], f"{raw['lecture']} {raw['solution']}", raw["solution"]
    c = f"{raw['hint']} {caption}".strip() or "N/A"
    m = " ".join(f"({'ABCDE'[i]}) {text}" for i, text in enumerate(raw["choices"]))
    b = "ABCDE"[raw["answer"]]
    head = f"Question: {q}\nContext: {c}\nOptions: {m}\n"
    table = {
        "QCM-A": (f"{head}Answer:", f"The answer is ({b})."),
        "QCM-LE": (f"{head}Solution:", f"Solution: {le}."),
        "QCM-E": (f"{head}Solution:", f"Solution: {e}"),
        "QCMG-A": (f"{head}Solution: {le}\nAnswer:", f"The answer is ({b})."),
        "QCM-LEA": (f"{head}Solution:", f"{le} The answer is ({b})."),
        "QCM-EA": (f"{head}Solution:", f"{e} The answer is ({b})."),
        "QCM-ALE": (f"{head}Solution:", f"The answer is ({b}). BECAUSE: {le}"),
    }
    for name, (text, target) in table.items():
        rationale = le if name == "QCMG-A" else None
        assert FORMS[name].input(one, rationale) == " ".join(text.split()), name
        assert FORMS[name].target(one) == " ".join(target.split()), name


def test_braces_in_a_record_are_text() -> None:
    odd = record("11", question="What is {answer} {0}?", choices=["{", "}", "{}"])
    assert FORMS["QCM-A"].input(odd).startswith("Question: What is {answer} {0}? Context:")


def test_a_rationale_is_handed_over_without_its_cue() -> None:
    written = FORMS["QCM-LE"].target(record("11"))
    assert written.startswith("Solution: Light")
    text = FORMS["QCMG-A"].input(record("11"), written)
    assert text.count("Solution:") == 1
    assert FORMS["QCMG-A"].input(record("11"), "Solution : x").endswith("Solution: x Answer:")


@pytest.mark.parametrize(
    ("name", "rationale"),
    [
        ("QCM-LE", "Light things float. Heavy ones sink. A cork is light.."),
        ("QCM-E", "A cork is light."),
        ("QCM-LEA", "Light things float. Heavy ones sink. A cork is light."),
        ("QCM-EA", "A cork is light."),
        ("QCM-ALE", "Light things float. Heavy ones sink. A cork is light."),
        ("QCM-EVA", "A cork is light. a cork ."),
        ("QCM-A", ""),
    ],
)
def test_gold_rationale_of_each_form(name: str, rationale: str) -> None:
    assert gold_rationale(record("11"), FORMS[name]) == rationale


def test_rationale_of_a_text_without_an_answer_is_the_text() -> None:
    assert rationale_of("A cork is", FORMS["QCM-EA"]) == "A cork is"


def test_a_second_stage_wants_a_rationale_and_a_first_one_does_not() -> None:
    with pytest.raises(DataError, match=r"question '11': form QCMG-A reads a rationale and got no"):
        FORMS["QCMG-A"].input(record("11"))
    with pytest.raises(DataError, match=r"form QCM-A has no place for a rationale.*QCMG-A"):
        FORMS["QCM-A"].input(record("11"), "x")


def test_unknown_form_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="no text form is named 'QCM-X'; there are: 'QCM-A'"):
        find_form("QCM-X")
    mine = Form("mine", "{question}", "{letter}")
    assert find_form(mine) is mine


FIVE = ("v", "w", "x", "y", "z")


@pytest.mark.parametrize(
    ("text", "choices", "choice"),
    [
        ("The answer is (B).", FIVE, 1),
        ("so 5 . The answer is ( C ) .", FIVE, 2),
        ("x. The answer is(E)", FIVE, 4),
        ("The answer is (C).", FIVE[:2], None),  # not among the actual choices
        ("The answer is (Z).", FIVE, None),
        ("The answer is B.", FIVE, None),
        ("The answer is (b).", FIVE, None),
        ("(B)", FIVE, None),
        ("", FIVE, None),
        ("The answer is (A). BECAUSE: The answer is (B).", FIVE, None),  # which of them?
        ("The answer is (A). BECAUSE: The answer is (A).", FIVE, 0),
    ],
)
def test_extract_answer(text: str, choices: tuple[str, ...], choice: int | None) -> None:
    assert extract_answer(text, choices) == choice


@given(st.data(), st.integers(2, 26), st.sampled_from(sorted(set(FORMS))))
def test_extraction_is_the_inverse_of_rendering(data: st.DataObject, count: int, name: str) -> None:
    answer = data.draw(st.integers(0, count - 1))
    text = st.text(alphabet="ab (A){}.\n", min_size=1, max_size=8)
    choices = data.draw(st.lists(text, min_size=count, max_size=count))
    solution = data.draw(st.text(max_size=30))
    one = record("11", choices=choices, answer=answer, solution=solution)
    form = FORMS[name]
    assert extract_answer(form.target(one), one.choices) == (answer if form.writes_answer else None)
    assert f"({LETTERS[count - 1]}) " in f"{options_text(one.choices)} "
