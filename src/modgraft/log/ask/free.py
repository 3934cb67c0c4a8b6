"""Free questions: the lines that fit best, by words and, where there are vectors, by meaning.

The two orders are fused by reciprocal rank, 1/(60 + rank) (Cormack et al. 2009). A question is
refused where no line carries enough of it: each of its words weighs by how rare it is in the log,
and a name or number that occurs nowhere cannot be answered about.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import Answer, Evidence
from modgraft.log.ask.evidence import Asking, line_of, lines_of
from modgraft.log.ask.lexicon import GENERIC, content_words, stem
from modgraft.log.index.query import Hit
from modgraft.log.index.rows import searchable
from modgraft.log.index.select import BLOCK, Row, notes_named, row
from modgraft.log.index.vectors import VectorsOffError

LINES = 5
"""Lines that a free answer shows."""
POOL = 30
"""Blocks that each of the two orders proposes."""
FUSION = 60

# Chosen on 40 questions about the real notes, none of which is among the tested ones. What is asked
# in words that the notes use, of a thing that they do not say, is not always refused: 4 of 18 were
# not. Nothing here understands a line.
ENOUGH = 0.55
"""Without vectors: the share of a question's weight that one block must hold."""
TOGETHER = 0.78
"""With vectors: that share and the block's cosine, added."""
NEARLY_ALL, ALIKE = 0.75, 0.60
"""Where a plain word occurs nowhere: the share, or the cosine, that makes up for it."""
UNKNOWN = 2.5
"""The weight of such a word: what it means may be said by another."""
PROPOSE = 3_000
"""Blocks that the words of a question may propose in all: ranking each costs time."""
LONGEST = 20_000
"""Characters of a block that are looked at for its share."""
REMEMBERED = 10_000
"""Blocks whose words are kept for the next question."""
ABOVE = 0.75
"""How much a word above a block counts for its share, beside one of its own."""
CONTEXT = 0.5
"""How much the words above a block count for its rank, beside its own."""

_ALNUM = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Term:
    """A word of a question, as FTS5 looks for it, and how much it weighs."""

    word: str
    match: str
    weight: float
    blocks: int


def free(asking: Asking) -> Answer:
    """The lines that support an answer, or why there are none."""
    words = content_words(_rest(asking))
    terms = weighed(asking, words)
    if not terms:
        return asking.refuse("the question holds no word to look for")
    known = [t for t in terms if t.blocks]
    names = [t.word for t in terms if not t.blocks and is_name(t.word, asking.asked.question)]
    unknown = [t.word for t in terms if not t.blocks and t.word.lower() not in GENERIC]
    notes = len(asking.log.notes())
    if names or not known:
        asked_for = " or ".join(repr(w) for w in names or unknown)
        return asking.refuse(f"no line of the {notes} notes mentions {asked_for}")
    similar = _by_meaning(asking)
    ranked, held = fused(asking, terms, similar)
    hits = asking.log.select(lambda: _rows(asking, ranked))
    hits = _once(hits)[:LINES]
    if not hits:
        return refusals.nothing(asking)
    lines = [best_line(h, terms) for h in hits]
    if not _supported(held, similar, bool(unknown)):
        near = f"the nearest is {lines[0].note}:{lines[0].line}"
        if unknown:
            asked_for = " or ".join(map(repr, unknown))
            reason = f"no line of the {notes} notes mentions {asked_for}; {near}"
        else:
            words = ", ".join(repr(t.word) for t in sorted(terms, key=lambda t: -t.weight)[:4])
            reason = f"no line says enough about {words} together; {near}"
        return asking.refuse(reason, lines[:2])
    return asking.answer(_text(hits[0], lines), lines)


def _supported(held: dict[int, float], similar: dict[int, float], unknown: bool) -> bool:
    """Whether some block carries enough of the question."""
    share = max(held.values(), default=0.0)
    if unknown:
        return share >= NEARLY_ALL or max(similar.values(), default=0.0) >= ALIKE
    if not similar:
        return share >= ENOUGH
    return any(held.get(i, 0.0) + similar.get(i, 0.0) >= TOGETHER for i in {*held, *similar})


