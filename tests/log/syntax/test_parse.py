"""The scanner: any bytes come back, the real notes hold what is known to be in them."""

from __future__ import annotations

from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st

from log.real_notes import NAMES, needs_notes, notes, real
from modgraft.log import Note, parse

SIGNS = ["[", "]", "(", ")", "`", "```", "$", '"', "->", "@ab", "\n", "-", ">", "!", "skim"]
SIGNS += ["<", "<!--", "\\", "question -> ", "](", " ", "read(", "ab", "https://a"]


def joined(note: Note) -> bytes:
    assert [span.end for span in note.spans[:-1]] == [span.start for span in note.spans[1:]]
    return b"".join(note.data[span.start : span.end] for span in note.spans)


def sound(note: Note) -> None:
    """What holds for every note, whatever is in it."""
    size = len(note.data)
    assert joined(note) == note.data
    assert (
        "".join(note.line(n + 1) for n in range(note.lines))
        == (note.text.replace("\r", "").replace("\n", ""))
        or note.degraded
    )
    for index, block in enumerate(note.blocks):
        assert 0 <= block.start < block.end <= size
        assert block.parent is None or block.parent < index
        above = 0 if block.parent is None else note.blocks[block.parent].depth + 1
        assert block.depth == above
    for event in note.events:
        assert 0 <= event.start < event.end <= size
        assert event.line <= event.end_line <= note.lines
        assert event.written in note.line(event.line)
        assert note.blocks[event.block].start <= event.start < note.blocks[event.block].end
        assert all(note.data[one.start : one.end] for one in event.citations)
        assert event.body is not None
    for one in note.citations:
        assert note.data[one.start : one.end] == f"@{one.key}".encode()
    for one in note.mentions:
        assert note.data[one.start : one.end] == one.key.encode()
    for one in (*note.links, *note.figures):
        assert (
            one.line
            == note.data[: one.start].replace(b"\r\n", b"\n").replace(b"\r", b"\n").count(b"\n") + 1
        )
    for problem in note.diagnostics:
        assert 1 <= problem.line <= max(1, note.lines)
        assert "\n" not in str(problem)


@given(notes())
@settings(max_examples=300, deadline=None)
def test_a_note_as_people_write_them_comes_back(data: bytes) -> None:
    sound(parse(data, "n.md"))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
@example(b"")
@example(b"\r\n\r\r\n\0- [skim(@ab")
@example(b"\xef\xbb\xbf## Log")
@example(b"\xff\xfe#\0#\0")
def test_any_bytes_come_back(data: bytes) -> None:
    sound(parse(data))


@given(st.lists(st.sampled_from(SIGNS)))
@settings(max_examples=400, deadline=None)
def test_any_signs_come_back(parts: list[str]) -> None:
    sound(parse("".join(parts).encode()))


@needs_notes
def test_the_real_notes_come_back() -> None:
    for name in NAMES:
        note = real(name)
        sound(note)
        assert not note.degraded


@needs_notes
def test_the_events_of_the_real_notes_are_counted() -> None:
    counts = Counter(event.action for name in NAMES for event in real(name).events)
    assert counts == {
        "skim": 32, "question": 10, "lesson_learned": 7, "soliloquy": 7, "eureka": 2,
        "hypothesize": 2, "interrupt": 2, "ChatGPT": 2, "code": 2, "read": 1, "blog": 1,
        "BingChat": 1,
    }  # fmt: skip
    assert counts.total() == 69


@needs_notes
def test_the_citations_of_the_real_notes_are_counted() -> None:
    keys = [one.key for name in NAMES for one in real(name).citations]
    assert (len(keys), len(set(keys))) == (51, 38)
    assert "ShayneRedford" in keys
    assert "v" not in keys  # gpt.md:97: softmax before @v
