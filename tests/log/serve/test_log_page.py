"""The page: what it shows, what it leads to, and what it says when there is nothing to show."""

from __future__ import annotations

import re
import socket
import sqlite3
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from log.log_folder import NOTE, write_log
from log.real_notes import NOTES, needs_notes
from log.serve.page_client import FIRST, PAGES, Reader, client_of, read
from modgraft.core.errors import ModgraftError
from modgraft.log import Log
from modgraft.log.serve import page


@pytest.mark.parametrize("path", [*PAGES, f"/note/{FIRST}", "/note/evil.md", "/nowhere"])
def test_every_page_is_whole_labelled_and_loads_only_its_own(client: TestClient, path: str) -> None:
    answer = client.get(path)
    reader = Reader(answer.text)
    assert all(load.startswith("/") and not load.startswith("//") for load in reader.loads)
    assert not {name for name in reader.attributes if name.startswith("on") or name == "style"}
    assert reader.tags.count("script") == 1  # the file of the head; nothing inline
    assert reader.tags.count("h1") == 1
    levels = [int(tag[1]) for tag in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(low <= high + 1 for high, low in pairwise(levels))
    for field in reader.fields:
        assert field["labelled"] or field.get("id") in reader.labels
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_port_that_is_taken_is_said(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ModgraftError, match=f"127.0.0.1:{port}: .*Name another port"):
            page.serve(Log.open(folder, index=tmp_path / "index.sqlite"), port=port)


def test_an_index_that_is_locked_is_said(tmp_path: Path) -> None:
    folder, index = write_log(tmp_path / "log"), tmp_path / "index.sqlite"
    log = Log.open(folder, index=index, wait=0.05)
    log.index()
    with (
        closing(sqlite3.connect(index, isolation_level=None)) as other,
        TestClient(page.app(log), base_url="http://127.0.0.1:8765") as client,
    ):
        other.execute("BEGIN EXCLUSIVE")
        (folder / "second.md").write_text("## Log\n- [eureka -> another]\n", "utf-8")
        assert "another process is writing" in read(client, "/", 503)
        other.execute("ROLLBACK")
        assert "another" in read(client, "/")


def test_names_that_are_patterns_or_addresses(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    names = ["[draft].md", "a b?c#d.md", "ünï/[x]*.md", "d.md"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"## Log\n- [eureka -> {name}]\n", "utf-8")
    with client_of(folder, tmp_path / "index.sqlite") as client:
        links = Reader(read(client, "/notes")).links
        for name in names:
            (link,) = {link for link in links if link == f"/note/{quote(name)}"}
            assert f'<span class="result">{name}</span>' in read(client, link)


def test_a_note_is_shown_with_events_lines_and_sources(client: TestClient) -> None:
    html = read(client, f"/note/{FIRST}?line=15")
    lines = NOTE.splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            assert f'id="L{number}"' in html
    assert '<li><div class="block item hit" id="L15">' in html.replace("\n", "")
    assert '<span class="badge reading">skim</span>' in html
    assert 'title="Lichens Grow · Ada Dew, Ben Moss · 2021">@dewLichen2021</a>' in html
    assert '<span class="result">_digging</span>' in html
    assert 'href="/note/second.md"' in html
    assert 'href="https://example.org/a_b" rel="noreferrer noopener"' in html
    assert '<img src="/figure/asset/lichen.png"' in html
    assert '<span class="math">$\\theta&#39; = \\theta_0 + \\varphi$</span>' in html
    assert '<a href="/note/second.md?line=5#L5">second.md:5</a>' in html  # also cites Modular Ferns


def test_a_table_is_a_table(client: TestClient, folder: Path) -> None:
    note = folder / "table.md"
    note.write_text("| who | n |\n|---|--:|\n| `x` [b](second.md) | 1 |\n", "utf-8")
    time.sleep(page.FRESH)
    html = read(client, "/note/table.md")
    assert '<th class="number">n</th>' in html
    assert '<code>x</code> <a href="/note/second.md">b</a></td>' in html
    note.unlink()


def test_lists_lead_to_lines(client: TestClient) -> None:
    assert f'<a href="/note/{FIRST}?line=18#L18">' in read(client, "/questions")
    questions = read(client, "/questions?all")
    assert "does it hold on small models?" in questions
    assert "does it hold on small models?" not in read(client, "/questions")
    assert "keep the host frozen" in read(client, "/lessons")
    queue = read(client, "/queue")
    assert queue.index("To dig deeper") < queue.index("Lichens Grow")
    assert "Modular Ferns" in queue[queue.index("Read <") :]
    timeline = read(client, "/")
    assert "3 May 2024" in timeline
    assert "by the note’s name" in timeline


@pytest.mark.parametrize("path", ["/?page=", "/questions?page=", "/search?action=question&page="])
def test_pages_hold_every_event_once(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    for note in range(6):
        asked = "\n".join(f"- [question -> number{note}x{n}x?]" for n in range(20))
        (folder / f"2024-01-0{note + 1}.md").write_text(f"## Log\n{asked}\n", "utf-8")
    with client_of(folder, tmp_path / "index.sqlite") as client:
        pages = [read(client, f"{path}{number}") for number in (1, 2, 3)]
        found = [re.findall(r"number\dx\d+x", page) for page in pages]
        assert [len(each) for each in found] == [50, 50, 20]
        assert len({name for each in found for name in each}) == 120
        assert 'rel="next"' in pages[1]
        assert 'rel="next"' not in pages[2]


def test_a_search_by_fields(client: TestClient) -> None:
    html = read(client, "/search?q=routing")
    assert "Routing is the hard part." in html
    html = read(client, "/search?action=skim&cites=fernModular2022&status=full_read")
    assert "second.md:5" in html
    assert "Nothing in the log matches" in read(client, "/search?q=zebra")
    assert "2023-03-02" in read(client, "/search?since=soon", 400)
    assert "no action" in read(client, "/search?action=dance", 404)


def test_a_source_and_one_that_is_missing(client: TestClient) -> None:
    html = read(client, "/source/dewLichen2021")
    assert 'href="https://example.org/lichen"' in html
    assert "Slowly &amp; surely." in html
    assert f"{FIRST}:15" in html
    assert "javascript:" not in read(client, "/source/fernModular2022")
    assert "is not in the bibliography" in read(client, "/source/nobodyMissing2020")
    assert "dewLichen2021" in read(client, "/source/dewLichn2021", 404)


def test_the_answer_has_its_lines_and_a_refusal_its_reason(client: TestClient) -> None:
    html = read(client, "/ask?q=Which questions are open?")
    assert "who picks the module?" in html
    assert f'href="/note/{FIRST}?line=18#L18"' in html
    html = read(client, "/ask?q=What did I conclude about the price of tin in Peru?")
    assert "No answer." in html


def test_an_edited_note_is_shown_as_it_is(client: TestClient, folder: Path) -> None:
    note = folder / "draft.md"
    note.write_text("## Log\n- [eureka -> one]\n", "utf-8")
    time.sleep(page.FRESH)
    assert "one" in read(client, "/note/draft.md")
    note.write_text("## Log\n- [eureka -> two]\n", "utf-8")
    assert "two" in read(client, "/note/draft.md")
    note.unlink()
    time.sleep(page.FRESH)
    assert "no note" in read(client, "/note/draft.md", 404)


def test_an_empty_log_and_no_bibliography_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with client_of(tmp_path / "log", tmp_path / "index.sqlite") as client:
        html = read(client, "/")
        assert "modgraft log new" in html
        assert "There is no bibliography" in html
        for path in PAGES:
            Reader(read(client, path))


def test_degraded_notes_are_shown_and_marked(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "bad.md").write_bytes(b"## Log\n- caf\xe9 \x00 [eureka -> \xff]\n")
    (tmp_path / "log" / "deep.md").write_text(
        "\n".join("  " * n + f"- level {n}" for n in range(3000)), "utf-8"
    )
    (tmp_path / "log" / "wide.md").write_text(f"- {'word ' * 400_000}\n- after\n", "utf-8")
    with client_of(tmp_path / "log", tmp_path / "index.sqlite") as client:
        html = read(client, "/note/bad.md")
        assert "could not be read" in html
        assert "caf\ufffd" in html
        deep = Reader(read(client, "/note/deep.md?line=2900"))
        assert "/note/deep.md?page=1" in deep.links
        wide = read(client, "/note/wide.md")
        assert "cut here" in wide
        assert "after" in wide
        assert len(wide) < 100_000
        assert len(read(client, "/search?q=word")) < 100_000


@needs_notes
def test_the_real_notes(tmp_path: Path) -> None:
    with client_of(NOTES, tmp_path / "index.sqlite") as client:
        for note in sorted(NOTES.glob("*.md")):
            html = read(client, f"/note/{note.name}")
            Reader(html)
            for number, line in enumerate(note.read_text("utf-8").splitlines(), start=1):
                if line.strip() and f'id="L{number}"' not in html:
                    raise AssertionError(f"{note.name}:{number} is not on its page: {line}")
        for path in PAGES:
            Reader(read(client, path))
        assert "<b>69</b><span>events</span>" in read(client, "/")
        assert "a person, perhaps" in read(
            client, "/note/modular_deep_learning.md"
        )  # by @S…Redford
