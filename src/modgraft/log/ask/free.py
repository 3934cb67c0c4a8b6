"""Answer free questions with the lines that fit best by words and, with vectors, by meaning.

The rankings are fused by reciprocal rank, 1/(60 + rank) (Cormack et al. 2009). A block's coverage
is the share of the question that it holds, where each word weighs by how rare it is in the log. A
question is refused where no block covers enough of it, or where it holds a name or a number that
occurs nowhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import Answer, Evidence, Lookup, all_lines, first_line
from modgraft.log.ask.lexicon import GENERIC, content_words, stem
from modgraft.log.index.query import Hit, Query
from modgraft.log.index.rows import searchable
from modgraft.log.index.select import BLOCK_COLUMNS, Row, conditions, row
from modgraft.log.index.vectors import VectorsOffError

LINES = 5
"""How many lines a free answer shows."""
CANDIDATES = 30
"""How many blocks each ranking proposes."""
RANK_OFFSET = 60
"""The constant of reciprocal rank fusion."""

# Chosen on 40 questions about the real notes, none of which is among the tested ones. A question in
# the notes' own words about something they do not say is not always refused: 4 of 18 were not.
# Nothing here understands a line.
MIN_COVERAGE = 0.55
"""Without vectors: the coverage that some block must reach."""
MIN_SUM = 0.78
"""With vectors: what the sum of a block's coverage and cosine must reach."""
MIN_COVERAGE_UNKNOWN, MIN_COSINE_UNKNOWN = 0.75, 0.60
"""Where a plain word occurs nowhere: the coverage or the cosine that makes up for it."""
UNKNOWN_WEIGHT = 2.5
"""The weight of a word that occurs nowhere: the log may use a synonym."""
MAX_MATCHES = 3_000
"""How many blocks the words of a question may match in all: ranking each takes time."""
LONGEST = 20_000
"""Characters of a block that count for its coverage."""
CACHED = 10_000
"""How many blocks keep their stems for the next question."""
CONTEXT_COVERAGE = 0.75
"""The weight, for coverage, of a word in a block's context; a word in the block weighs 1."""
CONTEXT_RANK = 0.5
"""The weight, for BM25, of a block's context; the block itself weighs 1."""

_ALNUM = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Term:
    """A word of a question: its FTS5 expression, its weight and how many blocks hold it."""

    word: str
    match: str
    weight: float
    blocks: int


def free(lookup: Lookup) -> Answer:
    """Answer with the lines that fit best, or refuse and say why."""
    asked = lookup.question  # its period is a condition, and not words to search
    text = asked.text.replace(asked.period, " ") if asked.period else asked.text
    terms = weigh_terms(lookup, content_words(text))
    if not terms:
        return lookup.refuse("the question holds no word to look for")
    known = [t for t in terms if t.blocks]
    names = [t.word for t in terms if not t.blocks and is_name(t.word, lookup.question.text)]
    unknown = [t.word for t in terms if not t.blocks and t.word.lower() not in GENERIC]
    notes = len(lookup.index.notes())
    if names or not known:
        asked_for = " or ".join(repr(w) for w in names or unknown)
        return lookup.refuse(f"no line of the {notes} notes mentions {asked_for}")
    similar = _similar(lookup)
    ranking, shares = rank_blocks(lookup, terms, similar)
    hits = lookup.index.select(lambda: _rows(lookup, ranking))
    hits = _distinct(hits)[:LINES]
    if not hits:
        return refusals.no_match(lookup)
    lines = [_best_line(h, terms) for h in hits]
    if not _is_supported(shares, similar, bool(unknown)):
        near = f"the nearest is {lines[0].note}:{lines[0].line}"
        if unknown:
            asked_for = " or ".join(map(repr, unknown))
            reason = f"no line of the {notes} notes mentions {asked_for}; {near}"
        else:
            words = ", ".join(repr(t.word) for t in sorted(terms, key=lambda t: -t.weight)[:4])
            reason = f"no line says enough about {words} together; {near}"
        return lookup.refuse(reason, lines[:2])
    return lookup.answer(_summary(hits[0], lines), lines)


