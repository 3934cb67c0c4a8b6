"""Forty questions about the real notes, their answers worked out by reading them.

Twenty have an exact answer: the lines are the whole answer, in order. Ten are free: one of the
lines named here must be among the first five. Ten have none, and the reason given must be true.
The notes are committed at four dates in a repository of the test's own:

    2023-02-27  the draft of week 9         2023-03-01  its note, and modular_deep_learning
    2023-02-10  multimodal_cot              2023-03-08  gpt
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

import pytest

from log.real_notes import commit, copy_notes, needs_notes
from modgraft.log import Log
from modgraft.log.ask.ask import ROUTES, Route, route
from modgraft.log.ask.names import names_of
from modgraft.log.ask.question import parse_question
from modgraft.log.index.vectors import VectorsOffError, package_folder

TODAY = date(2023, 3, 10)
COMMITS = {
    "2023-02-10T09:00:00+0000": ["multimodal_cot.md", "zotero.bib"],
    "2023-02-27T09:00:00+0000": ["2023w9_draft.md"],
    "2023-03-01T09:00:00+0000": ["2023w9.md", "modular_deep_learning.md"],
    "2023-03-08T09:00:00+0000": ["gpt.md"],
}
SHORT = {"w9": "2023w9.md", "draft": "2023w9_draft.md", "mdl": "modular_deep_learning.md"}
SHORT |= {"cot": "multimodal_cot.md", "gpt": "gpt.md"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    if not needs_notes.args[0]:
        folder = tmp_path_factory.mktemp("notes")
        for at, names in COMMITS.items():
            copy_notes(folder, *names)
            commit(folder, at)
        with Log.open(folder) as log:
            log.index()
            yield log
    else:
        pytest.skip(needs_notes.kwargs["reason"])


def places(text: str) -> list[tuple[str, int]]:
    """``w9:24 29, mdl:23`` as notes and lines; ``a-b`` is a stretch."""
    found = []
    for part in filter(None, text.split(",")):
        note, _, lines = part.strip().partition(":")
        for line in lines.split():
            first, _, last = line.partition("-")
            found += [(SHORT[note], n) for n in range(int(first), int(last or first) + 1)]
    return found


#: question → the start of the answer's text, and every line of its evidence
EXACT = {
    # structured
    "which papers did I mark for full reading?": (
        "7 skims marked for full reading.",
        "w9:24-28 54-57 64-67 72-74 75-77 108-111 118-119",
    ),
    "which papers am I still digging into?": (
        "7 skims marked for digging.",
        "w9:50-52 69-71 97-100 101-104 113-115 116-117 123-125",
    ),
    "what do I still owe a full read?": (
        "6 to read in full, 7 to dig deeper.",
        "w9:54 64 72 75 108 118 50 69 97 101 113 116 123",
    ),
    "how many papers did I skim in 2023w9?": (
        "28 skims in 2023w9.md.",
        "w9:24 29 33 50 54 58 64 68 69 72 75 78 81 85 91 93 97 101 105 108 113 116 118 120 123 126 "
        "129 132",
    ),
    "which of my questions are still open?": (
        "9 open questions, 7 of them distinct.",
        "mdl:16 17 40 52 73 82 110 111 124",
    ),
    "which questions have been answered?": ("1 answered question.", "mdl:66 67"),
    "list the lessons in gpt.md": ("3 lessons in gpt.md.", "gpt:92 107 127"),
    "what interruptions did I have?": ("2 interruptions.", "mdl:83-87 102-110"),
    "what code did I write in gpt?": ("2 pieces of code in gpt.md.", "gpt:128 129"),
    "what is the tl;dr of modular_deep_learning?": ("tl;dr of modular_deep_learning.md", "mdl:2"),
    "have I read @rebuffiLearningMultipleVisual2017?": (
        "No: it was skimmed, and nothing more was decided, at 2023w9.md:68, 2023-03-01 09:00.",
        "w9:68",
    ),
    "did I read the Modular Deep Learning paper?": (
        "Yes: it was read, at modular_deep_learning.md:23, 2023-03-01 09:00.",
        "draft:16, w9:24, mdl:23",
    ),
    # backlinks
    "where do I cite @mialonAugmentedLanguageModels2023?": (
        "@mialonAugmentedLanguageModels2023", "mdl:12 44 126",
    ),
    "which notes mention pfeifferModularDeepLearning2023?": (
        "@pfeifferModularDeepLearning2023 (Modular Deep Learning, Pfeiffer et al. 2023) is cited 5 "
        "times in 4 notes.",
        "draft:16, w9:24 111, mdl:23, gpt:91",
    ),
    "what did I say about the Model Soups paper?": ("5 lines about @wortsmanModel", "w9:59-63"),
    "which citations are missing from the bibliography?": (
        "6 of 38 keys are in no bibliography: @ShayneRedford, @andreasNeuralModuleNetworks2017, "
        "@kasirzadehConversationArtificialIntelligence2022, @silPrimeQAPrimeRepository2023, "
        "@sunHowDoesInContext2023, @wangKAdapterInfusingKnowledge2021.",
        "mdl:108, w9:113 123 91 85 132",
    ),
    # time
    "when did I first cite @huangComposerCreativeControllable2023?": (
        "2023-02-27 09:00, at 2023w9_draft.md:34, the first time of 3.", "draft:34",
    ),
    "what did I skim before 2023-03-01?": (
        "4 skims before 2023-03-01.", "draft:16-20 21-24 25-33 34-36",
    ),
    "which lessons did I learn since March 5, 2023?": (
        "3 lessons since March 5, 2023.", "gpt:92 107 127",
    ),
    "when did I last learn a lesson?": (
        "2023-03-08 09:00, at gpt.md:127, the last time of 7.", "gpt:127",
    ),
}  # fmt: skip


@pytest.mark.parametrize("question", EXACT)
def test_twenty_questions_are_answered_exactly(log: Log, question: str) -> None:
    text, lines = EXACT[question]
    answer = log.ask(question, today=TODAY)
    assert answer.refused is None
    assert answer.kind in ("structured", "backlink", "temporal")
    assert answer.text.startswith(text)
    assert [(e.note, e.line) for e in answer.evidence] == places(lines)
    for evidence in answer.evidence:
        assert log.note(evidence.note).line(evidence.line) == evidence.quote


#: question → the lines that support an answer; one of them is among the first five
FREE = {
    "why can't a language model of less than a billion parameters do chain of thought?": "cot:2 22",
    "how many heads does PaLM have?": "gpt:78",
    "what limits routing modules by token?": "mdl:69 70 68",
    "what is the relation between cross entropy and KL divergence?": "gpt:61",
    "why is skimming like eating?": "w9:16 138",
    "how do residual connections help the gradient?": "gpt:88",
    "is sparse finetuning better than adding an adapter?": "w9:112 110 111",
    "how is the image feature fused with the text in T5?": "cot:94-102 156 16 109 21",
    "what do I think about OpenAI being too powerful?": "mdl:85 86",
    "which glue between modalities is proper, JEPA or attention bottlenecks?": "w9:43",
}


@pytest.mark.parametrize("question", FREE)
def test_ten_free_questions_by_words_alone(log: Log, question: str) -> None:
    check_free(log, question)


def check_free(log: Log, question: str) -> None:
    answer = log.ask(question, today=TODAY)
    assert answer.kind == "free"
    assert answer.refused is None
    assert 1 <= len(answer.evidence) <= 5
    assert {(e.note, e.line) for e in answer.evidence} & set(places(FREE[question]))


#: question → what the reason must say
REFUSED = {
    "what did I think of @rebuffiLearningMultipleVisual2017?":
        "was skimmed at line 68 of 2023w9.md, no comment recorded",
    "what did I say about @vaswaniAttentionAllYou2017?":
        "is in the bibliography (zotero.bib:13283), but no note cites it",
    "where do I cite @pfeiferModularDeepLearning2023?":
        "is neither in the bibliography nor cited in any note; did you mean "
        "@pfeifferModularDeepLearning2023?",
    "when did I read @changMuseTextToImageGeneration2023?":
        "was skimmed at 2023w9.md:64, and never read",
    "what did I say about @dosovitskiyImageWorth16x162021 before March 2023?":
        "before March 2023; it first comes up at gpt.md:83, 2023-03-08 09:00",
    "what did I calculate?": "no calculation is recorded in any of the 5 notes",
    "which questions did I ask in multimodal_cot?":
        "no question in multimodal_cot.md; the log has 10 questions without that",
    "which lessons did I learn after 2023-03-20?":
        "no lesson after 2023-03-20; the log has 7 lessons, 2023-03-01 09:00 to 2023-03-08 09:00",
    "what did the last mmcot run reach?": "no run of 'mmcot' is recorded",
    "what is my opinion of Mamba?": "no line of the 5 notes mentions 'Mamba'",
}  # fmt: skip


def test_a_reason_names_every_condition_and_what_is_there_without_one(log: Log) -> None:
    answer = log.ask("what did I say about diffusion before February 2023?", today=TODAY)
    assert answer.refused is not None
    assert answer.refused.startswith("no line mentioning 'diffusion' before February 2023; ")
    answer = log.ask("which questions did I ask about robotics in 2023w9 after 2023-03-05?")
    assert answer.refused is not None
    assert answer.refused.startswith(
        "no question mentioning 'robotics' in 2023w9.md after 2023-03-05; the log has 10 qu"
    )


@pytest.mark.parametrize("question", REFUSED)
def test_ten_unanswerable_questions_are_refused_with_the_true_reason(
    log: Log, question: str
) -> None:
    answer = log.ask(question, today=TODAY)
    assert answer.refused is not None
    assert REFUSED[question] in answer.refused
    for evidence in answer.evidence:
        assert log.note(evidence.note).line(evidence.line) == evidence.quote


#: more ways to ask: question → the start of the text, and where its evidence begins
OTHERWISE = {
    "Which sources did I skim more than once?": ("4 of them more than once.", "draft:16"),
    "Who are the authors of @changMuseTextToImageGeneration2023?":
        ("Muse: Text-To-Image Generation via Masked Generative Transformers. Huiwen Chang", None),
    "How often did I cite Pfeiffer?": ("@pfeifferModularDeepLearning2023 (Modular", "draft:16"),
    "What did I learn about skimming?": ("2 lessons about 'skimming'", "w9:13"),
    "Did I learn anything in March?": ("7 lessons in March", "w9:13"),
    "Which papers has the note 2023w9 marked as _digging?": ("7 skims marked for d", "w9:50"),
    "Which keys don't resolve?": ("6 of 38 keys", "mdl:108"),
    "What have I fully read?": ("1 reading.", "mdl:23"),
    "how many papers did I skim in the draft?": ("4 skims in 2023w9_draft.md.", "draft:16"),
    "which question was answered?": ("1 answered question.", "mdl:66"),
    "did I answer the question about hosting FFN at home?":
        ("1 question about 'hosting FFN home', 1 open and 0 answered.", "mdl:73"),
    "what changed between 2023-02-01 and 2023-02-28?":
        ("Written between 2023-02-01 and 2023-02-28: multimodal_cot.md: ", "cot:2"),
}  # fmt: skip


@pytest.mark.parametrize("question", OTHERWISE)
def test_other_ways_to_ask(log: Log, question: str) -> None:
    text, first = OTHERWISE[question]
    answer = log.ask(question, today=TODAY)
    assert answer.refused is None
    assert answer.text.startswith(text)
    if first is not None:
        assert [(answer.evidence[0].note, answer.evidence[0].line)] == places(first)
    else:
        assert [e.note for e in answer.evidence] == ["zotero.bib"] * len(answer.evidence)
        assert "changMuse" in answer.evidence[0].quote


@pytest.mark.parametrize("row", ROUTES, ids=lambda row: row.example)
def test_the_table_of_questions_routes_its_own_examples(log: Log, row: Route) -> None:
    asked = parse_question(row.example, names_of(log), TODAY)
    assert route(asked) is row
    assert callable(row.handler)


def test_an_answer_follows_its_note(log: Log) -> None:
    note = log.path("multimodal_cot")
    before = note.read_bytes()
    question = "what is the tl;dr of multimodal_cot?"
    (line,) = log.ask(question).evidence
    assert line.quote.startswith("There is no magical appearance of a CoT")
    try:
        note.write_bytes(before.replace(line.quote.encode(), b"There is."))
        (line,) = log.ask(question).evidence
        assert (line.line, line.quote) == (2, "There is.")
        note.write_bytes(b"## tl;dr\n\n## Log\n")
        assert log.ask(question).refused is not None
        note.unlink()
        assert log.ask("which notes mention ScienceQA?").refused is not None
    finally:
        note.write_bytes(before)
        log.index()


def test_the_same_free_questions_with_vectors(log: Log) -> None:
    """Last in this file: what comes before is asked without vectors."""
    try:
        package_folder()
    except VectorsOffError as error:
        pytest.skip(str(error))
    remarks = log.ask("how many heads does PaLM have?").remarks
    assert remarks == ("vectors are off: `modgraft log index --vectors` makes them",)
    log.index(vectors=True)
    assert log.ask("how many heads does PaLM have?").remarks == ()
    for question in FREE:
        check_free(log, question)
    for question, reason in REFUSED.items():
        assert reason in (log.ask(question, today=TODAY).refused or "")
