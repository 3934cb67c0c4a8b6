"""Docstrings of the standard library, numpy, scipy and scikit-learn, cut into excerpts by kind.

This is real text on every machine that runs modgraft, and others have defined how to detect two
habits in it: sessions at Python's prompt, by :mod:`doctest`, and bibliographic footnotes, by
reStructuredText. Files are parsed, not imported. A recipe's figures depend on the versions of these
packages.
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

#: folders without documentation, or of other packages
_SKIPPED = {"test", "tests", "_examples", "site-packages", "idlelib", "lib2to3", "pydoc_data"}
#: reStructuredText's footnotes and citations, docutils' "explicit markup": ".. [1] text"
_FOOTNOTE = re.compile(r"^[ \t]*\.\. \[[^\]\n]+\](?:[ \t]|$)", re.MULTILINE)
_PARSER = doctest.DocTestParser()
_WORDS = re.compile(r"[^\W_]+")
_SHINGLE, _ALIKE = 6, 0.3
_LENGTH = 500  # characters of an excerpt

Texts = Mapping[str, Mapping[str, list[str]]]
"""Split → kind → excerpts."""


def has_session(text: str) -> bool:
    """Return whether :mod:`doctest` finds a session at Python's prompt, even a malformed one."""
    try:
        return bool(_PARSER.get_examples(text))
    except ValueError:  # a prompt without a blank, or wrong indentation: still a session
        return True


def has_citation(text: str) -> bool:
    """Return whether there is a footnote of reStructuredText (``.. [1] Knuth, …``)."""
    return _FOOTNOTE.search(text) is not None


def before_habit(text: str) -> str:
    """Return the text before the first session or footnote, which invites it."""
    found = [m.start() for m in (re.search(r"^[ \t]*>>>", text, re.M), _FOOTNOTE.search(text)) if m]
    return text[: min(found)] if found else text


def kind_of(text: str) -> str | None:
    """Return ``"doctest"``, ``"citation"`` or, without a habit, ``"wanted"``; None with both."""
    session, citation = has_session(text), has_citation(text)
    if session and citation:
        return None
    return "doctest" if session else "citation" if citation else "wanted"


def excerpts(sizes: Mapping[str, int]) -> dict[str, dict[str, list[str]]]:
    """Return excerpts of docstrings by split and kind.

    An excerpt is a run of paragraphs of one docstring, with at most 500 characters, or a single
    longer paragraph, cut at 1,000. Its kind is ``"doctest"`` or ``"citation"`` if it has that
    habit, and ``"wanted"`` if it has none; excerpts with both are left out. ``"reference"`` is text
    of Python's language reference without habits. Files are ordered by the hash of their names; an
    eighth of them is for ``test``, an eighth for ``validation``. Repeated paragraphs are left out,
    and ``train`` has no paragraph that shares more than 30 % of its six-word runs with the other
    splits.

    Args:
        sizes: Kind → characters of ``train``, as ``{"wanted": 2_000_000, …}``; ``test`` and
            ``validation`` have at most an eighth of that.

    Raises:
        DataError: A kind does not exist, or less than half of the characters can be found.
    """
    if unknown := set(sizes) - set(KINDS):
        raise DataError(f"no kind {sorted(unknown)[0]!r}", remedy=f"kinds are {', '.join(KINDS)}")
    kept: dict[str, dict[str, list[str]]] = {s: {k: [] for k in sizes} for s in SPLITS}
    paragraphs: set[str] = set()
    shingles: set[int] = set()
    sources = _sources()
    for split in SPLITS:  # held-out splits first: train must not overlap with them
        shares = {k: n if split == "train" else n / 8 for k, n in sizes.items()}
        left = dict(shares)
        for kind, text in _excerpts_of(sources[split], paragraphs, shingles, split == "train"):
            if left.get(kind, 0) > 0:
                kept[split][kind].append(text)
                left[kind] -= len(text)
            if max(left.values(), default=0) <= 0:
                break
        _check_found(split, shares, left)
    return kept


def _check_found(split: str, shares: Mapping[str, float], left: Mapping[str, float]) -> None:
    """Refuse a split that lacks more than half of the characters of a kind."""
    for kind, share in shares.items():
        if left[kind] > share / 2:
            raise DataError(
                f"only {share - left[kind]:,.0f} of {share:,.0f} characters of {kind!r} were found "
                f"for {split} in {', '.join(PACKAGES)}",
                remedy="ask for less, or install these packages with their sources",
            )


def _excerpts_of(
    sources: list[tuple[str, Path | str]], known: set[str], held_out: set[int], training: bool
) -> Iterator[tuple[str, str]]:
    """Yield kind and text of each excerpt of these sources, without those of both habits."""
    for _, source in sources:
        for docstring in [source] if isinstance(source, str) else _docstrings_of_file(source):
            for text in _join_paragraphs(_new_paragraphs(docstring, known, held_out, training)):
                kind = kind_of(text)
                if not isinstance(source, str) and kind is not None:
                    yield kind, text
                elif kind == "wanted":
                    yield "reference", text


def _sources() -> dict[str, list[tuple[str, Path | str]]]:
    """Return split → its sources: label and file, or label and text of the language reference."""
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


def _docstrings_of_file(file: Path) -> Iterator[str]:
    """Yield the docstrings of a file's module, classes and functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in other people's files
        try:
            queue: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
        except (SyntaxError, UnicodeDecodeError):  # a template, or a test of the parser
            return
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
            queue += node.body


def _new_paragraphs(text: str, known: set[str], shingles: set[int], training: bool) -> list[str]:
    """Return the new paragraphs; of held-out ones, remember the runs of words."""
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


def _join_paragraphs(paragraphs: list[str]) -> Iterator[str]:
    """Join consecutive paragraphs to excerpts of up to ``_LENGTH`` characters.

    A paragraph with a habit stays together with the one before it, which leads to the habit.
    """
    held: list[str] = []
    for paragraph in paragraphs:
        if held and sum(map(len, held)) + len(paragraph) > _LENGTH:
            keep = 1 if kind_of(paragraph) != "wanted" and kind_of(held[-1]) == "wanted" else 0
            if len(held) > keep:
                yield "\n\n".join(held[: len(held) - keep])
            held = held[len(held) - keep :]
        held.append(paragraph[: 2 * _LENGTH])
    if held:
        yield "\n\n".join(held)


def _hash(label: str) -> int:
    return int.from_bytes(sha256(label.encode()).digest()[:8], "little")


def _split_of(label: str) -> str:
    return {0: "test", 1: "validation"}.get(_hash(label) % 8, "train")