def _is_supported(shares: dict[int, float], similar: dict[int, float], unknown: bool) -> bool:
    """Return whether some block covers enough of the question."""
    share, cosine = (max(found.values(), default=0.0) for found in (shares, similar))
    if unknown:
        return share >= MIN_COVERAGE_UNKNOWN or cosine >= MIN_COSINE_UNKNOWN
    if not similar:
        return share >= MIN_COVERAGE
    return any(shares.get(i, 0.0) + similar.get(i, 0.0) >= MIN_SUM for i in {*shares, *similar})


def _best_line(hit: Hit, terms: Sequence[Term]) -> Evidence:
    """Return the line of a block that covers most of the question."""
    lines = all_lines(hit) or [first_line(hit)]
    if len(lines) == 1:
        return lines[0]
    parts = _parts(terms)

    def share(line: Evidence) -> float:
        stems = {stem(word) for word in _ALNUM.findall(searchable(line.quote[:LONGEST]))}
        return sum(weight for weight, wanted in parts if all(w in stems for w in wanted))

    return max(lines, key=share)


def _parts(terms: Sequence[Term]) -> list[tuple[float, list[str]]]:
    return [(t.weight, [stem(p) for p in _ALNUM.findall(searchable(t.word))]) for t in terms]


def _summary(hit: Hit, lines: Sequence[Evidence]) -> str:
    under = f", under {hit.action}({hit.arguments})" if hit.action and hit.arguments else ""
    more = f"; {len(lines) - 1} more lines fit" if len(lines) > 1 else ""
    first = lines[0]
    return f"{first.note}:{first.line}{under}: {first.quote.strip().lstrip('-*+ ')}{more}"


def weigh_terms(lookup: Lookup, words: Sequence[str]) -> list[Term]:
    """Weigh words by their inverse document frequency: the rarer in the blocks, the heavier."""
    database = lookup.index.database
    (total,) = database.cached("total", lambda: database.rows("SELECT count(*) FROM blocks")[0])
    counts: dict[str, int] = database.cached("counts", dict)
    terms: dict[str, Term] = {}
    for word in words:
        parts = _ALNUM.findall(searchable(word))
        if not parts:
            continue
        match = f'"{" ".join(parts)}"'
        if match not in counts:
            statement = "SELECT count(*) FROM block_words WHERE block_words MATCH ?"
            counts[match] = database.rows(statement, match)[0][0]
        count = counts[match]
        weight = math.log(1 + (total - count + 0.5) / (count + 0.5)) if count else UNKNOWN_WEIGHT
        terms.setdefault(match.lower(), Term(word, match, weight, count))
    return list(terms.values())


def is_name(word: str, question: str) -> bool:
    """Return whether a word is a name or a number, which an answering line would hold unchanged."""
    if any(c.isdigit() for c in word) or any(c.isupper() for c in word[1:]):
        return True
    first = question.split()[0].strip("\"'`(") if question.split() else ""
    return word[:1].isupper() and word != first


