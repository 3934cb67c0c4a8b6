"""Find the problems of a note that need neither other files nor a bibliography.

Encoding errors make a note degraded: part of it cannot be read as text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from modgraft.log.syntax.blocks import SECTIONS, Outline
from modgraft.log.syntax.calculate import (
    CalculationError,
    agrees,
    calculate,
    corrected,
    format_number,
    split_value,
)
from modgraft.log.syntax.mojibake import mojibake
from modgraft.log.syntax.note import Diagnostic, Event, Fix

DEGRADING = ("encoding", "nul", "long-line")


def diagnose(
    data: bytes, starts: Sequence[int], tree: Outline, events: Sequence[Event]
) -> Iterator[Diagnostic]:
    """Yield the problems of a note by itself."""
    yield from _encoding(data, starts)
    yield from _structure(tree)
    for broken in mojibake(data):
        said = f"{broken.broken!r} looks like {broken.repaired!r}, saved in the wrong encoding"
        what = f"write {broken.repaired!r} for {broken.broken!r}"
        fix = Fix(broken.start, broken.end, broken.repaired.encode(), what)
        line = bisect_right(starts, broken.start)
        yield Diagnostic("warning", "mojibake", said, line, broken.start, broken.end, fix=fix)
    for event in events:
        if event.action == "calculate" and event.closed:
            yield from _calculation(event)


def _encoding(data: bytes, starts: Sequence[int]) -> Iterator[Diagnostic]:
    """Report all bytes that are no text at once: how many, and where the first is."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        count = data.decode("utf-8", "replace").count("\ufffd") - data.count(b"\xef\xbf\xbd")
        said = (
            f"not UTF-8: byte 0x{data[error.start]:02x} ({error.reason}), {count:,} such in all; "
            f"kept as they are, shown as \ufffd; save the file as UTF-8"
        )
        line = bisect_right(starts, error.start)
        yield Diagnostic("error", "encoding", said, line, error.start, error.end)
    at = data.find(b"\0")
    if at >= 0:
        said = f"holds {data.count(bytes(1)):,} NUL bytes; is this a text file?"
        yield Diagnostic("error", "nul", said, bisect_right(starts, at), at, at + 1)


def _structure(tree: Outline) -> Iterator[Diagnostic]:
    for index in tree.unclosed:
        block = tree.blocks[index]
        said = "a code fence that never closes: what follows it may be taken for code; close it"
        yield Diagnostic("warning", "fence", said, block.line, block.start, block.end)
    blocks = iter(block for block in tree.blocks if block.kind != "heading")
    block = next(blocks, None)
    for section in tree.sections:
        while block is not None and block.start < section.start:
            block = next(blocks, None)
        empty = block is None or block.start >= section.end
        if empty and section.level == 2 and section.title in SECTIONS:
            said = f"the section {section.title} is empty"
            yield Diagnostic(
                "info", "empty-section", said, section.line, section.start, section.end
            )


def _calculation(event: Event) -> Iterator[Diagnostic]:
    """Check one `[calculate(expression) -> value]`."""
    place = (event.line, event.start, event.end)
    expression, written = split_value(event.arguments or "", event.result)
    try:
        value = calculate(expression)
    except CalculationError as error:
        yield Diagnostic("warning", "calculate", str(error), *place)
        return
    written, said = written.strip(), f"{expression.strip()} is {format_number(value)}"
    right = agrees(value, written) if written else None
    if not written:
        yield Diagnostic("info", "calculate", f"{said}: no value is written", *place)
    elif right is None:
        yield Diagnostic("info", "calculate", f"{said}; {written!r} is no number", *place)
    elif not right:
        at = event.source.data.rfind(written.encode(), event.start, event.end)
        mended = corrected(value, written)
        what = f"write {mended} for {written}"
        fix = Fix(at, at + len(written.encode()), mended.encode(), what) if at >= 0 else None
        yield Diagnostic("error", "calculate", f"{said}, not {written}", *place, fix=fix)
