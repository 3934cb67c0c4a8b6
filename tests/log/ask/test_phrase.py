"""A model may phrase what was verified and add nothing to it; asked over HTTP, as it would be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modgraft.log import Evidence, Log
from modgraft.log.ask.phrase import objection

NOTE = """\
## Log
- [lesson_learned -> Sparse finetuning does not add parameters, so it is better than an adapter.]
- [lesson_learned -> The base model reached 84.91% with gated fusion.]
"""
LINES = NOTE.splitlines()[1:]
QUESTION = "what lessons did I learn?"


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server that says what the test wants it to, after doing ``first``."""

    said = "nothing"
    status = 200
    raw: bytes | None = None
    asked: dict[str, Any] | None = None
    path = ""
    key: str | None = None
    first = staticmethod(lambda: None)


class Handler(BaseHTTPRequestHandler):
    """One completion."""

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        length = int(self.headers["Content-Length"])
        server.key = self.headers.get("Authorization")
        server.asked, server.path = json.loads(self.rfile.read(length)), self.path
        server.first()
        body = {"choices": [{"message": {"role": "assistant", "content": server.said}}]}
        data = server.raw if server.raw is not None else json.dumps(body).encode()
        self.send_response(server.status)
        self.send_header("Location", "http://127.0.0.1:9/")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silently."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def log(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    (tmp_path / "note.md").write_text(NOTE, encoding="utf-8")
    endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1"
    monkeypatch.setenv("MODGRAFT_LOG_ENDPOINT", endpoint)
    monkeypatch.setenv("MODGRAFT_LOG_MODEL", "tiny")
    with Log.open(tmp_path) as log:
        log.index()
        yield log


GOOD = (
    "Sparse finetuning is better than an adapter, as it does not add parameters [1]. The base "
    "model reached 84.91% with gated fusion [2]."
)


def test_a_phrasing_that_its_lines_hold_is_shown_with_them(
    log: Log, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.said = GOOD
    answer = log.ask(QUESTION)
    assert server.key is None
    monkeypatch.setenv("MODGRAFT_LOG_KEY", "abc")
    assert log.ask(QUESTION) == answer
    assert server.key == "Bearer abc"
    assert answer.text == GOOD
    assert [e.quote for e in answer.evidence] == LINES
    assert answer.remarks == (f"phrased by {log.settings.endpoint}",)
    assert server.path == "/v1/chat/completions"
    assert server.asked is not None
    assert server.asked["model"] == "tiny"
    sent = server.asked["messages"][1]["content"]
    assert sent == f"Question: {QUESTION}\n\nLines:\n[1] {LINES[0]}\n[2] {LINES[1]}"


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("Sparse finetuning is better than LoRA [1].", "'LoRA' is not in its line"),
        ("The base model reached 94.91% [2].", "'94.91%' is not in its line"),
        ("It reached 84.91% [1].", "'reached' is not in its line"),
        ("Better than 84.91% [1].", "'84.91%' is not in its line"),
        ("Sparse finetuning adds parameters [1].", "leaves a denial out"),
        ("Gated fusion never reached 84.91% [2].", "denies what its line does not"),
        ("Sparse finetuning is faster [1].", "'faster' is not in its line"),
        ("Sparse finetuning is better than an adapter.", "does not end with the number"),
        ("Gated fusion [2]. And it is cheap.", "does not end with the number"),
        ("It is better [7].", "there is no line [7]"),
        ("<script>alert(1)</script> [1].", "'script' is not in its line"),
    ],
)
def test_what_adds_to_its_lines_is_rejected_and_the_lines_shown(
    log: Log, server: Server, said: str, why: str
) -> None:
    server.said = said
    answer = log.ask(QUESTION)
    assert answer.text == "2 lessons."
    assert [e.quote for e in answer.evidence] == LINES
    assert len(answer.remarks) == 1
    assert "was rejected: " in answer.remarks[0]
    assert why in answer.remarks[0]


@pytest.mark.parametrize(
    ("status", "raw"),
    [(500, b"{}"), (200, b"not JSON"), (200, b"[]"), (200, b'{"choices": []}'), (307, b""),
     (200, b'{"choices": [{"message": {"content": null}}]}'), (200, b"\xff\xfe")],
)  # fmt: skip
def test_a_server_that_fails_costs_the_phrasing_alone(
    log: Log, server: Server, status: int, raw: bytes
) -> None:
    server.status, server.raw = status, raw
    answer = log.ask(QUESTION)
    assert answer.text == "2 lessons."
    assert len(answer.evidence) == 2
    assert "did not phrase it (" in answer.remarks[0]


def test_no_server_and_no_refusal_is_phrased(log: Log, server: Server) -> None:
    server.said = GOOD
    assert log.ask("what did I calculate?").refused is not None
    assert server.asked is None
    server.shutdown()
    server.server_close()
    answer = log.ask(QUESTION)
    assert (answer.text, len(answer.evidence)) == ("2 lessons.", 2)
    assert "did not phrase it (URLError" in answer.remarks[0]


def test_a_note_edited_while_the_model_writes_withdraws_its_line(
    log: Log, server: Server, tmp_path: Path
) -> None:
    server.said = GOOD
    server.first = lambda: (tmp_path / "note.md").write_text("## Log\n", encoding="utf-8")  # type: ignore[method-assign]
    answer = log.ask(QUESTION)
    assert answer.evidence == ()
    assert answer.refused is not None
    assert "changed while they were read" in answer.refused
    assert "84.91" not in answer.text


@pytest.mark.parametrize(
    ("line", "said", "passes"),
    [
        ("accuracy moved by -2.5 points", "Accuracy moved by 2.5 points", False),
        ("accuracy moved by 2.5 points", "Accuracy moved by −2.5 points", False),
        ("accuracy moved by −2.5 points", "By -2.5 points moved accuracy", True),
        ("an error of 0.5%", "An error of 0.5", False),
        ("an error of 0.5", "An error of 0.5%", False),
        ("from 2023-05-01, 3-4 heads", "3-4 heads, from 2023-05-01", True),
        ("(-1.5, 2)", "-1.5, 2", True),
    ],
)
def test_a_number_keeps_its_sign_and_its_percent(line: str, said: str, passes: bool) -> None:
    reason = objection(f"{said} [1].", [Evidence("n.md", 1, f"- {line}", "2023")], "what?")
    assert (reason is None) is passes


WORDS = st.text("abcdefghijklmnop", min_size=4, max_size=9)


@given(st.lists(WORDS, min_size=1, max_size=8), WORDS)
def test_only_words_of_the_line_pass(words: list[str], other: str) -> None:
    line = Evidence("n.md", 1, f"- {' '.join(words)}", "2023")
    assert objection(f"{' '.join(reversed(words))} [1].", [line], "what?") is None
    said = objection(f"{' '.join(words)} {other} [1].", [line], "what?")
    assert said is None or repr(other) in said
    if other.endswith("k") and not any(w[:3] == other[:3] for w in words):
        assert said is not None