def rank_blocks(
    lookup: Lookup, terms: Sequence[Term], similar: dict[int, float]
) -> tuple[list[tuple[int, float]], dict[int, float]]:
    """Rank blocks by reciprocal rank fusion: (id, score), the best first, and their coverage."""
    where, values = _conditions(lookup)
    statement = (
        "SELECT blocks.id FROM block_words JOIN blocks ON blocks.id = block_words.rowid "  # noqa: S608
        f"WHERE block_words MATCH ? AND kind != 'heading'{where} "
        f"ORDER BY bm25(block_words, 1.0, {CONTEXT_RANK}) LIMIT {CANDIDATES}"
    )
    order = [i for (i,) in lookup.index.database.rows(statement, _match_expression(terms), *values)]
    near = sorted(similar, key=lambda i: -similar[i])[:CANDIDATES]
    shares = coverage(lookup, list({*order, *near}), terms)
    by_words = sorted(order, key=lambda i: -shares.get(i, 0.0))
    score: dict[int, float] = {}
    for ranks in (order, by_words, near):
        for rank, block in enumerate(ranks):
            score[block] = score.get(block, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(score.items(), key=lambda pair: -pair[1]), shares


def _match_expression(terms: Sequence[Term]) -> str:
    """Build the FTS5 expression: any of the rarer words, as many as `MAX_MATCHES` allows.

    Where even the rarest word is common, a block has to hold all of them.
    """
    known = sorted((t for t in terms if t.blocks), key=lambda t: t.blocks)
    if known[0].blocks > MAX_MATCHES:
        return " AND ".join(t.match for t in known)
    total, chosen = 0, []
    for term in known:
        total += term.blocks
        if total > MAX_MATCHES and chosen:
            break
        chosen.append(term.match)
    return " OR ".join(chosen)


def coverage(lookup: Lookup, blocks: Sequence[int], terms: Sequence[Term]) -> dict[int, float]:
    """Return each block's coverage: the share of the weight in its words and its context."""
    whole = sum(t.weight for t in terms)
    parts = _parts(terms)
    shares = {}
    for block, (own, above) in _stems(lookup, blocks).items():
        shares[block] = 0.0
        for weight, stems in parts:
            if all(s in own for s in stems):
                shares[block] += weight
            elif all(s in own or s in above for s in stems):
                shares[block] += weight * CONTEXT_COVERAGE
    return {block: weight / whole for block, weight in shares.items()}


def _stems(lookup: Lookup, blocks: Sequence[int]) -> dict[int, tuple[set[str], set[str]]]:
    """Return the stems of blocks and of their contexts, cached by block."""
    database = lookup.index.database
    known: dict[int, tuple[set[str], set[str]]] = database.cached("stems", dict)
    if len(known) > CACHED:
        known.clear()
    ids = ", ".join(str(block) for block in blocks if block not in known)
    statement = f"SELECT rowid, text, context FROM block_words WHERE rowid IN ({ids})"  # noqa: S608
    for block, text, context in database.rows(statement):
        words = (_ALNUM.findall(part) for part in (text[:LONGEST], context))
        own, above = ({stem(word) for word in part} for part in words)
        known[block] = own, above
    return {block: known[block] for block in blocks if block in known}


def _conditions(lookup: Lookup) -> tuple[str, list[object]]:
    """Return the note and the period of the question as SQL conditions on blocks."""
    asked = lookup.question
    query = Query(note=asked.note, since=asked.since, until=asked.until)
    where, values = conditions(lookup.index.database, query, lookup.index.actions, "blocks")
    return "".join(f" AND {condition}" for condition in where), values


def _rows(lookup: Lookup, ranking: Sequence[tuple[int, float]]) -> list[Row]:
    scores = dict(ranking[: 4 * LINES])
    ids = ", ".join(map(str, scores))
    statement = (
        f"SELECT {BLOCK_COLUMNS}, blocks.id FROM blocks JOIN files ON files.id = blocks.file "  # noqa: S608
        f"LEFT JOIN events ON events.id = blocks.event WHERE blocks.id IN ({ids})"
    )
    found = [row(r[:-1], scores[r[-1]]) for r in lookup.index.database.rows(statement)]
    return sorted(found, key=lambda r: -r.hit.score)


def _similar(lookup: Lookup) -> dict[int, float]:
    """Return the cosines of the nearest blocks; without vectors none, and a remark says so."""
    vectors = lookup.vectors
    try:
        found = vectors.nearest(lookup.question.text, CANDIDATES)
    except VectorsOffError as error:
        lookup.remarks.append(str(error))
        return {}
    if vectors.missing:
        lookup.remarks.append(f"{vectors.missing} blocks have no vector yet; index with vectors")
    where, values = _conditions(lookup)
    if where and found:
        ids = ", ".join(map(str, found))
        statement = f"SELECT id FROM blocks WHERE id IN ({ids}){where}"  # noqa: S608
        kept = {i for (i,) in lookup.index.database.rows(statement, *values)}
        found = {i: cosine for i, cosine in found.items() if i in kept}
    return found


def _distinct(hits: Sequence[Hit]) -> list[Hit]:
    """Keep each text once: a draft and its note share lines."""
    kept: dict[str, Hit] = {}
    for hit in hits:
        kept.setdefault(" ".join(hit.text.split()), hit)
    return list(kept.values())
