"""Recording by hand: started, added to, finished; whole, locked and append-only."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from log.real_notes import NAMES, NOTES, needs_notes, notes
from modgraft.core.errors import DataError, MissingFileError, ModgraftError
from modgraft.log import parse
from modgraft.log.record.editing import rewrite
from modgraft.log.record.record import add, finish, new_note, written

SIX = ["tl;dr", "Context", "Done", "Learned", "Next?", "Log"]


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return new_note(tmp_path / "fusion")


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def log_of(path: Path) -> list[str]:
    text = lines(path)
    return text[text.index("## Log") + 1 :]


def test_a_new_note_has_its_six_sections_and_is_written_once(note: Path) -> None:
    assert note.name == "fusion.md"
    assert [s.title for s in parse(note.read_bytes()).sections] == SIX
    add(note, "start(fusion)")
    before = note.read_bytes()
    with pytest.raises(DataError, match="such a note already"):
        new_note(note)
    assert note.read_bytes() == before
    assert [p.name for p in note.parent.iterdir()] == ["fusion.md"]
    assert new_note(note.parent / "v1.2").name == "v1.2.md"


def test_events_go_to_the_end_at_the_right_indent(note: Path) -> None:
    assert add(note, "skim(@hu2021) -> _digging", "Low rank is enough.", "Or is it?") == 12
    assert add(note, "question -> for vision too?", under="last") == 15
    assert add(note, "[soliloquy]: aloud", under=15) == 16
    assert add(note, "a line as it is", plain=True) == 17
    assert log_of(note) == [
        "- [skim(@hu2021) -> _digging]",
        "  - Low rank is enough.",
        "  - Or is it?",
        "  - [question -> for vision too?]",
        "    - [soliloquy]: aloud",
        "- a line as it is",
    ]
    events = parse(note.read_bytes()).events
    assert [(e.action, e.depth, e.line) for e in events] == [
        ("skim", 0, 12), ("question", 1, 15), ("soliloquy", 2, 16),
    ]  # fmt: skip


def test_the_log_is_append_only(note: Path) -> None:
    add(note, "start(fusion)")
    add(note, "read(@hu2021)")
    with pytest.raises(ModgraftError, match=r"under line 12.* append-only.* the lines 13"):
        add(note, "question -> why?", under=12)
    with pytest.raises(ModgraftError, match="the Log is empty"):
        add(new_note(note.with_name("empty")), "question -> why?", under="last")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("skimm(@hu2021)", "Did you mean skim"),
        ("read the docs", "Did you mean read"),
        ("nothing of the sort", "is no event"),
        ("question -> a\n- [lesson_learned -> b]", "is one line"),
        ("  ", "is one line"),
        ("question -> a\x00b", "not text in UTF-8"),
        ("question -> \udcff", "not text in UTF-8"),
    ],
)
def test_what_is_no_event_is_refused_and_nothing_written(note: Path, text: str, said: str) -> None:
    before = note.read_bytes()
    with pytest.raises(ModgraftError, match=said):
        add(note, text)
    assert note.read_bytes() == before


def test_what_would_not_be_read_back_is_refused(note: Path) -> None:
    note.write_text(note.read_text() + "```python\nx = 1\n")
    before = note.read_bytes()
    with pytest.raises(DataError, match="still open, such as a code fence"):
        add(note, "read(@hu2021)")
    assert note.read_bytes() == before


def test_a_note_without_a_log_or_no_note_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# only a title\n")
    with pytest.raises(DataError, match=r"a\.md.*no section '## Log'.*Add the line '## Log'"):
        add(tmp_path / "a.md", "read(@hu2021)")
    with pytest.raises(MissingFileError, match="log new NAME"):
        add(tmp_path / "b.md", "read(@hu2021)")


def test_line_endings_nesting_and_what_follows_the_log_are_kept(note: Path) -> None:
    data = b"## Log\r\n- [start(a)]\r\n    - four deep\r\n\r\n## After\r\ntext \xff"
    note.write_bytes(data)
    assert add(note, "question -> why?", under="last") == 4
    assert note.read_bytes() == data.replace(
        b"four deep\r\n", b"four deep\r\n    - [question -> why?]\r\n"
    )


def test_a_last_line_without_its_end_gets_one(note: Path) -> None:
    note.write_bytes(b"## Log\n- [start(a)]")
    add(note, "return(a)")
    assert note.read_bytes() == b"## Log\n- [start(a)]\n- [return(a)]\n"


@needs_notes
@pytest.mark.parametrize("name", NAMES)
def test_an_event_added_to_a_real_note_leaves_every_other_byte(name: str, tmp_path: Path) -> None:
    path = tmp_path / "note.md"
    path.write_bytes(data := (NOTES / f"{name}.md").read_bytes())
    if not any(s.title == "Log" for s in parse(data).sections):
        with pytest.raises(DataError, match="no section '## Log'"):
            add(path, "read(@hu2021)")
        return
    line = add(path, "read(@hu2021)", "and a remark")
    after = parse(path.read_bytes())
    new = path.read_bytes()
    start, end = after.line_range(line)[0], after.line_range(line + 1)[1]
    assert (new[:start] + new[end:]).rstrip(b"\n") == data.rstrip(b"\n")
    assert after.events[-1].keys == ("hu2021",)
    assert [e.action for e in after.events[:-1]] == [e.action for e in parse(data).events]


@given(notes(), st.sampled_from([None, "last"]))
@settings(max_examples=60)
def test_whatever_the_note_an_event_is_added_or_nothing_changes(
    data: bytes, under: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.md"
        path.write_bytes(data)
        try:
            line = add(path, "read(@hu2021)", under=under)
        except ModgraftError:
            assert path.read_bytes() == data
            return
        new = path.read_bytes()
    note = parse(new)
    start, end = note.line_range(line)
    rest = new[:start] + new[end:]
    assert rest.replace(b"\n", b"").replace(b"\r", b"") == data.replace(b"\n", b"").replace(
        b"\r", b""
    )
    assert [e.keys for e in note.events if e.line == line] == [("hu2021",)]


# -- whole, and one at a time ------------------------------------------------------------------

ADDER = """
import sys
from modgraft.log.record.record import add
for n in range(int(sys.argv[3])):
    add(sys.argv[1], f"calculate({sys.argv[2]} + {n})")
