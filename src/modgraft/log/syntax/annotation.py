"""The grammar of events: `[name(arguments) -> result]`, read off brackets that are paired already.

What looks like one and is none: `[name](target)` is a link, `[[name]]` is one, what stands in
quotation marks, quotes, code and formulas is another's word, and a name that the table of actions
does not know is text (reported where it is nearly a known one).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from modgraft.log.syntax.actions import Action, Actions
from modgraft.log.syntax.inline import Brackets, Found, decoded
from modgraft.log.syntax.note import Diagnostic, Fix, Span

# As actions.NAME says, in bytes: what is not ASCII may be a letter, except for the arrow.
_LETTER = rb"(?:\w|(?!\xe2\x86\x92)[\x80-\xff])"
_NAME = re.compile(
    rb"[ \t]*((?!\d)" + _LETTER + rb"+(?:[ /-]" + _LETTER + rb"+){0,3})[ \t]*"
    rb"(?=\(|->|\xe2\x86\x92|\]|[\r\n]|\Z)"
)
_ARROW = re.compile(rb"\s*(?:->|\xe2\x86\x92)")
_DEFINITION = re.compile(rb":[ \t]+<?[A-Za-z][A-Za-z0-9+.-]*://\S+[ \t]*(?:[\r\n]|\Z)")
_LONGEST_NAME = 80
_DEEPEST = 8  # events in events: each text is held once per level
_END = re.compile(rb"[\r\n]|\Z")


@dataclass(frozen=True, slots=True)
class Annotation:
    """An event as it stands in the text, before it is known what hangs below it."""

    action: Action
    written: str
    arguments: str | None
    result: str | None
    start: int
    end: int
    closed: bool
    inside: tuple[int, int] | None  # where the arguments stand


@dataclass(frozen=True, slots=True)
class _Form:
    """The places of an annotation's parts, whatever its name."""

    name: tuple[int, int]
    close: int | None
    end: int  # of what belongs to it: at the closing bracket, or at the end of the line
    inside: tuple[int, int] | None
    result: int | None


def _form(data: bytes, at: int, close: int | None, stop: int, brackets: Brackets) -> _Form | None:
    """The parts of what opens at `at`, or None where it has not the form of an annotation."""
    named = _NAME.match(data, at + 1, min(stop, at + 1 + _LONGEST_NAME))
    if named is None:
        return None
    end = close
    if end is None:
        line_end = _END.search(data, at, stop)
        end = line_end.start() if line_end else stop
    after, inside = named.end(), None
    if data[after : after + 1] == b"(":
        round_close = brackets.round.get(after)
        if round_close is None or round_close >= end:
            arrow = data.find(b"->", after, end)
            round_close = arrow if arrow >= 0 else end
            inside, after = (after + 1, round_close), round_close
        else:
            inside, after = (after + 1, round_close), round_close + 1
    arrow = _ARROW.match(data, after, end)
    if arrow is None and inside is None and close is None:
        return None  # a bracket that never closes and a word: no call
    if arrow is None and close is not None and at in brackets.links:
        return None  # [read](there) and [read()](there) are links
    if arrow is None and inside is None and close is not None:
        before, behind = data[at - 1 : at] if at else b"", data[close + 1 : close + 2]
        if before.isalnum() or before in (b"_", b"]") or behind == b"[":
            return None  # x[start] is an index, [text][read] a link by reference
        if _DEFINITION.match(data, close + 1, stop):
            return None  # [blog]: https://… says where such a link leads
    return _Form(named.span(1), close, end, inside, arrow.end() if arrow else None)


def _read(data: bytes, at: int, stop: int, form: _Form, action: Action) -> Annotation:
    end = form.end + 1 if form.close is not None else form.end
    if form.close is not None and data[end : end + 1] == b":":
        follows = data[end + 1 : min(end + 2, stop)]
        end += 1 if not follows.strip() else 0
    result = None if form.result is None else decoded(data[form.result : form.end]).strip()
    arguments = None if form.inside is None else decoded(data[slice(*form.inside)]).strip()
    written = decoded(data[slice(*form.name)])
    return Annotation(
        action, written, arguments, result, at, end, form.close is not None, form.inside
    )


def read_annotations(
    data: bytes,
    stop: int,
    brackets: Brackets,
    actions: Actions,
    found: Found,
    problems: list[Diagnostic],
    line_of: Callable[[int], int],
) -> list[Annotation]:
    """The annotations among `brackets`, in order; what is wrong with one goes to `problems`."""
    out: list[Annotation] = []
    around: list[int] = []  # the ends of the events that this one stands in
    opened = [at for at, close in brackets.square.items() if close is None]
    opened.append(stop)
    next_open = 0
    for at, close in brackets.square.items():
        if close is None:
            next_open += 1  # what never closes ends before the next that does not
        if at in brackets.images:
            continue
        form = _form(data, at, close, opened[next_open] if close is None else stop, brackets)
        if form is None or brackets.is_quoted(at, form.end):
            continue
        while around and around[-1] <= at:
            around.pop()
        bare = form.result is None and form.inside is None
        written = decoded(data[slice(*form.name)])
        action = actions.find(written)
        if action is None:
            if not bare and (near := actions.nearest(written)) is not None:
                problems.append(_unknown(written, near, form, line_of(at), at))
            continue
        if bare and around:
            continue  # a word in brackets inside of another event
        if len(around) == _DEEPEST:
            said = f"events in events: more than {_DEEPEST} deep, and kept as text from here on"
            if not problems or problems[-1].code != "nesting":
                problems.append(Diagnostic("warning", "nesting", said, line_of(at), at, form.end))
            continue
        one = _read(data, at, stop, form, action)
        around.append(one.end)
        out.append(one)
        _marks(found, one, form)
        _judge(one, form, data, line_of(at), problems)
    return out


def _judge(
    one: Annotation, form: _Form, data: bytes, line: int, problems: list[Diagnostic]
) -> None:
    """Say what an annotation lacks."""
    if not one.closed:
        said = f"[{one.written}…: the bracket does not close; put ] where the event ends"
        problems.append(Diagnostic("warning", "unclosed", said, line, one.start, one.end))
    elif form.result is None and form.inside and data[form.inside[1] + 1 : form.end].strip():
        said = f"[{one.written}(…) …]: something stands after the arguments without ->"
        place = form.inside[1] + 1
        fix = Fix(place, place, b" ->", "put -> before it")
        problems.append(Diagnostic("warning", "arrow", said, line, one.start, one.end, fix=fix))


def _unknown(written: str, near: Action, form: _Form, line: int, at: int) -> Diagnostic:
    said = (
        f"[{written}…] is no action; did you mean {near.name}? "
        f"(a new one goes into [tool.modgraft.log.actions])"
    )
    fix = Fix(*form.name, near.name.encode(), f"write {near.name}")
    return Diagnostic("warning", "unknown-action", said, line, at, form.end, fix=fix)


def _marks(found: Found, one: Annotation, form: _Form) -> None:
    """The annotation's own signs; its arguments and result are text with marks of their own."""
    head = form.inside[0] if form.inside else form.result or form.name[1]
    found.marks.append(Span("annotation", one.start, head))
    if form.inside and form.result:
        found.marks.append(Span("annotation", form.inside[1], form.result))
    elif form.inside and form.close is not None and form.inside[1] < form.close:
        found.marks.append(Span("annotation", form.inside[1], form.inside[1] + 1))
    if form.close is not None:
        found.marks.append(Span("annotation", form.close, one.end))
