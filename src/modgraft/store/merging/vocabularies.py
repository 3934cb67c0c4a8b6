"""Compares the vocabularies of checkpoints: a row of embeddings is that of one word, or no merge.

Which word a row is of stands in no tensor, but in the tokenizer's files beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from modgraft.core.errors import CheckpointError
from modgraft.core.files import read_json

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
"""Files of sentencepiece, which are compared as bytes where there is nothing else."""


def check_vocabularies(folders: Sequence[Path]) -> None:
    """Refuse checkpoints whose tokenizers have another word for an id.

    Those without a tokenizer are taken to have the vocabulary of the others; so is an id that one
    of two tokenizers does not have.

    Raises:
        CheckpointError: with the first such id and both words.
    """
    known = [(folder, words(folder), _pieces(folder)) for folder in folders]
    for (one, ours, our_file), (other, theirs, their_file) in combinations(known, 2):
        if differ := [i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i]]:
            i = min(differ)
            what = f"id {i} is {ours[i]!r:.80} in {one} and {theirs[i]!r:.80} in {other}"
        elif not (ours and theirs) and our_file and their_file and our_file != their_file:
            what = f"the sentencepiece model of {one} is another than that of {other}"
        else:
            continue
        raise CheckpointError(
            f"{what}: the tokenizers differ, and a row of embeddings would be merged of two words; "
            f"merge models of one vocabulary"
        )


def words(folder: Path) -> dict[int, str]:
    """Return the word of each id that the tokenizer in a folder has; {} where none can be read."""
    found: dict[int, str] = {}
    if (path := folder / "tokenizer.json").is_file():
        said = _said(path)
        model = said.get("model")
        found = _by_id(model.get("vocab") if isinstance(model, dict) else None)
        added = said.get("added_tokens")
        for each in added if isinstance(added, list) else ():
            if isinstance(each, dict):
                found |= _by_id({each.get("content"): each.get("id")})
        return found
    if (path := folder / "vocab.json").is_file():
        found = _by_id(_said(path))
    elif (path := folder / "vocab.txt").is_file():
        lines = path.read_text("utf-8", errors="replace").removesuffix("\n").split("\n")
        found = dict(enumerate(line.rstrip("\r") for line in lines))
    if found and (path := folder / "added_tokens.json").is_file():
        found |= _by_id(_said(path))
    return found


def _by_id(vocabulary: Any) -> dict[int, str]:
    """Return words by id, of ``{word: id}`` or of ``[[word, score], …]``."""
    if isinstance(vocabulary, list):
        return {i: str(row[0]) for i, row in enumerate(vocabulary) if isinstance(row, list) and row}
    items = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return {i: word for word, i in items if isinstance(word, str) and type(i) is int}


def _pieces(folder: Path) -> str:
    paths = [path for name in _PIECES if (path := folder / name).is_file()]
    return hashlib.sha256(paths[0].read_bytes()).hexdigest() if paths else ""


def _said(path: Path) -> dict[str, Any]:
    return read_json(path, what="a tokenizer", remedy="copy it again")
