"""The grammar of events, its slips, and what looks like an event and is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modgraft import ModgraftError
from modgraft.log import Actions, Event, parse


def events(text: str, actions: Actions | None = None) -> tuple[Event, ...]:
    return parse(text.encode(), "n.md", actions).events


def one(text: str) -> Event:
    (event,) = events(text)
    return event


@pytest.mark.parametrize(
    "text",
    [
        "> [question -> of another]",
        '- "they say [QA() -> Steel City] and [question -> why?]"',
        "- an API call, [QA() -> Steel City] helps",
        "- `[question -> in code]`",
        "- $[question -> in a formula]$".replace("->", "to"),
        "- <!-- [question -> taken back] -->",
        "```\n[question -> in a fence]\n```",
        "- [read](there.md), [retrieve()](#retrieve) and [[read]]",
        "- ![read](figure.png)",
        r"- \[question -> escaped]",
        "- [x] done, [ ] not, [^1], [0, 1), [text -> text2text]",
        "- [question what is this]",
        "- x[start], [text][read], [read][1] and a_[code]",
        "[blog]: https://a.org/b",
    ],
)
def test_what_is_no_event(text: str) -> None:
    assert events(text) == ()


@pytest.mark.parametrize(
    ("written", "action"),
    [
        ("Read", "read"), ("Retrieve", "retrieve"), ("SKIM", "skim"), ("chatgpt", "ChatGPT"),
        ("lesson learned", "lesson_learned"), ("context_switch_to", "context_switch_to"),
    ],
)  # fmt: skip
def test_older_spellings_are_kept_and_understood(written: str, action: str) -> None:
    event = one(f"- [{written}(@smith2020) -> x]")
    assert (event.written, event.action, event.keys) == (written, action, ("smith2020",))


@pytest.mark.parametrize(
    ("result", "status"),
    [
        ("", "skimmed"), (" ->", "skimmed"), (" -> _full_read", "full_read"),
        (" -> <full read>", "full_read"), (" -> _digging later", "digging"),
        (" → full_read", "full_read"),
    ],
)  # fmt: skip
def test_how_far_a_source_was_followed(result: str, status: str) -> None:
    assert one(f"- [skim(@smith2020){result}]").status == status


def test_several_keys_and_keys_without_at() -> None:
    event = one("- [skim(@ab2020, @cd-x:2021) -> see @ef2022]\n  - and smithThing2023")
    assert event.keys == ("ab2020", "cd-x:2021")
    assert [key.key for key in event.citations] == [
        "ab2020",
        "cd-x:2021",
        "ef2022",
        "smithThing2023",
    ]
    assert not event.citations[-1].written_with_at
    assert one("- [read(pfeifferModular2023)]").keys == ("pfeifferModular2023",)


def test_addresses_and_mail_hold_no_keys() -> None:
    note = parse(
        b"- a@b.com https://m.org/@user/x [t](x/@foo.md) `@code` softmax @v @ x, [@ok2020; @no2]"
    )
    assert [key.key for key in note.citations] == ["ok2020", "no2"]


def test_an_open_bracket_ends_with_its_line_and_is_reported() -> None:
    first, second = events("- [question -> what is [eureka -> this]\n- [read(@ab2020 -> y]\n")[
        0:3:2
    ]
    assert (first.closed, first.result) == (False, "what is [eureka -> this]")
    assert (second.closed, second.arguments, second.result) == (True, "@ab2020", "y")
    note = parse(b"- [question -> what\n- next", "n.md")
    (problem,) = note.diagnostics
    assert str(problem).startswith("n.md:1: warning unclosed [question…: the bracket does not")


def test_an_event_may_be_wrapped() -> None:
    event = one("- so [question -> what is\n  it?]: maybe\n  this\n  - [x] child\n")
    assert (event.result, event.line, event.end_line) == ("what is it?", 1, 4)
    assert event.body == "maybe\n  this\n- [x] child"
    assert event.status == "answered"


def test_events_in_events_are_events_and_words_in_brackets_there_are_not() -> None:
    outer, inner = events("- [eureka -> ask [ChatGPT], [question -> why [0, 1)?] and so]] tail")[:2]
    assert (outer.action, inner.action) == ("eureka", "question")
    assert inner.body == ""


def test_a_near_miss_of_an_action_is_reported_with_its_fix() -> None:
    note = parse(b"- [skimm(@ab2020)] [hypothesise -> x] [QA() -> Steel City] [text -> image]")
    assert note.events == ()
    fixes = [problem.fix.replacement for problem in note.diagnostics if problem.fix]
    assert fixes == [b"skim", b"hypothesize"]


def test_a_forgotten_arrow_is_reported() -> None:
    (problem,) = parse(b"- [skim(@ab2020) _digging]").diagnostics
    assert (problem.code, problem.fix and problem.fix.replacement) == ("arrow", b" ->")


def test_the_table_is_extended_in_the_project() -> None:
    table = Actions().extended({"experiment": ["exp"], "skim": ["glance"]})
    assert [event.action for event in events("[exp(3) -> x] [glance(@ab2020)]", table)] == [
        "experiment",
        "skim",
    ]
    own = Actions().extended({"問題": ["open problem", "to-do-list"], "thèse": []})
    text = "[問題 -> a] [Open Problem] [to-do-list(x)] [Thèse→b] [thèse -> c]"
    assert [event.action for event in events(text, own)] == ["問題"] * 3 + ["thèse"] * 2
    wrong = ({"experiment": ["q?"]}, {"a->b": []}, {"1st": []}, {"a b c d e": []}, {"x" * 41: []})
    for bad in (
        {"experiment": "exp"}, {"experiment": ["read"]}, {"experiment": [3]}, {"x": None}, *wrong,
    ):  # fmt: skip
        with pytest.raises(ModgraftError, match=r"\[tool.modgraft.log.actions\]"):
            Actions().extended(bad)


def test_an_open_fence_does_not_swallow_the_log() -> None:
    note = parse(b"## Done\n```python\nx = 1\n\n## Log\n- [question -> why?]\n")
    assert [event.action for event in note.events] == ["question"]
    assert note.codes[0].text.strip() == "x = 1"
    assert [problem.code for problem in note.diagnostics] == ["fence"]
    inside = parse(b"- item\n  ```\n  code\n- [eureka -> x]\n")
    assert [event.action for event in inside.events] == ["eureka"]


def test_every_open_fence_keeps_its_last_line() -> None:
    note = parse(b"```a\none\n## Log\n```b\ntwo\n## Done\n- x")
    assert [(code.language, code.text) for code in note.codes] == [("a", "one\n"), ("b", "two\n")]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_front_matter_is_code(mark: str) -> None:
    text = f"{mark}---\ndate: 2023-03-01\ntags: [read]\n - [code]\n---\n## Log\n- [read(@ab2020)]\n"
    note = parse(text.encode())
    assert [event.line for event in note.events] == [7]
    assert [(code.language, code.line, code.end_line) for code in note.codes] == [("yaml", 1, 5)]
    assert note.codes[0].text == "date: 2023-03-01\ntags: [read]\n - [code]\n"
    ruled = parse(b"---\n- [read(@ab2020)]\n\n---\n")  # two rules are no front matter
    assert len(ruled.events) == 1


def test_what_commonmark_empties_is_kept() -> None:
    event = one("- [critique]: agreed\n")
    assert (event.action, event.body) == ("critique", "agreed")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_all_ends_of_lines_are_ends_of_lines(end: str) -> None:
    note = parse(end.join(["\ufeff## Log", "- [question -> a]", "", "  - b", "- c"]).encode())
    assert [(event.line, event.end_line, event.section) for event in note.events] == [(2, 4, "Log")]
    assert note.line(4) == "  - b"


@given(st.sampled_from(["skim", "question", "code"]), st.text("abc é你,.-", max_size=20))
def test_what_is_written_is_read(name: str, text: str) -> None:
    event = one(f"- [{name}({text}) -> {text}] {text}")
    assert (event.arguments, event.result, event.closed) == (text.strip(), text.strip(), True)
