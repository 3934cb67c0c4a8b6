"""Docstrings of the standard library, numpy, scipy and scikit-learn, cut into excerpts by kind.

Real text that is on every machine that runs modgraft, and in which two habits can be counted by
rules that are not ours: sessions at Python's prompt, as :mod:`doctest` reads them, and
bibliographic footnotes, as reStructuredText defines them. Nothing is imported to be read: files are
parsed. The figures of a recipe belong to the versions it was run with.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path

from modgraft.core.errors import DataError

KINDS = ("wanted", "doctest", "citation", "reference")
SPLITS = ("test", "validation", "train")
PACKAGES = ("stdlib", "numpy", "scipy", "sklearn")

#: folders that hold no documentation, or another package's
_SKIPPED = {"test", "tests", "_examples", "site-packages", "idlelib", "lib2to3", "pydoc_data"}
#: reStructuredText's footnotes and citations, docutils' "explicit markup": ".. [1] text"
_FOOTNOTE = re.compile(r"^[ \t]*\.\. \[[^\]\n]+\](?:[ \t]|$)", re.MULTILINE)
_PARSER = doctest.DocTestParser()
_WORDS = re.compile(r"[^\W_]+")
_SHINGLE, _ALIKE = 6, 0.3

Texts = Mapping[str, Mapping[str, list[str]]]
"""Split → kind → excerpts."""


def has_session(text: str) -> bool:
    """Whether :mod:`doctest` finds a session at Python's prompt in it, also a malformed one."""
    try:
        return bool(_PARSER.get_examples(text))
    except ValueError:  # a prompt without its blank, an inconsistent indent: a session all the same
        return True


def has_citation(text: str) -> bool:
    """Whether it holds a footnote as reStructuredText defines one (``.. [1] Knuth, …``)."""
    return _FOOTNOTE.search(text) is not None


def before_habit(text: str) -> str:
    """What stands before the first session or footnote: the text that invites it."""
    found = [m.start() for m in (re.search(r"^[ \t]*>>>", text, re.M), _FOOTNOTE.search(text)) if m]
    return text[: min(found)] if found else text


def kind_of(text: str) -> str | None:
    """``"doctest"``, ``"citation"`` or ``"wanted"``; None for one that has both habits."""
    session, citation = has_session(text), has_citation(text)
    if session and citation:
        return None
    return "doctest" if session else "citation" if citation else "wanted"


def excerpts(sizes: Mapping[str, int], *, length: int = 500) -> dict[str, dict[str, list[str]]]:
    """Excerpts of docstrings by split and kind.

    An excerpt is consecutive paragraphs of one docstring, of ``length`` characters at most unless
    it is one paragraph, cut at ``2 * length``; it is ``"doctest"`` or ``"citation"`` if it has that
    habit, and ``"wanted"`` with neither; one with both is left out. ``"reference"`` is Python's
    language reference, without either. Files come in an order that their names' hash gives, one in
    eight is of ``test``, one in eight of ``validation``. A paragraph stands once; one of which more
    than 30 % of the runs of six words stand in what is held out is not trained on.

    Args:
        sizes: characters that ``train`` is to have of each kind, ``{"wanted": 2_000_000, …}``;
            ``test`` and ``validation`` have an eighth of it at most.
        length: characters of an excerpt.

    Raises:
        DataError: a kind that nobody knows, or of which there is not half as much as asked for.
    """
    if unknown := set(sizes) - set(KINDS):
        raise DataError(f"no kind {sorted(unknown)[0]!r}", remedy=f"kinds are {', '.join(KINDS)}")
    room = {(s, k): n if s == "train" else n / 8 for s in SPLITS for k, n in sizes.items()}
    kept: dict[tuple[str, str], list[str]] = {part: [] for part in room}
    paragraphs: set[str] = set()
    shingles: set[int] = set()
    sources = _sources()
    for split in SPLITS:  # what is held out comes first: train takes nothing that is in it
        wanted = {kind for kind in sizes if room[split, kind] > 0}
        for kind, text in _excerpts_of(
            sources[split], paragraphs, shingles, split == "train", length
        ):
            if kind in wanted:
                kept[split, kind].append(text)
                room[split, kind] -= len(text)
                wanted = {k for k in sizes if room[split, k] > 0}
            if not wanted:
                break
    for (split, kind), left in room.items():
        share = sizes[kind] if split == "train" else sizes[kind] / 8
        if left > share / 2:
            raise DataError(
                f"only {share - left:,.0f} of {share:,.0f} characters of {kind!r} were found for "
                f"{split} in {', '.join(PACKAGES)}",
                remedy="ask for less, or install these packages with their sources",
            )
    return {s: {k: kept[s, k] for k in sizes} for s in SPLITS}


