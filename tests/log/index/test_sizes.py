"""Large and twisted notes: nothing lost, work in proportion to size."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable

import pytest

from modgraft.log import Note, parse

# Each grows with n in one way that makes a careless reader quadratic, or recurse.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "open brackets": lambda n: b"- " + b"[" * n,
    "nested brackets": lambda n: b"- " + b"[" * n + b"]" * n,
    "nested events": lambda n: b"- " + b"[eureka -> " * n + b"]" * n,
    "open events": lambda n: b"- " + b"[eureka -> " * n,
    "open arguments": lambda n: b"- " + b"[read(" * n,
    "links in links": lambda n: b"- " + b"[" * n + b"](a)" * n,
    "links in targets": lambda n: b"- " + b"[a](" * n + b")" * n,
    "figures in figures": lambda n: b"- " + b"![" * n + b"](a)" * n,
    "wiki links": lambda n: b"[[" * n + b"]]" * n,
    "open comments": lambda n: b"<!--" * n,
    "dollars": lambda n: b"$a$a " * n,
    "backticks": lambda n: b" ".join(b"`" * (i % 50) for i in range(n)),
    "open addresses": lambda n: b"https://a(" * n,
    "open fences": lambda n: b"```a\n## Log\n" * n,
    "mixed fences": lambda n: b"```\n~~~\n" * n,
    "open figures": lambda n: b"![a](b\n" * n,
    "quotation marks": lambda n: b' "a" [question -> "x"]' * n,
    "one paragraph": lambda n: b"word @smith2020 [question -> x]\n" * n,
    "empty bullets": lambda n: b"-\n" * n,
    "carriage returns": lambda n: b"\r" * n,
    "mojibake": lambda n: "â€™ é".encode() * n,
}


def calls(data: bytes) -> int:
    """How many functions of Python and C are called to parse: the work, not the time."""
    count = 0

    def profile(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        parse(data)
    finally:
        sys.setprofile(None)
    return count


def joined(note: Note) -> bytes:
    return b"".join(note.data[span.start : span.end] for span in note.spans)


@pytest.mark.parametrize("shape", SHAPES)
def test_work_grows_with_size_and_nothing_is_lost(shape: str) -> None:
    small, large = SHAPES[shape](400), SHAPES[shape](1600)
    assert calls(large) <= 4.4 * calls(small) + 200
    assert joined(parse(large)) == large


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_one_takes_no_time(shape: str) -> None:
    # What regular expressions do inside is no call: a quadratic one would take minutes here.
    data = SHAPES[shape](20_000)
    assert joined(parse(data)) == data


def test_ten_thousand_nested_bullets() -> None:
    data = b"".join(b" " * depth + b"- [question -> x]\n" for depth in range(10_000))
    note = parse(data)
    assert len(note.events) == len(note.blocks) == 10_000
    assert note.blocks[-1].depth == 9_999
    assert note.events[0].end_line == 10_000
    assert note.events[-1].status == "open"


def test_a_line_of_twenty_megabytes_is_kept_and_reported() -> None:
    line = b"- [eureka -> x] @smith2020 " * 750_000
    data = b"## Log\n- [question -> why?]\n" + line + b"\n- [code(x) -> y]\n"
    tracemalloc.start()
    note = parse(data, "n.md")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(data)
    assert [event.action for event in note.events] == ["question", "code"]
    assert note.degraded
    (problem,) = note.diagnostics
    assert str(problem).startswith("n.md:3: error long-line a line of 20,250,001 bytes: kept and")
    assert joined(note) == data


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"ok\n\xff\xfe bad\n", "encoding", 2),
        (b"a\nb\0c", "nul", 2),
        (b"\xff\xfe#\0#\0", "encoding", 1),
    ],
)
def test_what_is_no_text_is_kept_and_reported(data: bytes, code: str, line: int) -> None:
    note = parse(data + b"\n- [question -> still read]\n", "n.md")
    assert note.degraded
    assert (note.diagnostics[0].code, note.diagnostics[0].line) == (code, line)
    assert [event.result for event in note.events] == ["still read"]
