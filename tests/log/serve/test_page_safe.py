"""The page is safe to open: nothing of a note runs, and nothing but the log is served."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

import modgraft
from log.log_folder import png
from log.real_notes import notes
from log.serve.page_client import FIRST, Reader, read
from modgraft.core.errors import ModgraftError
from modgraft.log import Log, parse
from modgraft.log.serve import page
from modgraft.log.serve.web.inline import View, web
from modgraft.log.serve.web.outline import outline

TAGS = {
    "a", "blockquote", "br", "code", "div", "em", "h2", "h3", "h4", "h5", "h6", "hr", "img", "li",
    "ol", "p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {
    "alt", "aria-label", "class", "href", "id", "loading", "rel", "src", "tabindex", "title",
    "value",
}  # fmt: skip


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def test_what_a_note_holds_is_text(client: TestClient) -> None:
    html = read(client, "/note/evil.md")
    reader = Reader(html)
    inner = html.partition('<article class="note">')[2].partition("</article>")[0]
    own = Reader(inner)
    assert set(own.tags) <= TAGS
    assert all(re.match(r"(https?://|mailto:|/|#L\d)", link) for link in own.links), own.links
    assert not any(link.startswith("//") for link in own.links)
    assert own.attributes <= ATTRIBUTES
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


TABLE = "\n| a | b |\n|--|-:|\n| "
HARM = st.sampled_from(
    ["<script>", "</li>", "</div>", "<img src=x onerror=a>", '" onclick="a', "javascript:a", "&lt;",
     "[x](", "](javascript:a)", "![", "`", "``", "**", "$", "\\", "@dewLichen2021", "[skim(",
     ") -> ", "]", "]:", "<!--", "\0", "\r", "\n- ", "\n  > ", "\n```\n", "\n\n", TABLE,
     " | ", "\u202e", "https://a.b/?q"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        notes(),
        st.binary(max_size=200),
        st.lists(HARM | st.text(max_size=5), max_size=30).map("".join).map(encoded),
    )
)
def test_any_bytes_are_whole_html_with_every_line_and_word(data: bytes) -> None:
    note = parse(data, "any.md")
    view = View(lambda key: key, web, lambda target: None)
    own = Reader(f"<div>{outline(note, view).html}</div>")
    assert set(own.tags) <= TAGS
    assert own.attributes <= ATTRIBUTES
    assert all(re.match(r"(https?://|mailto:|/source/|#L\d)", link, re.I) for link in own.links)
    for block in note.blocks:
        assert f"L{block.line}" in own.ids
    shown = " ".join([*own.texts, *map(unquote, own.links)])
    for word in re.findall(r"[a-z]{4,}", note.text.replace("\0", " ")):
        assert word in shown


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


@pytest.mark.parametrize(
    ("site", "what", "status"),
    [
        ("cross-site", "image", 403),
        ("cross-site", "iframe", 403),
        ("same-site", "empty", 403),  # a script from another port of this machine
        ("cross-site", "document", 200),  # a link that is followed
        ("same-origin", "image", 200),
    ],
)
def test_another_site_loads_nothing(client: TestClient, site: str, what: str, status: int) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-dest": what}
    assert client.get("/ask?q=which questions are open", headers=headers).status_code == status


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


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
SERVER = (
    "import sys; from modgraft.log import Log; from modgraft.log.serve import page; "
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
