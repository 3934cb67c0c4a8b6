"""Parse events, `[name(arguments) -> result]`, from brackets that are already paired.

Some brackets look like events but are not: `[name](target)` and `[[name]]` are links; quotations,
code and formulas are not the writer's events; and a name that is not in the table of actions is
text, which is reported if it is similar to an action.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from modgraft.log.syntax.actions import Action, Actions
from modgraft.log.syntax.inline import Brackets, Inlines, decoded
from modgraft.log.syntax.note import Diagnostic, Fix, Span

# actions.NAME in bytes: any non-ASCII byte may be part of a letter, except in the arrow.
_LETTER = rb"(?:\w|(?!\xe2\x86\x92)[\x80-\xff])"
_NAME = re.compile(
    rb"[ \t]*((?!\d)" + _LETTER + rb"+(?:[ /-]" + _LETTER + rb"+){0,3})[ \t]*"
    rb"(?=\(|->|\xe2\x86\x92|\]|[\r\n]|\Z)"
)
_ARROW = re.compile(rb"\s*(?:->|\xe2\x86\x92)")
_DEFINITION = re.compile(rb":[ \t]+<?[A-Za-z][A-Za-z0-9+.-]*://\S+[ \t]*(?:[\r\n]|\Z)")
_LONGEST_NAME = 80
_DEEPEST = 8  # nested events: each text is kept once per level
_END = re.compile(rb"[\r\n]|\Z")


@dataclass(frozen=True, slots=True)
class Annotation:
    """An event as it stands in the text, without the blocks below it."""

    action: Action
    written: str
    arguments: str | None
    result: str | None
    start: int
    end: int
    closed: bool
    inside: tuple[int, int] | None  # start and end of the arguments


@dataclass(frozen=True, slots=True)
class _Parts:
    """The positions of an annotation's parts, whatever its name."""

    name: tuple[int, int]
    close: int | None
    end: int  # of what belongs to it: at the closing bracket, or at the end of the line
    inside: tuple[int, int] | None
    result: int | None


def _find_parts(
    data: bytes, at: int, close: int | None, stop: int, brackets: Brackets
) -> _Parts | None:
    """Find the parts of the bracket that opens at `at`; None if it has not the form of an event."""
    named = _NAME.match(data, at + 1, min(stop, at + 1 + _LONGEST_NAME))
    if named is None:
        return None
    end = close
    if end is None:
        line_end = _END.search(data, at, stop)
        end = line_end.start() if line_end else stop
    after, inside = named.end(), None
    if data[after : after + 1] == b"(":
        inside, after = _find_arguments(data, after, end, brackets)
    arrow = _ARROW.match(data, after, end)
    if arrow is None:
        if close is not None and at in brackets.links:
            return None  # [read](there) and [read()](there) are links
        if inside is None and (close is None or _is_text(data, at, close, stop)):
            return None
    return _Parts(named.span(1), close, end, inside, arrow.end() if arrow else None)


def _find_arguments(
    data: bytes, at: int, end: int, brackets: Brackets
) -> tuple[tuple[int, int], int]:
    """Return the range of the arguments whose bracket opens at `at`, and what comes after them."""
    close = brackets.round.get(at)
    if close is not None and close < end:
        return (at + 1, close), close + 1
    arrow = data.find(b"->", at, end)  # the bracket does not close: up to the arrow
    close = arrow if arrow >= 0 else end
    return (at + 1, close), close


def _is_text(data: bytes, at: int, close: int, stop: int) -> bool:
    """Return whether a word in brackets is no event, by what stands beside it."""
    before, behind = data[at - 1 : at] if at else b"", data[close + 1 : close + 2]
    if before.isalnum() or before in (b"_", b"]") or behind == b"[":
        return True  # x[start] is an index, [text][read] a link by reference
    # [blog]: https://… says where such a link leads
    return _DEFINITION.match(data, close + 1, stop) is not None


