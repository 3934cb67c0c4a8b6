"""A text to train a language model on: any file, or the source of the standard library."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.library import MODULES

LENGTH = 1_100_000
"""The characters of the default corpus, as many as tinyshakespeare has."""


def read_corpus(path: str | Path | None) -> str:
    """Return the text of a file, or for None the default one.

    Raises:
        MissingFileError: there is no such file.
        DataError: it is empty, or no text in UTF-8; it says where.
    """
    if path is None:
        return standard_library(LENGTH)
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(
            "no such text", file=file, remedy="Give the path of a text file, or leave it out"
        )
    data = file.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"line {line}, byte {error.start}: this is no text in UTF-8", file=file,
            remedy="Convert it: iconv -t UTF-8",
        ) from error  # fmt: skip
    if not text.strip():
        raise DataError("the text is empty", file=file, remedy="Give one with characters in it")
    return text


@cache
def standard_library(length: int) -> str:
    """Return ``length`` characters of the running interpreter's own library, in ASCII.

    They are the sources of the modules of :data:`modgraft.data.library.MODULES`, each a like share
    from its beginning on. They depend on the version of Python, and so do figures on them.
    """
    home = Path(sysconfig.get_path("stdlib"))
    texts = []
    for name in MODULES.split():
        path = home.joinpath(*name.split("."))
        file = path.with_suffix(".py")
        file = file if file.is_file() else path / "__init__.py"
        if file.is_file() and (text := file.read_text(encoding="utf-8")).isascii():
            texts.append(text)
    texts.sort(key=len)
    chosen, left = [], length
    for number, text in enumerate(texts):
        share = text[: left // (len(texts) - number)]
        chosen.append(share)
        left -= len(share)
    return "".join(chosen)


def split(tokens: np.ndarray, share: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Return the first ``share`` of a corpus, to train on, and the rest."""
    at = int(share * len(tokens))
    return tokens[:at], tokens[at:]