def best_line(hit: Hit, terms: Sequence[Term]) -> Evidence:
    """The line of a block of several (a fence, a quote) that holds most of the question."""
    lines = lines_of(hit) or [line_of(hit)]
    if len(lines) == 1:
        return lines[0]
    parts = _parts(terms)

    def share(line: Evidence) -> float:
        stems = {stem(word) for word in _ALNUM.findall(searchable(line.quote[:LONGEST]))}
        return sum(weight for weight, wanted in parts if all(w in stems for w in wanted))

    return max(lines, key=share)


def _parts(terms: Sequence[Term]) -> list[tuple[float, list[str]]]:
    return [(t.weight, [stem(p) for p in _ALNUM.findall(searchable(t.word))]) for t in terms]


def _text(hit: Hit, lines: Sequence[Evidence]) -> str:
    under = f", under {hit.action}({hit.arguments})" if hit.action and hit.arguments else ""
    more = f"; {len(lines) - 1} more lines fit" if len(lines) > 1 else ""
    first = lines[0]
    return f"{first.note}:{first.line}{under}: {first.quote.strip().lstrip('-*+ ')}{more}"


def _rest(asking: Asking) -> str:
    """The question without its time and its note, which are conditions and not words."""
    asked = asking.asked
    text = asked.question
    if asked.moment is not None:
        text = text.replace(asked.moment.words, " ")
    return text


def weighed(asking: Asking, words: Sequence[str]) -> list[Term]:
    """The words with their weights: the rarer in the log's blocks, the heavier."""
    store = asking.log.store
    (total,) = store.remembered("total", lambda: store.rows("SELECT count(*) FROM blocks")[0])
    counts: dict[str, int] = store.remembered("counts", dict)
    terms: dict[str, Term] = {}
    for word in words:
        parts = _ALNUM.findall(searchable(word))
        if not parts:
            continue
        match = f'"{" ".join(parts)}"'
        if match not in counts:
            statement = "SELECT count(*) FROM block_words WHERE block_words MATCH ?"
            counts[match] = store.rows(statement, match)[0][0]
        count = counts[match]
        weight = math.log(1 + (total - count + 0.5) / (count + 0.5)) if count else UNKNOWN
        terms.setdefault(match.lower(), Term(word, match, weight, count))
    return list(terms.values())


def is_name(word: str, question: str) -> bool:
    """Whether a word is a name or a number, which a line that answers would hold as it is."""
    if any(c.isdigit() for c in word) or any(c.isupper() for c in word[1:]):
        return True
    first = question.split()[0].strip("\"'`(") if question.split() else ""
    return word[:1].isupper() and word != first


def fused(
    asking: Asking, terms: Sequence[Term], similar: dict[int, float]
) -> tuple[list[tuple[int, float]], dict[int, float]]:
    """Block ids by reciprocal rank, the best first; and the share of the question each holds."""
    where, values = _conditions(asking)
    statement = (
        "SELECT blocks.id FROM block_words JOIN blocks ON blocks.id = block_words.rowid "  # noqa: S608
        f"WHERE block_words MATCH ? AND kind != 'heading'{where} "
        f"ORDER BY bm25(block_words, 1.0, {CONTEXT}) LIMIT {POOL}"
    )
    order = [i for (i,) in asking.log.store.rows(statement, _proposed(terms), *values)]
    near = sorted(similar, key=lambda i: -similar[i])[:POOL]
    held = covered(asking, list({*order, *near}), terms)
    by_words = sorted(order, key=lambda i: -held.get(i, 0.0))
    score: dict[int, float] = {}
    for ranks in (order, by_words, near):
        for rank, block in enumerate(ranks):
            score[block] = score.get(block, 0.0) + 1 / (FUSION + rank)
    return sorted(score.items(), key=lambda pair: -pair[1]), held