"""


def python(code: str, *args: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)])


def test_processes_that_add_at_once_lose_nothing(note: Path) -> None:
    several = [python(ADDER, note, k, 12) for k in range(4)]
    assert [p.wait(60) for p in several] == [0] * 4
    said = [e.arguments for e in parse(note.read_bytes()).events]
    assert sorted(said, key=str) == sorted(f"{k} + {n}" for k in range(4) for n in range(12))
    for k in range(4):  # each in its own order
        own = [s for s in said if s and s.startswith(f"{k} +")]
        assert own == [f"{k} + {n}" for n in range(12)]
    assert [p.name for p in note.parent.iterdir()] == ["fusion.md"]


def test_killed_while_it_writes_it_leaves_a_whole_note(note: Path) -> None:
    for wait in (0.0, 0.003, 0.01, 0.02, 0.04):
        size = len(parse(note.read_bytes()).events)
        process = python(ADDER, note, 7, 10_000)
        while len(parse(note.read_bytes()).events) == size:
            time.sleep(0.005)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = parse(note.read_bytes())
        assert all(e.closed for e in found.events)
        assert found.data.endswith(b"]\n")
        assert len(found.events) == len(found.data.split(b"## Log\n")[1].splitlines())
    count = len(parse(note.read_bytes()).events)
    note.with_name(".fusion.md.abc123.part").write_text("half")
    add(note, "start(again)")  # nobody holds the lock any more, and nothing is left lying
    assert [p.name for p in note.parent.iterdir()] == ["fusion.md"]
    assert len(parse(note.read_bytes()).events) == count + 1


def test_a_change_by_another_program_is_not_lost(note: Path) -> None:
    def slow(data: bytes) -> bytes:
        note.write_bytes(data + b"- from an editor\n")
        return data + b"- ours\n"

    with pytest.raises(DataError, match="changed by another program"):
        rewrite(note, slow)
    assert lines(note)[-1] == "- from an editor"
    assert len(list(note.parent.iterdir())) == 1


def test_a_link_stays_a_link_and_a_private_note_private(note: Path) -> None:
    note.chmod(0o600)
    link = note.with_name("link.md")
    link.symlink_to(note)
    add(link, "start(a)")
    assert link.is_symlink()
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert log_of(note) == ["- [start(a)]"]


# -- finished ----------------------------------------------------------------------------------


def test_finish_copies_lessons_and_ideas_and_the_log_stays(note: Path) -> None:
    add(note, "lesson_learned", "first", "second")
    add(note, "a remark. [eureka -> fuse earlier] And more.", plain=True)
    add(note, "read(@hu2021)")
    add(note, "hypothesize -> it holds", "for vision", under="last")
    log = log_of(note)
    made = finish(note)
    assert (made.learned, made.next) == (1, 2)
    assert log_of(note) == log
    text = note.read_text()
    assert "## Learned\n- [lesson_learned]\n  - first\n  - second\n\n## Next?\n" in text
    assert "- [eureka -> fuse earlier]\n- [hypothesize -> it holds]\n  - for vision\n\n" in text
    made = finish(note)
    assert (made.learned, made.next, note.read_text()) == (0, 0, text)
    add(note, "lesson_learned -> another")
    assert finish(note).learned == 1
    assert "  - second\n- [lesson_learned -> another]\n\n## Next?" in note.read_text()


@needs_notes
def test_finish_knows_what_the_real_notes_copied_themselves(tmp_path: Path) -> None:
    made = {}
    for name in NAMES:
        path = tmp_path / f"{name}.md"
        path.write_bytes((NOTES / path.name).read_bytes())
        if any(s.title == "Log" for s in parse(path.read_bytes()).sections):
            found = finish(path)
            made[name] = found.learned, found.next
    assert made.pop("gpt") == (3, 0)  # its Learned is empty
    assert set(made.values()) == {(0, 0)}


def test_events_that_share_a_line_are_copied_each_to_its_place(note: Path) -> None:
    add(note, "[eureka -> a], [lesson_learned -> b] and words", "a remark")
    add(note, "1. [lesson_learned -> c]", plain=True)
    finish(note)
    text = note.read_text()
    assert "## Learned\n- [lesson_learned -> b]\n" in text
    assert "## Next?\n- [eureka -> a]\n" in text
    assert finish(note).learned == 0


def test_an_event_is_taken_with_brackets_or_without() -> None:
    assert written(" skim(@a2020) ") == "[skim(@a2020)]"
    assert written("[skim(@a2020)]: worth it") == "[skim(@a2020)]: worth it"
    with pytest.raises(ModgraftError, match="is no event"):
        written("then [skim(@a2020)]")


DIES = """
import os, signal, sys
from pathlib import Path
from modgraft.log.record.record import add
real = Path.replace
def replace(self, target):
    if sys.argv[2] == "after":
        real(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.replace = replace
add(sys.argv[1], "read(@hu2021)")
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_the_exchange_it_is_the_old_note_or_the_new_one(note: Path, moment: str) -> None:
    add(note, "start(a)")
    before = note.read_bytes()
    assert python(DIES, note, moment).wait(60) == -signal.SIGKILL
    new = before + b"- [read(@hu2021)]\n"
    assert note.read_bytes() == (before if moment == "before" else new)
    add(note, "return(a)")  # the lock went with the process, and so does what it left lying
    assert [p.name for p in note.parent.iterdir()] == ["fusion.md"]
