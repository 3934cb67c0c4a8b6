"""A last look before an answer is shown: is every line still in its file, as it is quoted?"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from modgraft.core.errors import ModgraftError
from modgraft.log.ask.answer import Answer, Evidence

if TYPE_CHECKING:
    from modgraft.log.index.index import Index


def verified(index: Index, answer: Answer) -> Answer:
    """The answer with the lines that stand in their files now; withdrawn where none is left."""
    files: dict[str, list[bytes]] = {}
    bibliographies = {e.note for e in answer.evidence if e.note.lower().endswith(".bib")}
    for note in {e.note for e in answer.evidence}:
        files[note] = []
        with suppress(OSError, ModgraftError):  # gone: then none of its lines stands
            path = index.settings.root / note if note in bibliographies else index.path(note)
            files[note] = path.read_bytes().splitlines()
    kept = tuple(e for e in answer.evidence if _stands(e, files[e.note]))
    if len(kept) == len(answer.evidence):
        return answer
    if kept:
        lost = f"{len(answer.evidence) - len(kept)} lines changed while they were read"
        return replace(answer, evidence=kept, remarks=(*answer.remarks, lost))
    reason = "the notes changed while they were read, and no line of the answer stands; ask again"
    return replace(answer, text=reason, evidence=(), refused=reason)


def _stands(evidence: Evidence, lines: list[bytes]) -> bool:
    if not 1 <= evidence.line <= len(lines):
        return False
    return lines[evidence.line - 1].decode("utf-8", "replace") == evidence.quote
