"""The index is a cache: locked, damaged, unwritable or killed, it says so and loses nothing."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modgraft.core.errors import MissingFileError, ModgraftError, UnknownNameError
from modgraft.log import Log
from modgraft.log.index import indexer
from modgraft.log.index.database import LockedIndexError
from modgraft.log.index.find_notes import find_notes
from modgraft.log.settings import Settings, settings

NOTE = "## Log\n- [skim(@a2020) -> _digging]\n  - good\n- [question -> {}?]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.md").write_text(NOTE.format(name), encoding="utf-8")
    return folder


def questions(log: Log) -> list[str | None]:
    return [h.result for h in log.query(actions="question")]


def test_only_what_changed_is_indexed_and_what_is_gone_goes(folder: Path) -> None:
    with Log.open(folder) as log:
        done = log.index()
        assert (done.seen, done.parsed, done.degraded, done.changed, done.removed) == (
            2,
            2,
            0,
            2,
            0,
        )
        assert str(done).startswith("2 notes seen = 2 parsed + 0 degraded; 2 changed, 0 removed")
        assert log.index().changed == 0
        (folder / "one.md").write_text(NOTE.format("new"), encoding="utf-8")
        (folder / "two.md").unlink()
        (folder / "three.md").write_text(NOTE.format("three"), encoding="utf-8")
        done = log.index()
        assert (done.seen, done.changed, done.removed) == (2, 2, 1)
        assert questions(log) == ["new?", "three?"] or questions(log) == ["three?", "new?"]
        for table in ("blocks", "events", "block_words", "event_words", "cites"):
            (count,) = log.database.rows(f"SELECT count(*) FROM {table}")[0]
            assert count == {"blocks": 8, "events": 4, "block_words": 8, "event_words": 4}.get(
                table, 2
            )
    assert (folder / ".modgraft" / ".gitignore").read_text() == "*\n"


def test_a_note_that_changed_or_went_since_is_read_again_before_it_is_shown(folder: Path) -> None:
    with Log.open(folder) as log:
        log.index()
        (folder / "one.md").write_text("## Log\n\n- [question -> edited?]\n", encoding="utf-8")
        (hit,) = [h for h in log.query(actions="question") if h.note == "one.md"]
        assert (hit.line, hit.text) == (3, "- [question -> edited?]")
        (folder / "two.md").unlink()
        assert questions(log) == ["edited?"]
        (folder / "one.md").write_text("## Log\n", encoding="utf-8")
        answer = log.ask("what are my open questions?")
        assert answer.refused == "no open question is recorded in any of the 1 notes"


def test_one_index_of_several_folders_and_names_of_notes(tmp_path: Path) -> None:
    for place in ("log", "runs/a", "runs/b"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "note.md").write_text(NOTE.format(place), encoding="utf-8")
    with Log.open(tmp_path / "log", tmp_path / "runs") as log:
        assert log.settings.index == tmp_path / ".modgraft" / "log.sqlite"
        assert log.notes() == ["log/note.md", "runs/a/note.md", "runs/b/note.md"]
        assert [h.note for h in log.query(actions="skim", note="runs/*")] == [
            "runs/a/note.md", "runs/b/note.md",
        ]  # fmt: skip
        assert [h.note for h in log.query(actions="skim", note="a")] == ["runs/a/note.md"]
        assert log.note("runs/b").name == "runs/b/note.md"
        with pytest.raises(UnknownNameError, match=r"no note is named 'c'; there are: 'log/note"):
            log.query(note="c")
        with pytest.raises(UnknownNameError, match="no action is named 'skimm'"):
            log.query(actions="skimm")
        with pytest.raises(UnknownNameError, match="no status is named 'done'"):
            log.query(status="done")
        with pytest.raises(ModgraftError, match="holds no word to look for"):
            log.query(text='"" -')


def test_a_locked_index_is_waited_for_and_then_said(folder: Path) -> None:
    with Log.open(folder, wait=0.2) as log:
        log.index()
        other = sqlite3.connect(log.settings.index, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert questions(log) == ["one?", "two?"]  # readers do not wait for a writer
        (folder / "one.md").write_text(NOTE.format("new"), encoding="utf-8")
        with pytest.raises(LockedIndexError, match=r"another process is writing .* waited 0\.2 s"):
            log.index()
        other.execute("COMMIT")
        other.close()
        assert log.index().changed == 1


def test_a_file_that_is_no_index_is_said_and_built_again(folder: Path) -> None:
    with Log.open(folder) as log:
        log.index()
    log.settings.index.write_bytes(b"not a database, whatever its name says" * 1000)
    with Log.open(folder) as log:
        done = log.index()
        assert done.changed == 2
        assert len(done.problems) == 1
        assert done.problems[0].startswith(f"{log.settings.index}:1: warning index is damaged")
        assert questions(log) == ["one?", "two?"]
        assert log.index().problems == ()


def test_an_index_that_is_damaged_inside_is_built_again_where_it_is_noticed(folder: Path) -> None:
    with Log.open(folder) as log:
        log.index()
        log.database.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(log.settings.index.read_bytes())
    data[4096 : len(data)] = b"\x5a" * (len(data) - 4096)
    log.settings.index.write_bytes(data)
    with Log.open(folder) as log, pytest.warns(UserWarning, match="is damaged .* built again"):
        assert questions(log) == ["one?", "two?"]


def test_an_index_of_another_version_is_built_again(folder: Path) -> None:
    with Log.open(folder) as log:
        log.index()
        log.database.rows("PRAGMA user_version = 99")
    with Log.open(folder) as log:
        assert "is of version 99" in log.index().problems[0]
        assert questions(log) == ["one?", "two?"]


def test_an_index_that_cannot_be_written_is_kept_in_memory(folder: Path) -> None:
    (folder / ".modgraft").write_text("a file where the folder should be", encoding="utf-8")
    with Log.open(folder) as log:
        done = log.index()
        assert done.seen == 2
        assert "cannot be written" in done.problems[0]
        assert "kept in memory" in done.problems[0]
        assert questions(log) == ["one?", "two?"]
        assert log.index(anew=True).changed == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_index_is_read_into_memory(folder: Path) -> None:
    with Log.open(folder) as log:
        log.index()
    (folder / ".modgraft").chmod(0o500)
    log.settings.index.chmod(0o400)
    try:
        with Log.open(folder) as log:
            assert log.database.in_memory
            assert log.index().changed == 0
            assert questions(log) == ["one?", "two?"]
    finally:
        (folder / ".modgraft").chmod(0o700)


def test_loops_of_links_and_notes_reached_twice(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / "again.md").symlink_to(folder / "one.md")
    (folder / "dangling.md").symlink_to(folder / "nowhere.md")
    (folder / "ring.md").symlink_to(folder / "ring.md")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.md").write_text("not entered", encoding="utf-8")
    with Log.open(folder) as log:
        done = log.index()
        assert log.notes() == ["one.md", "two.md"]
        assert done.seen == done.parsed == 2
        said = "\n".join(done.problems)
        assert f"{folder}/loop:1: info link leads to {folder}, which was read" in said
        assert f"{folder}/again.md:1: info link leads to {folder}/one.md, taken once" in said
        assert f"{folder}/dangling.md:1: error unreadable No such file or directory" in said
        assert f"{folder}/ring.md:1: error unreadable Too many levels of symbolic links" in said
        assert len(done.problems) == 4


def test_a_note_deleted_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_then_delete(folders):
        found = find_notes(folders)
        (folder / "two.md").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(indexer, "find_notes", find_then_delete)
    with Log.open(folder) as log:
        done = log.index()
        assert done.problems == (f"{folder}/two.md:1: warning deleted while it was read",)
        assert (done.seen, done.parsed, done.degraded) == (1, 1, 0)
        assert questions(log) == ["one?"]


def test_degraded_notes_are_kept_searchable_and_reported_each_time(folder: Path) -> None:
    bad = folder / "bad.md"
    bad.write_bytes(b"## Log\n- fine\n- caf\xe9 \xff costs\n- [question -> still here?]\n")
    with Log.open(folder) as log:
        for _ in range(2):
            done = log.index()
            assert (done.seen, done.parsed, done.degraded) == (3, 2, 1)
            assert len(done.problems) == 1
            assert done.problems[0].startswith("bad.md:3: error ")
        assert "still here?" in questions(log)
        (hit,) = log.query(text="costs")
        assert hit.text == "- caf� � costs"


def test_a_broken_bibliography_costs_its_entry_alone(folder: Path) -> None:
    bib = folder / "refs.bib"
    bib.write_bytes(
        b"@article{a2020, title={Good {One}}, year=2020,"
        b' author={Ada Byron and M{\\"o}bius, August}}\n'
        b"@article{broken, title={no end, year=2021}\n"
        b"\n@article{b2021, title={Second}, date={2021-03}}\n"
        b"@article{c2022, title={caf\xe9}}\n"
        b"@article{a2020, title={Again}}\n"
    )
    with Log.open(folder) as log:
        done = log.index()
        assert [p.removeprefix(f"{bib}:").partition(" warning")[0] for p in done.problems] == [
            "2:", "5:", "6:",
        ]  # fmt: skip
        entries = log.bibliography.entries
        assert set(entries) == {"a2020", "b2021", "c2022"}
        assert entries["a2020"].authors == ("Ada Byron", "August Möbius")
        assert (entries["a2020"].title, entries["a2020"].line) == ("Good One", 1)
        assert entries["b2021"].year == "2021"
        assert log.index().problems == done.problems
        assert log.bibliography.nearest("@A2020") == ["a2020"]
        assert log.bibliography.nearest("b2022") != []
        # its titles are searched with the notes that cite them, and follow its changes
        assert log.query(actions="skim", text="good one")
        bib.write_text("@article{a2020, title={Renamed}}", encoding="utf-8")
        assert log.index().changed == 2
        assert log.query(actions="skim", text="renamed")


def test_a_folder_or_a_bibliography_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no such folder"):
        Log.open(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="there is no such bibliography"):
        Log.open(tmp_path, bibliography=tmp_path / "no.bib")
    with pytest.raises(MissingFileError, match=r"neither log nor runs is a folder here.*log new"):
        settings_at(tmp_path)


def settings_at(start: Path, **table: str) -> Settings:
    text = "[tool.modgraft.log]\n" + "".join(f"{k} = {v}\n" for k, v in table.items())
    (start / "pyproject.toml").write_text(text, encoding="utf-8")
    return settings(start=start)


def test_what_the_project_says_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "papers").mkdir()
    found = settings_at(tmp_path, folders='["papers"]', vectors="true")
    assert found.folders == (tmp_path / "papers",)
    assert found.index == tmp_path / ".modgraft" / "log.sqlite"
    assert found.vectors
    monkeypatch.setenv("MODGRAFT_LOG", str(tmp_path))
    assert settings_at(tmp_path).folders == (tmp_path,)
    with pytest.raises(ModgraftError, match=r"has no 'folder'.*It has: folders"):
        settings_at(tmp_path, folder='["log"]')
    with pytest.raises(ModgraftError, match=r"folders is 'log'.*a list, as"):
        settings_at(tmp_path, folders='"log"')
    with pytest.raises(ModgraftError, match=r"folders is \[1\].*a list, as"):
        settings_at(tmp_path, folders="[1]")
    monkeypatch.setenv("MODGRAFT_LOG", os.pathsep)
    with pytest.raises(MissingFileError, match="MODGRAFT_LOG=: names no folder"):
        settings_at(tmp_path)
    monkeypatch.delenv("MODGRAFT_LOG")
    with pytest.raises(MissingFileError, match=r"\[tool.modgraft.log\] folders names no folder"):
        settings_at(tmp_path, folders="[]")
    for text, said in (("tool = 3", "'tool' is 3"), ("[tool]\nmodgraft = 3", "'modgraft' is 3")):
        (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ModgraftError, match=f"{said}, no table"):
            settings(start=tmp_path)


def test_killed_in_the_middle_of_indexing_it_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for i in range(400):
        (folder / f"{i:03}.md").write_text(NOTE.format(i) * 20, encoding="utf-8")
    index = tmp_path / "index.sqlite"
    code = (
        "import sys; from modgraft.log import Log\nLog.open(sys.argv[1], index=sys.argv[2]).index()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), str(index)])
    done = 0
    deadline = time.monotonic() + 30
    while done < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
        if index.exists():
            done = _count(index)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = _count(index)
    assert 20 <= done < 400
    with Log.open(folder, index=index) as log:
        assert log.database.rows("PRAGMA integrity_check") == [("ok",)]
        finished = log.index()
        assert (finished.seen, finished.changed) == (400, 400 - done)
        assert len(questions(log)) == 8000


def _count(index: Path) -> int:
    try:
        with sqlite3.connect(index, timeout=1) as db:
            return db.execute("SELECT count(*) FROM files").fetchone()[0]
    except sqlite3.OperationalError:  # not made yet
        return 0
