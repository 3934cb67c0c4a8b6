"""Every irregularity of the real notes, on the line where it stands."""

from __future__ import annotations

import pytest

from log.real_notes import needs_notes, real
from modgraft.log import Event

pytestmark = needs_notes


def at(name: str, line: int) -> list[Event]:
    return [event for event in real(name).events if event.line == line]


def one(name: str, line: int) -> Event:
    (event,) = at(name, line)
    return event


def test_an_empty_arrow_is_an_empty_result() -> None:
    event = one("2023w9_draft", 29)
    assert (event.action, event.result, event.closed) == ("soliloquy", "", True)
    assert event.end_line == 33
    assert event.body.startswith("- It's not LM learns the model")


@pytest.mark.parametrize(
    ("name", "line", "end"),
    [("2023w9", 13, 18), ("2023w9", 135, 140), ("modular_deep_learning", 11, 15)],
)
def test_a_lesson_has_its_text_in_the_list_below(name: str, line: int, end: int) -> None:
    event = one(name, line)
    assert (event.action, event.arguments, event.result) == ("lesson_learned", None, None)
    assert event.end_line == end
    assert event.body.splitlines()[0].startswith("- ")


def test_two_annotations_stand_on_a_line() -> None:
    first, second = at("gpt", 64)
    assert (first.action, second.action) == ("ChatGPT", "BingChat")
    assert [link.target for link in first.links] == ["asset/chatgpt_mle.png"]
    assert [link.target for link in second.links] == ["asset/bingchat_mle.png"]
    assert (first.body, second.body) == ("", "")


@pytest.mark.parametrize("line", [16, 40, 111, 124])
def test_an_annotation_stands_in_mid_sentence(line: int) -> None:
    event = one("modular_deep_learning", line)
    assert event.action == "question"
    assert event.status == "open"
    if line == 40:
        assert (
            event.body == "This question takes me back to the good old days of Scala actor model."
        )


def test_a_name_alone_counts_in_mid_sentence_with_the_quote_below() -> None:
    event = one("gpt", 109)
    assert (event.action, event.arguments, event.result) == ("ChatGPT", None, None)
    assert event.end_line == 120
    assert "condensed tokens" in event.body


def test_links_nest_in_results_and_arguments() -> None:
    code = one("gpt", 128)
    assert (code.arguments, code.result) == ("bigram as baseline", "[bigram.py](bigram.py)")
    interrupt = one("modular_deep_learning", 83)
    assert interrupt.arguments is not None
    assert interrupt.arguments.startswith("[ChatGPT API release](https://openai.com/blog/")
    assert [link.text for link in interrupt.links] == ["ChatGPT API release"]


def test_a_colon_belongs_to_the_annotation() -> None:
    event = one("modular_deep_learning", 66)
    assert event.result == "wonder how much RL could help here?"
    assert event.status == "answered"
    assert event.body.startswith('- few paragraphs later: "In Routing Networks')


def test_quotes_hang_under_items_and_items_under_quotes() -> None:
    note = real("modular_deep_learning")
    blocks = {block.line: block for block in note.blocks}
    assert blocks[13].kind == "quote"
    assert note.line(blocks[13].line + 2).strip() == (
        "> AdapterHub as continuously updating community-distributed multi-task models."
    )
    for quote, child in ((108, 109), (122, 123)):
        assert blocks[quote].kind == "quote"
        assert blocks[child].parent == note.blocks.index(blocks[quote])
    (handle,) = [key for key in note.citations if key.key == "ShayneRedford"]
    assert handle.line == 108


def test_nesting_by_two_four_and_odd_indents() -> None:
    gpt = real("gpt")
    depth = {block.line: block.depth for block in gpt.blocks}
    assert [depth[line] for line in (13, 18, 73, 84, 123)] == [0, 1, 2, 2, 2]
    cot = real("multimodal_cot")
    depth = {block.line: block.depth for block in cot.blocks}
    assert [depth[line] for line in (26, 27, 28, 119)] == [0, 1, 2, 1]


def test_fences_and_formulas_hold_no_events() -> None:
    gpt, modular = real("gpt"), real("modular_deep_learning")
    assert [(code.line, code.end_line, code.language) for code in gpt.codes] == [
        (21, 28, "python"),
        (44, 56, "python"),
    ]
    assert gpt.codes[1].text.startswith("context_window=4\nidx = [0, 1, 2, 3]\n")
    start, end = modular.line_range(80)
    formulas = [mark for mark in modular.marks if mark.kind == "math" and start < mark.start < end]
    assert len(formulas) == 2
    assert not any(event.line == 80 for event in modular.events)


def test_other_scripts_and_mojibake_are_kept() -> None:
    assert real("modular_deep_learning").line(86).strip().startswith("- 你們是蟲子。")
    (slip,) = [d for d in real("2023w9").diagnostics if d.code == "mojibake"]
    assert (slip.line, slip.fix and slip.fix.replacement.decode()) == (94, "’")
    cot = [d for d in real("multimodal_cot").diagnostics if d.code == "mojibake"]
    assert {d.line for d in cot} == {42, 71, 162, 164, 166, 167, 168, 170, 171}
    assert {d.fix.replacement.decode() for d in cot if d.fix} == {"→", "↓", "💡"}


def test_a_key_stands_without_at() -> None:
    (mention,) = real("modular_deep_learning").mentions
    assert (mention.key, mention.line, mention.written_with_at) == (
        "kohGroundingLanguageModels2023",
        5,
        False,
    )


def test_empty_sections_are_sections() -> None:
    draft = real("2023w9_draft")
    assert [section.title for section in draft.sections] == [
        "tl;dr", "Context", "Done", "Learned", "Next?", "Log",
    ]  # fmt: skip
    empty = [d.line for d in draft.diagnostics if d.code == "empty-section"]
    assert empty == [8, 11, 13]


def test_the_reading_status_is_in_the_arrow() -> None:
    statuses = [event.status for event in real("2023w9").events if event.action == "skim"]
    assert {status: statuses.count(status) for status in set(statuses)} == {
        "full_read": 7, "digging": 7, "skimmed": 14,
    }  # fmt: skip
