"""The page: what it shows, what it never does with a note, and whom it answers."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest
from log_folder import NOTE, png, write_log
from PIL import Image
from real_notes import NOTES, needs_notes

pytest.importorskip("starlette", reason="the extra `log` is not installed")

from starlette.testclient import TestClient

import modgraft
from modgraft.errors import ModgraftError
from modgraft.trajectory import Log, page

FIRST = "2024-05-03_first.md"
PAGES = ("/", "/notes", "/queue", "/questions", "/questions?all", "/lessons", "/search", "/ask")
VOID = {"meta", "link", "img", "input", "br", "hr"}
EVIL = """\
## Log <img src=x onerror=alert(1)>
- <script>alert(1)</script> [click](javascript:alert(1)) [file](file:///etc/passwd)
- [go](JaVaScRiPt:alert(1)) [data](data:text/html,<script>alert(1)</script>) <javascript:alert(1)>
- [vb](vbscript:msgbox) [tab](java\tscript:alert(1)) [new](&#106;avascript:alert(1))
- [rel](//evil.org/x)
- ![x](javascript:alert(1)) ![y](/etc/passwd) ![z](../secret.png) ![w](https://evil.org/track.png)
- [skim(<b onclick=alert(1)>@dewLichen2021</b>) -> <script>alert(2)</script>]
- [question -> "><script>alert(3)</script>] `<script>` $<script>$
- ![" onerror="alert(4)](asset/lichen.png)
- [a" onclick="alert(5)](https://example.org/"onclick="alert(6))
- https://example.org/"onclick=alert(7)
> <iframe src="https://evil.org"></iframe> {{ 7 * 7 }} @dewLichen2021"onclick="alert(8)

```<script>
</code></pre><script>alert(9)</script>
```
"""


class Reader(HTMLParser):
    """What a page would load and lead to, with every tag closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.labels: set[str] = set()
        self.fields: list[dict[str, str | None]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.append(tag)
        self.attributes |= set(given)
        self.links += [given["href"] or ""] if tag == "a" else []
        self.loads += [given[name] or "" for name in ("src", "srcset", "action") if name in given]
        self.loads += [given["href"] or ""] if tag == "link" else []
        if tag in {"input", "select"}:
            self.fields.append(given | {"labelled": "yes" if "label" in self.open else None})
        self.labels |= {given["for"] or ""} if tag == "label" and "for" in given else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_log(tmp_path_factory.mktemp("page") / "log")
    (folder / "evil.md").write_text(EVIL, "utf-8")
    (folder.parent / "secret.png").write_bytes(png())
    (folder / "way_out.png").symlink_to(folder.parent / "secret.png")
    (folder / "plain.txt").write_text("no picture")
    (folder / "draw.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    return folder


def client_of(folder: Path, index: Path) -> TestClient:
    log = Log.open(folder, index=index)
    return TestClient(
        page.app(log), base_url="http://127.0.0.1:8765", raise_server_exceptions=False
    )


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with client_of(folder, folder.parent / "index.sqlite") as made:
        yield made


def read(client: TestClient, path: str, status: int = 200) -> str:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    return answer.text


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


def test_what_a_note_holds_is_text(client: TestClient) -> None:
    html = read(client, "/note/evil.md")
    reader = Reader(html)
    inner = html.partition('<article class="note">')[2].partition("</article>")[0]
    own = Reader(inner)
    assert set(own.tags) <= {
        "div", "ul", "li", "span", "a", "img", "h2", "p", "blockquote", "pre", "code", "em"
    }  # fmt: skip
    assert all(re.match(r"(https?://|mailto:|/|#L\d)", link) for link in own.links), own.links
    assert not any(link.startswith("//") for link in own.links)
    assert own.attributes <= {"class", "id", "href", "title", "rel", "src", "alt", "loading",
                              "aria-label", "tabindex"}  # fmt: skip
    assert set(own.loads) == {"/figure/asset/lichen.png"}
    assert "{{ 7 * 7 }}" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "[click](javascript:alert(1))" in html or "javascript:alert(1)" not in reader.links
    for path in (
        "/",
        "/questions",
        "/search?q=script",
        "/search?q=%3Cscript%3E",
        "/ask?q=<script>",
    ):
        assert "<script>alert" not in read(client, path)


@pytest.mark.parametrize(
    "host", ["evil.org", "evil.org:8765", "127.0.0.1.evil.org", "", "10.0.0.1"]
)
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 400
    assert "lichen" not in answer.text.lower()
    assert "content-security-policy" in answer.headers


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1", "[::1]:8765"])
def test_this_machine_is_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


def test_nothing_can_be_posted(client: TestClient) -> None:
    assert client.post("/ask", data={"q": "x"}).status_code == 405


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.2", "::", "example.org", ""])
def test_the_page_is_served_to_this_machine_only(folder: Path, tmp_path: Path, host: str) -> None:
    with pytest.raises(ModgraftError, match="this machine only"):
        page.serve(Log.open(folder, index=tmp_path / "index.sqlite"), host=host)


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "..%2fsecret.png", "%2e%2e/secret.png", "way_out.png", "plain.txt",
     "sources.bib", FIRST, "/etc/passwd", "asset", "a%00.png", "asset/../../secret.png",
     "x" * 5000 + ".png"],
)  # fmt: skip
def test_only_pictures_of_the_log_are_served(client: TestClient, path: str) -> None:
    assert client.get(f"/figure/{path}").status_code == 404


def test_a_picture_of_the_log_is_served(client: TestClient) -> None:
    answer = client.get("/figure/asset/lichen.png")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content == png()
    drawing = client.get("/figure/draw.svg")
    assert "sandbox" in drawing.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/static/../page.py", "/static/..%2f..%2fpage.py", "/static/nothing", "/note/../page"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


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


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
SERVER = (
    "import sys; from modgraft.trajectory import Log, page; "
    "page.serve(Log.open(sys.argv[1], index=sys.argv[2]), port=int(sys.argv[3]))"
)


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    """The page by a process of its own."""
    port, index = str(free_port()), str(folder.parent / "served.sqlite")
    env = {**os.environ, "PYTHONPATH": str(Path(modgraft.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", SERVER, str(folder), index, port], env=env) as own:
        for _ in range(200):
            time.sleep(0.05)
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
                break
        yield f"http://127.0.0.1:{port}"
        own.terminate()


def seen(address: str, home: Path, *options: str) -> str:
    """What headless Chromium makes of an address, its complaints first."""
    assert BROWSER
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={home}", "--virtual-time-budget=2000", *options, address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return "\n".join([*complaints, done.stdout])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_runs_nothing_of_a_note(served: str, tmp_path: Path) -> None:
    dom = seen(f"{served}/note/evil.md", tmp_path, "--dump-dom")
    assert "CONSOLE" not in dom  # nothing was refused, for nothing was tried
    assert 'class="badge asking"' in dom


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("size", ["1200,900", "390,800"])
def test_a_browser_draws_a_note(served: str, tmp_path: Path, size: str) -> None:
    picture = tmp_path / "page.png"
    address = f"{served}/note/{FIRST}?line=15"
    seen(address, tmp_path / "home", f"--window-size={size}", f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == tuple(map(int, size.split(",")))
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert (0, 98, 155) in colours  # links and the button, so that the style sheet was read
    assert (255, 243, 209) in colours  # the marked line
