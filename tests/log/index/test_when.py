"""When a line was written: from real commits, else from the note, its name, or its file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from log.real_notes import commit, git
from modgraft.core.errors import ModgraftError
from modgraft.log import Log
from modgraft.log.index.git_dates import AddedLine, added_lines, fingerprint
from modgraft.log.index.times import date_in_name, leading_date, span


def times(log: Log) -> dict[str, tuple[str, str]]:
    """What is asked in each question, and when it was."""
    log.index()
    return {h.result or "": (h.when, h.when_from) for h in log.query(actions="question")}


def add(note: Path, *lines: str) -> None:
    with note.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def test_first_commit_of_a_line_counts_and_only_new_commits_are_read(tmp_path: Path) -> None:
    note = tmp_path / "a note.md"
    add(note, "## Log", "- [question -> one]")
    commit(tmp_path, "2023-01-05T10:00:00+0800")
    add(note, "- [question -> two]")
    commit(tmp_path, "2023-02-06T11:00:00+0000")
    with Log.open(tmp_path) as log:
        assert times(log) == {
            "one": ("2023-01-05T10:00:00", "git"),
            "two": ("2023-02-06T11:00:00", "git"),
        }
        add(note, "- [question -> three]")
        assert times(log)["three"][1] == "file"
        commit(tmp_path, "2023-03-07T12:00:00+0000")  # the file is as it was: only its time changes
        assert times(log)["three"] == ("2023-03-07T12:00:00", "git")
        (head,) = {git(tmp_path, "rev-parse", "HEAD")}
        assert log.database.rows("SELECT value FROM facts WHERE name LIKE 'git %'") == [(head,)]


def test_a_renamed_note_a_merge_and_a_moved_line_keep_their_times(tmp_path: Path) -> None:
    note = tmp_path / "old.md"
    add(note, "## Log", *(f"- line {i}" for i in range(30)), "- [question -> one]")
    commit(tmp_path, "2023-01-05T10:00:00+0000")
    git(tmp_path, "mv", "old.md", 'new "name" é.md')
    commit(tmp_path, "2023-01-06T10:00:00+0000")
    git(tmp_path, "checkout", "-q", "-b", "side")
    note = tmp_path / 'new "name" é.md'
    add(note, "- [question -> on the side]")
    commit(tmp_path, "2023-01-07T10:00:00+0000")
    git(tmp_path, "checkout", "-q", "main")
    add(tmp_path / "other.md", "  - [question -> on main]")
    commit(tmp_path, "2023-01-08T10:00:00+0000")
    git(tmp_path, "merge", "-q", "--no-edit", "side", at="2023-01-09T10:00:00+0000")
    (tmp_path / "other.md").write_text("# moved\n\n- [question -> on main]\n", encoding="utf-8")
    commit(tmp_path, "2023-01-10T10:00:00+0000")
    with Log.open(tmp_path) as log:
        assert times(log) == {
            "one": ("2023-01-05T10:00:00", "git"),
            "on the side": ("2023-01-07T10:00:00", "git"),
            "on main": ("2023-01-08T10:00:00", "git"),
        }


def test_history_that_was_rewritten_is_read_again(tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    add(note, "- [question -> one]")
    commit(tmp_path, "2023-01-05T10:00:00+0000")
    with Log.open(tmp_path) as log:
        assert times(log)["one"][0] == "2023-01-05T10:00:00"
        git(
            tmp_path, "commit", "-q", "--amend", "-m", "again", "--date", "2022-12-01T09:00:00+0000"
        )
        assert times(log)["one"][0] == "2022-12-01T09:00:00"


def test_history_rewritten_in_one_repository_leaves_the_times_of_another(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        add(folder / f"{folder.name}.md", f"- [question -> {folder.name}]")
        commit(folder, "2023-01-05T10:00:00+0000")
    with Log.open(*folders, index=tmp_path / "index.sqlite") as log:
        assert set(times(log).values()) == {("2023-01-05T10:00:00", "git")}
        again = "2022-12-01T09:00:00"
        git(folders[0], "commit", "-q", "--amend", "-m", "again", "--date", f"{again}+0000")
        (folders[1] / "two.md").touch()  # it is read again, its history is not
        assert times(log) == {"one": (again, "git"), "two": ("2023-01-05T10:00:00", "git")}


def test_lines_that_look_like_headers_of_a_diff(tmp_path: Path) -> None:
    note = tmp_path / "note.md"
    add(note, "++ b/other.md", "@@ -1 +1 @@", "-- a/x", "\0", "- [question -> one]")
    commit(tmp_path, "2023-01-05T10:00:00+0000")
    note.write_bytes(note.read_bytes().replace(b"++ b/other.md\n", b"") + b"- last, without an end")
    commit(tmp_path, "2023-01-06T10:00:00+0000")
    lines = list(added_lines(tmp_path, [tmp_path]))
    assert {line.path for line in lines} == {"note.md"}
    assert (
        AddedLine("note.md", fingerprint("- last, without an end"), "2023-01-06T10:00:00") in lines
    )
    assert len(lines) == 6


def test_dates_in_the_note_its_name_and_its_file(tmp_path: Path) -> None:
    add(
        tmp_path / "dated.md",
        *("## Log", "- 2023-03-04 09:30 [question -> own]", "  - [question -> under it]"),
        *("- [start(x)] 2023-03-05 10:00:07 UTC: go", "- [question -> bare]"),
    )
    add(tmp_path / "2023w9.md", "- [question -> week]")
    os.utime(tmp_path / "dated.md", (1_600_000_000, 1_600_000_000))
    with Log.open(tmp_path) as log:
        found = times(log)
        assert found["own"] == ("2023-03-04T09:30", "note")
        assert found["under it"] == ("2023-03-04T09:30", "note")
        assert found["week"] == ("2023-02-27", "name")
        assert found["bare"][0].startswith("2020-09-1")
        assert found["bare"][1] == "file"
        (started,) = log.query(actions="start")
        assert (started.when, started.when_from) == ("2023-03-05T10:00:07", "note")
        assert [h.result for h in log.query(until="2023-03-04", since="2023-03")] == [
            "own", "under it",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("2023", "2023-01-01", "2023-12-31T23:59:59"),
        ("2024-02", "2024-02-01", "2024-02-29T23:59:59"),
        ("2023w9", "2023-02-27", "2023-03-05T23:59:59"),
        ("2023-3-2", "2023-03-02", "2023-03-02T23:59:59"),
        ("2023-03-02T10:15", "2023-03-02T10:15:00", "2023-03-02T10:15:00"),
    ],
)
def test_spans(text: str, first: str, last: str) -> None:
    assert span(text) == (first, last)


@pytest.mark.parametrize("text", ["2023-13", "2023w60", "soon", "2023-02-30", ""])
def test_no_times(text: str) -> None:
    with pytest.raises(ModgraftError, match="write 2023, 2023-03"):
        span(text)


@given(st.dates(), st.sampled_from(["{}", "run-{}-b", "{}_draft"]), st.text(max_size=5))
def test_every_day_is_found_in_a_name_and_at_the_start_of_a_line(day, name, after: str) -> None:
    assert date_in_name(name.format(day.isoformat())) == day.isoformat()
    if not after[:1].isdigit():
        found = leading_date(f"  - [start(x) -> y]: {day.isoformat()}, {after}")
        assert found == day.isoformat()


@given(st.text(max_size=30))
def test_no_name_and_no_line_breaks_it(text: str) -> None:
    date_in_name(text)
    leading_date(text)
