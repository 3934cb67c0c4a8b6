"""What the assistant's tools give back, typed: the MCP server's schemas are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from modgraft.log.index.query import Hit, Owed
    from modgraft.log.syntax.note import Diagnostic

LONGEST = 20_000
"""Characters of one result's text; what is longer is cut, and says so."""


class Found(BaseModel):
    """A passage of a note, exactly as it stands there."""

    file: str = Field(description="The note: its path in the log, as the tool `note` takes it.")
    line: int = Field(description="Its first line, from 1.")
    end_line: int = Field(description="Its last line.")
    text: str = Field(description="Those lines, exactly as they stand in the file now.")
    action: str = Field(description="The event's name; empty where it is a passage, no event.")
    arguments: str | None = Field(description="What stands in the event's brackets, if anything.")
    result: str | None = Field(description="What stands behind its arrow; '' if nothing does.")
    status: str = Field(
        description="Source: skimmed, digging, full_read, read. Question: open, answered."
    )
    when: str = Field(description="When it was written, ISO.")
    when_from: str = Field(description="How that is known: git, note, name or file (its time).")
    keys: list[str] = Field(description="The sources it cites.")
    cut: bool = Field(description="Whether the text goes on in the file.")


class Results(BaseModel):
    """What was found, and whether there is more."""

    found: list[Found]
    more: bool = Field(description="Whether there is more than was asked for; see `offset`.")


class Supported(BaseModel):
    """A line that an answer goes by."""

    file: str
    line: int
    text: str = Field(description="The line, read again from the file before it is given.")
    when: str


class Said(BaseModel):
    """An answer with the lines it goes by, or the reason why there is none."""

    question: str
    kind: str = Field(description="structured, backlink or temporal: exact; free: by likeness.")
    text: str = Field(description="The answer in words.")
    refused: str | None = Field(description="Why nothing is answered; null if something is.")
    evidence: list[Supported]
    more: int = Field(description="How many lines are left out here; `query` gives them all.")
    remarks: list[str]


class Source(BaseModel):
    """A source in the reading queue."""

    key: str
    title: str = Field(description="Its title; empty if the bibliography has no such key.")
    status: str = Field(description="How far it got: skimmed, digging, full_read, read.")
    owed: str = Field(description="What is still owed to it.")
    file: str
    line: int
    when: str


class Queue(BaseModel):
    """The reading queue."""

    sources: list[Source]


class Passage(BaseModel):
    """Lines of a note, exactly as they stand there."""

    file: str
    first_line: int
    last_line: int = Field(description="The last one given; ask again from the next one on.")
    lines: int = Field(description="How many the note has.")
    text: str
    cut: bool = Field(description="Whether the last line goes on in the file.")
    sections: list[str] = Field(description="The note's sections, each with its line.")
    degraded: bool = Field(description="Whether some of it could not be read as text.")


class Problem(BaseModel):
    """Something that `modgraft log check` found."""

    file: str
    line: int
    severity: str
    code: str
    message: str
    fix: str | None = Field(description="What could be done about it, in words.")


class Problems(BaseModel):
    """What `modgraft log check` found."""

    problems: list[Problem]
    errors: int
    more: int = Field(description="How many are left out here.")


class Added(BaseModel):
    """An event that was added."""

    file: str
    line: int
    text: str


def found(hit: Hit) -> Found:
    """A hit as the assistant gets it."""
    return Found(
        file=hit.note, line=hit.line, end_line=hit.end_line, text=hit.text[:LONGEST],
        action=hit.action, arguments=hit.arguments, result=hit.result, status=hit.status,
        when=hit.when, when_from=hit.when_from, keys=list(hit.keys), cut=len(hit.text) > LONGEST,
    )  # fmt: skip


def results(hits: list[Hit], limit: int) -> Results:
    """The first `limit` hits."""
    return Results(found=[found(hit) for hit in hits[:limit]], more=len(hits) > limit)


def source(owed: Owed) -> Source:
    """A row of the reading queue as the assistant gets it."""
    return Source(
        key=owed.key, title=owed.title, status=owed.status, owed=owed.owed, file=owed.note,
        line=owed.line, when=owed.when,
    )  # fmt: skip


def problem(each: Diagnostic, root: Path) -> Problem:
    """A diagnostic as the assistant gets it: its file named as in the log, whose root is `root`."""
    path = Path(each.note or "").absolute()
    inside = path.is_relative_to(root)
    return Problem(
        file=path.relative_to(root).as_posix() if inside else str(path), line=each.line,
        severity=each.severity, code=each.code, message=each.message,
        fix=each.fix.what if each.fix else None,
    )  # fmt: skip