def _read(data: bytes, at: int, stop: int, parts: _Parts, action: Action) -> Annotation:
    end = parts.end + 1 if parts.close is not None else parts.end
    if parts.close is not None and data[end : end + 1] == b":":
        follows = data[end + 1 : min(end + 2, stop)]
        end += 1 if not follows.strip() else 0
    result = None if parts.result is None else decoded(data[parts.result : parts.end]).strip()
    arguments = None if parts.inside is None else decoded(data[slice(*parts.inside)]).strip()
    written = decoded(data[slice(*parts.name)])
    return Annotation(
        action, written, arguments, result, at, end, parts.close is not None, parts.inside
    )


def _candidates(data: bytes, stop: int, brackets: Brackets) -> Iterator[tuple[int, _Parts]]:
    """Yield the square brackets that have the form of an event, outside quotations and figures."""
    opened = [at for at, close in brackets.square.items() if close is None]
    next_opened = iter([*opened[1:], stop])  # an unclosed one ends where the next one begins
    for at, close in brackets.square.items():
        ends = next(next_opened) if close is None else stop
        if at not in brackets.images:
            parts = _find_parts(data, at, close, ends, brackets)
            if parts is not None and not brackets.is_quoted(at, parts.end):
                yield at, parts


def read_annotations(
    data: bytes,
    stop: int,
    brackets: Brackets,
    actions: Actions,
    found: Inlines,
    problems: list[Diagnostic],
    line_of: Callable[[int], int],
) -> list[Annotation]:
    """Parse the events among `brackets`, in order; append their problems to `problems`."""
    out: list[Annotation] = []
    around: list[int] = []  # the ends of the events around this one
    for at, parts in _candidates(data, stop, brackets):
        while around and around[-1] <= at:
            around.pop()
        bare = parts.result is None and parts.inside is None
        written = decoded(data[slice(*parts.name)])
        action = actions.find(written)
        if action is None:
            if not bare and (near := actions.nearest(written)) is not None:
                problems.append(_unknown(written, near, parts, line_of(at), at))
            continue
        if bare and around:
            continue  # a word in brackets inside another event
        if len(around) == _DEEPEST:
            said = f"events in events: more than {_DEEPEST} deep, and kept as text from here on"
            if not problems or problems[-1].code != "nesting":
                problems.append(Diagnostic("warning", "nesting", said, line_of(at), at, parts.end))
            continue
        one = _read(data, at, stop, parts, action)
        around.append(one.end)
        out.append(one)
        _add_marks(found, one, parts)
        _report_defects(one, parts, data, line_of(at), problems)
    return out


def _report_defects(
    one: Annotation, parts: _Parts, data: bytes, line: int, problems: list[Diagnostic]
) -> None:
    """Report an event that is not closed or lacks its arrow."""
    if not one.closed:
        said = f"[{one.written}…: the bracket does not close; put ] where the event ends"
        problems.append(Diagnostic("warning", "unclosed", said, line, one.start, one.end))
    elif parts.result is None and parts.inside and data[parts.inside[1] + 1 : parts.end].strip():
        said = f"[{one.written}(…) …]: something stands after the arguments without ->"
        place = parts.inside[1] + 1
        fix = Fix(place, place, b" ->", "put -> before it")
        problems.append(Diagnostic("warning", "arrow", said, line, one.start, one.end, fix=fix))


def _unknown(written: str, near: Action, parts: _Parts, line: int, at: int) -> Diagnostic:
    said = (
        f"[{written}…] is no action; did you mean {near.name}? "
        f"(a new one goes into [tool.modgraft.log.actions])"
    )
    fix = Fix(*parts.name, near.name.encode(), f"write {near.name}")
    return Diagnostic("warning", "unknown-action", said, line, at, parts.end, fix=fix)


def _add_marks(found: Inlines, one: Annotation, parts: _Parts) -> None:
    """Mark the event's brackets, name and arrow; its arguments and result are marked elsewhere."""
    head = parts.inside[0] if parts.inside else parts.result or parts.name[1]
    found.marks.append(Span("annotation", one.start, head))
    if parts.inside and parts.result:
        found.marks.append(Span("annotation", parts.inside[1], parts.result))
    elif parts.inside and parts.close is not None and parts.inside[1] < parts.close:
        found.marks.append(Span("annotation", parts.inside[1], parts.inside[1] + 1))
    if parts.close is not None:
        found.marks.append(Span("annotation", parts.close, one.end))
