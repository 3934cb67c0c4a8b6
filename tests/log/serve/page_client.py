"""The page for the tests: a client of it, a reader of what it says, and notes that mean harm."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from log.log_folder import png, write_log

pytest.importorskip("starlette", reason="the extra `log` is not installed")

from starlette.testclient import TestClient

from modgraft.log import Log
from modgraft.log.serve import page

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
        self.ids: set[str] = set()
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.append(tag)
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.texts += [value or "" for value in given.values()]
        self.attributes |= set(given)
        self.links += [given["href"] or ""] if tag == "a" else []
        self.loads += [given[name] or "" for name in ("src", "srcset", "action") if name in given]
        self.loads += [given["href"] or ""] if tag == "link" else []
        if tag in {"input", "select"}:
            self.fields.append(given | {"labelled": "yes" if "label" in self.open else None})
        self.labels |= {given["for"] or ""} if tag == "label" and "for" in given else set()
        if tag not in VOID:
            self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def write_page_log(folder: Path) -> Path:
    """The small log, with a note that means harm and files that are not to be served."""
    write_log(folder)
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


def read(client: TestClient, path: str, status: int = 200) -> str:
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    return answer.text
