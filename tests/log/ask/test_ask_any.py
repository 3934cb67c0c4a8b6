"""Whatever is asked, the log answers with lines that stand, or refuses; it never breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modgraft.core.errors import ModgraftError
from modgraft.log import Log

NOTE = """\
## tl;dr
Boats are slow.

## Log
- [skim(@a2020) -> _digging]
  - The engine is loud.
- [question -> why is the keel heavy?]: for balance
- [lesson_learned -> paint the hull in March]
  ```
  speed = 12
  ```
"""
BIB = "@article{a2020, title={Boats: A Survey}, author={Roe, Ada}, year={2020}}\n"
PIECES = st.sampled_from(
    [
        *("when", "what did I", "skim", "read", "cite", "@a2020", "@nobody2021", "boats", "in"),
        *("about", "before", "2023-03-02", "2023w99", "last week", "in March", "since", "the"),
        *("how many", "questions", "open", "lessons", "the last run", "hull", "why", "engine"),
        *("99999999999 days ago", '"', "(", "*", "NEAR", "note", "boat.md", "?", "是", "\0"),
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    folder = tmp_path_factory.mktemp("log")
    (folder / "boat.md").write_text(NOTE, encoding="utf-8")
    (folder / "refs.bib").write_text(BIB, encoding="utf-8")
    with Log.open(folder) as log:
        log.index()
        yield log


@given(question=st.lists(PIECES, min_size=1, max_size=9).map(" ".join) | st.text(max_size=60))
@example(question="what changed since 0001-01-01?")
@example(question="'; DROP TABLE files; --")
@example(question="boats " * 500)
def test_no_question_breaks_it(log: Log, question: str) -> None:
    if not any(c.isalnum() for c in question):
        with pytest.raises(ModgraftError, match="is no question"):
            log.ask(question)
        return
    answer = log.ask(question)
    assert answer.text
    assert answer.refused is None or answer.refused == answer.text
    for evidence in answer.evidence:
        path: Path = log.settings.root / evidence.note
        lines = path.read_bytes().splitlines()
        assert lines[evidence.line - 1].decode() == evidence.quote


ALIKE = """\
## Log
- [read(@roeBoats2020b)]: a sequel
  - it leans on @roeBoats2020
- [skim(@dewSails2021b) -> _full_read], see @dewSails2021
- [skim(@ROEboats2020c)]
"""


def test_a_key_that_begins_like_another_is_not_that_other(tmp_path: Path) -> None:
    """What is only cited beside a source was neither read nor skimmed."""
    (tmp_path / "boat.md").write_text(ALIKE, encoding="utf-8")
    keys = [f"{key}{letter}" for key in ("roeBoats2020", "dewSails2021") for letter in ("", *"bc")]
    entries = [f"@article{{{key}, title={{T}}, author={{A, B}}, year={{2020}}}}" for key in keys]
    (tmp_path / "refs.bib").write_text("\n".join(entries), encoding="utf-8")
    with Log.open(tmp_path) as log:
        queue = {owed.key: owed.status for owed in log.reading_queue()}
        assert queue == {
            "dewSails2021b": "full_read", "ROEboats2020c": "skimmed", "roeBoats2020b": "read"
        }  # fmt: skip
        for question, text in (
            ("what is still to be read?", "1 to read in full"),  # an example of the command's help
            ("did I read @roeBoats2020b?", "Yes: it was read, at boat.md:2"),
            ("did I skim @roeBoats2020c?", "Yes: it was skimmed"),
            ("did I read @roeBoats2020?", "neither skimmed nor read"),
            ("when did I read @roeBoats2020?", "cited at boat.md:3, and was never read"),
            ("what did I quote from @dewSails2021?", "it is only cited"),
            ("did I skim @dewSails2021?", "neither skimmed nor read"),
        ):
            assert text in log.ask(question).text, question
