"""An index that followed every change is the index that is built from nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from modgraft.log import Log, write_run

LINES = st.sampled_from(
    [
        *("## Log", "## Learned", "", "- a plain line", "  - deeper, of @b2021", "> quoted"),
        *("- [skim(@a2020) -> _digging]", "  - [question -> why?]", "    - because", "```"),
        *("- [lesson_learned]", "- two [eureka -> one], [blog -> https://x.y]", "- [open -> no"),
        *("- caf\udce9", "- 你們是蟲子", "\x00", "1. numbered", "![](figure.png)", "x = 1"),
    ]
)
NOTE = st.lists(LINES, max_size=12).map(
    lambda lines: "\n".join(lines).encode(errors="surrogateescape")
)
NAMES = st.sampled_from(["one.md", "two.md", "deep/three.md", "2023w9.md"])
CHANGES = st.lists(st.tuples(NAMES, st.none() | NOTE), min_size=1, max_size=6)
BIB = "@article{a2020, title={First}}\n@article{b2021, title={Second}}\n"

TABLES = {
    "events": "note, line, end_line, action, written, arguments, result, status, section, keys",
    "blocks": "note, line, end_line, kind, depth, section, text, hash",
    "cites": "note, line, key, argument, marked",
}


def contents(log: Log) -> dict[str, list[tuple]]:
    """Everything in the index but the numbers of its rows and times."""
    found = {
        table: sorted(
            log.database.rows(
                f"SELECT {columns} FROM {table} JOIN files ON files.id = {table}.file"
            ),
            key=repr,
        )
        for table, columns in TABLES.items()
    }
    for words, table in (("block_words", "blocks"), ("event_words", "events")):
        rows = log.database.rows(
            f"SELECT note, line, {words}.* FROM {words} LEFT JOIN {table} ON {table}.id = "
            f"{words}.rowid LEFT JOIN files ON files.id = {table}.file"
        )
        found[words] = sorted(rows, key=repr)
    return found


@settings(max_examples=25)
@given(st.lists(CHANGES, min_size=1, max_size=4), st.integers(0, 3))
def test_following_changes_is_building_anew(rounds: list[list], when_bib: int) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        with Log.open(folder, index=folder / "index" / "a.sqlite") as log:
            for number, changes in enumerate(rounds):
                for name, data in changes:
                    path = folder / name
                    path.parent.mkdir(exist_ok=True)
                    path.unlink(missing_ok=True)
                    if data is not None:
                        path.write_bytes(data)
                if number == when_bib:
                    (folder / "refs.bib").write_text(BIB, encoding="utf-8")
                done = log.index()
                assert done.seen == done.parsed + done.degraded == len(list(folder.rglob("*.md")))
            with Log.open(folder, index=folder / "index" / "b.sqlite") as anew:
                anew.index()
                assert contents(log) == contents(anew)
            for hit in log.query(text="line") + log.query():
                lines = (folder / hit.note).read_bytes().splitlines()
                shown = b"\n".join(lines[hit.line - 1 : hit.end_line]).decode("utf-8", "replace")
                assert hit.text == shown
    finally:
        shutil.rmtree(folder)


def test_a_run_that_recorded_itself_is_asked_what_it_reached(tmp_path: Path) -> None:
    said = {"Accuracy": "72.5 ± 0.4", "Shuffled images, the control": "51.0"}
    for day, headline in (("a", "accuracy 61.5"), ("b", "accuracy 72.5, three seeds")):
        write_run(tmp_path / day, "mmcot", headline=headline, learned=said)
    with Log.open(tmp_path) as log:
        answer = log.ask("what did the last mmcot run reach?")
        assert answer.refused is None
        assert answer.text.startswith("accuracy 72.5, three seeds (b/note.md:")
        quotes = [e.quote for e in answer.evidence]
        assert quotes[0].startswith("- [return(mmcot) -> accuracy 72.5, three seeds]")
        assert "- Accuracy: 72.5 ± 0.4" in quotes
        for evidence in answer.evidence:
            assert log.note(evidence.note).line(evidence.line) == evidence.quote