def _excerpts_of(
    sources: list[tuple[str, Path | str]], known: set[str], held_out: set[int], training: bool,
    length: int,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Kind and text of each excerpt of these sources that is of one kind."""
    for _, source in sources:
        for docstring in [source] if isinstance(source, str) else _of_file(source):
            for text in _cut(_fresh(docstring, known, held_out, training), length):
                kind = kind_of(text)
                if not isinstance(source, str) and kind is not None:
                    yield kind, text
                elif kind == "wanted":
                    yield "reference", text


def _sources() -> dict[str, list[tuple[str, Path | str]]]:
    """Split → what it reads, label and file; a topic of the language reference is its text."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    found: list[tuple[str, Path | str]] = sorted(topics.items())
    files: list[tuple[str, Path | str]] = []
    for package in PACKAGES:
        root = _root(package)
        for file in root.rglob("*.py"):
            inside = file.relative_to(root)
            if not _SKIPPED.intersection(inside.parts):
                files.append((f"{package}/{inside.as_posix()}", file))
    found += sorted(files, key=lambda f: _hash(f[0]))
    return {s: [f for f in found if _split_of(f[0]) == s] for s in SPLITS}


def _root(package: str) -> Path:
    if package == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} is not installed", remedy="run `make setup`")
    return Path(spec.submodule_search_locations[0])


def _of_file(file: Path) -> Iterator[str]:
    """Docstrings of a file's module, classes and functions, in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its escapes, which are not ours
        try:
            queue: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
        except (SyntaxError, UnicodeDecodeError):  # a template or a test of the parser: no module
            return
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
            queue += node.body


def _fresh(text: str, known: set[str], shingles: set[int], training: bool) -> list[str]:
    """Paragraphs that were not there before; their runs of words are remembered if held out."""
    made = []
    for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
        words = _WORDS.findall(paragraph.lower())
        key = " ".join(words)
        if key in known or not words:
            continue
        known.add(key)
        runs = {hash(tuple(words[i : i + _SHINGLE])) for i in range(len(words) - _SHINGLE + 1)}
        if training and len(runs & shingles) > _ALIKE * len(runs):
            continue
        if not training:
            shingles |= runs
        made.append(paragraph.rstrip())
    return made


def _cut(paragraphs: list[str], length: int) -> Iterator[str]:
    """Consecutive paragraphs joined up to ``length`` characters.

    One with a habit keeps the paragraph before it, where there is one: what leads to a habit
    belongs to it.
    """
    held: list[str] = []
    for paragraph in paragraphs:
        if held and sum(map(len, held)) + len(paragraph) > length:
            keep = 1 if kind_of(paragraph) != "wanted" and kind_of(held[-1]) == "wanted" else 0
            if len(held) > keep:
                yield "\n\n".join(held[: len(held) - keep])
            held = held[len(held) - keep :]
        held.append(paragraph[: 2 * length])
    if held:
        yield "\n\n".join(held)


def _hash(label: str) -> int:
    return int.from_bytes(sha256(label.encode()).digest()[:8], "little")


def _split_of(label: str) -> str:
    return {0: "test", 1: "validation"}.get(_hash(label) % 8, "train")