def _proposed(terms: Sequence[Term]) -> str:
    """What FTS5 looks for: the rarer words, as many as are cheap; common ones only rank.

    Where even the rarest is common, blocks that hold all of them are looked for.
    """
    known = sorted((t for t in terms if t.blocks), key=lambda t: t.blocks)
    if known[0].blocks > PROPOSE:
        return " AND ".join(t.match for t in known)
    total, chosen = 0, []
    for term in known:
        total += term.blocks
        if total > PROPOSE and chosen:
            break
        chosen.append(term.match)
    return " OR ".join(chosen)


def covered(asking: Asking, blocks: Sequence[int], terms: Sequence[Term]) -> dict[int, float]:
    """The share of the question's weight that each block holds, in its words or those above it."""
    whole = sum(t.weight for t in terms)
    parts = _parts(terms)
    held = {}
    for block, (own, above) in _stems(asking, blocks).items():
        held[block] = 0.0
        for weight, stems in parts:
            if all(s in own for s in stems):
                held[block] += weight
            elif all(s in own or s in above for s in stems):
                held[block] += weight * ABOVE
    return {block: weight / whole for block, weight in held.items()}


def _stems(asking: Asking, blocks: Sequence[int]) -> dict[int, tuple[set[str], set[str]]]:
    """The words of blocks and of what is above them, without endings; looked up once a block."""
    store = asking.log.store
    known: dict[int, tuple[set[str], set[str]]] = store.remembered("stems", dict)
    if len(known) > REMEMBERED:
        known.clear()
    ids = ", ".join(str(block) for block in blocks if block not in known)
    statement = f"SELECT rowid, text, context FROM block_words WHERE rowid IN ({ids})"  # noqa: S608
    for block, text, context in store.rows(statement):
        words = (_ALNUM.findall(part) for part in (text[:LONGEST], context))
        own, above = ({stem(word) for word in part} for part in words)
        known[block] = own, above
    return {block: known[block] for block in blocks if block in known}


def _conditions(asking: Asking) -> tuple[str, list[object]]:
    asked = asking.asked
    where, values = "", list[object]()
    if asked.note is not None:
        ids = notes_named(asking.log.store, asked.note)
        where += f" AND blocks.file IN ({', '.join('?' * len(ids))})"
        values += ids
    if asked.since is not None:
        where += " AND blocks.at >= ?"
        values.append(asked.since)
    if asked.until is not None:
        where += " AND blocks.at <= ?"
        values.append(asked.until)
    return where, values


def _rows(asking: Asking, ranked: Sequence[tuple[int, float]]) -> list[Row]:
    scores = dict(ranked[: 4 * LINES])
    ids = ", ".join(map(str, scores))
    statement = (
        f"SELECT {BLOCK}, blocks.id FROM blocks JOIN files ON files.id = blocks.file "  # noqa: S608
        f"LEFT JOIN events ON events.id = blocks.event WHERE blocks.id IN ({ids})"
    )
    found = [row(r[:-1], scores[r[-1]]) for r in asking.log.store.rows(statement)]
    return sorted(found, key=lambda r: -r.hit.score)


def _by_meaning(asking: Asking) -> dict[int, float]:
    """Cosines of the blocks nearest to the question; empty where vectors are off, which is said."""
    vectors = asking.vectors
    try:
        found = vectors.nearest(asking.asked.question, POOL)
    except VectorsOffError as error:
        asking.remarks.append(str(error))
        return {}
    if vectors.missing:
        asking.remarks.append(f"{vectors.missing} blocks have no vector yet; index with vectors")
    where, values = _conditions(asking)
    if where and found:
        ids = ", ".join(map(str, found))
        statement = f"SELECT id FROM blocks WHERE id IN ({ids}){where}"  # noqa: S608
        kept = {i for (i,) in asking.log.store.rows(statement, *values)}
        found = {i: cosine for i, cosine in found.items() if i in kept}
    return found


def _once(hits: Sequence[Hit]) -> list[Hit]:
    """Each text once: a draft and its note share lines."""
    kept: dict[str, Hit] = {}
    for hit in hits:
        kept.setdefault(" ".join(hit.text.split()), hit)
    return [replace(h) for h in kept.values()]
