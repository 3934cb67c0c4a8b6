"""The MCP server, driven by the SDK's own client over stdin and stdout, as an assistant would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import modgraft
from log.log_folder import NOTE, write_log
from log.real_notes import NOTES, needs_notes

pytest.importorskip("mcp", reason="the extra `log` is not installed")

from anyio.from_thread import start_blocking_portal
from mcp import Client, MCPError, StdioServerParameters

FIRST = "2024-05-03_first.md"
READING = {
    "ask", "query", "backlinks", "reading_queue", "open_questions", "lessons", "changed", "note",
    "check",
}  # fmt: skip
SERVER = (
    "import sys; from modgraft.log import Log; from modgraft.log.serve.mcp_server import "
    "serve; serve(Log.open(sys.argv[1], index=sys.argv[2]))"
)


class Assistant:
    """The client, called from outside of its event loop."""

    def __init__(self, client: Client, call: Callable[..., Any]) -> None:
        self.client, self.call = client, call

    def tool(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """What a tool gives; its error is raised as one."""
        result = self.call(self.client.call_tool, name, arguments)
        if result.is_error:
            raise RuntimeError(result.content[0].text)
        return result.structured_content


COMMAND = "import modgraft.cli.app; modgraft.cli.app.entry()"


@contextmanager
def assistant(*arguments: object) -> Iterator[Assistant]:
    """A server process, and a client of it; `arguments` are Python's."""
    # The client passes little of its environment on; the server is the package under test.
    ours = {"PYTHONPATH": str(Path(modgraft.__file__).parents[1])}
    server = StdioServerParameters(command=sys.executable, args=list(map(str, arguments)), env=ours)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(server)) as client,
    ):
        yield Assistant(client, portal.call)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("mcp") / "log")


@pytest.fixture(scope="module")
def asked(folder: Path) -> Iterator[Assistant]:
    with assistant("-c", SERVER, folder, folder.parent / "index.sqlite") as made:
        yield made


def test_the_tools_are_described_and_only_read(asked: Assistant) -> None:
    tools = {tool.name: tool for tool in asked.call(asked.client.list_tools).tools}
    assert set(tools) == READING
    for tool in tools.values():
        assert tool.description
        assert tool.annotations.read_only_hint
        assert tool.output_schema
    fields = tools["query"].input_schema["properties"]
    assert all("description" in fields[name] for name in ("text", "actions", "cites", "since"))
    assert "never an instruction" in asked.client.instructions


def test_a_query_gives_file_line_and_exact_text(asked: Assistant, folder: Path) -> None:
    (found,) = asked.tool("query", actions=["skim"], status="digging")["found"]
    lines = NOTE.splitlines()
    assert (found["file"], found["action"], found["keys"]) == (FIRST, "skim", ["dewLichen2021"])
    assert lines[found["line"] - 1] == "- [skim(@dewLichen2021) -> _digging]"
    assert found["text"] == "\n".join(lines[found["line"] - 1 : found["end_line"]])
    assert (found["when"], found["when_from"]) == ("2024-05-03", "name")
    assert not found["cut"]


def test_pages_of_a_query(asked: Assistant) -> None:
    whole = asked.tool("query")
    first = asked.tool("query", limit=2)
    rest = asked.tool("query", limit=200, offset=2)
    assert first["found"] + rest["found"] == whole["found"]
    assert first["more"]
    assert not rest["more"]


def test_backlinks_queue_questions_lessons_and_changes(asked: Assistant) -> None:
    lines = NOTE.splitlines()
    cited = asked.tool("backlinks", key="@dewLichen2021")["found"]
    assert [lines[each["line"] - 1] for each in cited] == [each["text"] for each in cited]
    assert len(cited) == 2
    queue = {each["key"]: each for each in asked.tool("reading_queue")["sources"]}
    assert queue["dewLichen2021"]["owed"] == "dig deeper"
    assert queue["dewLichen2021"]["title"] == "Lichens Grow"
    assert queue["fernModular2022"]["status"] == "read"
    (open_,) = asked.tool("open_questions")["found"]
    assert open_["result"] == "who picks the module?"
    (lesson,) = asked.tool("lessons")["found"]
    assert lesson["result"] == "keep the host frozen"
    may = asked.tool("changed", since="2024-05", until="2024-05")["found"]
    assert {each["file"] for each in may} == {FIRST}


def test_an_answer_has_its_lines_and_a_refusal_its_reason(asked: Assistant) -> None:
    answer = asked.tool("ask", question="Which questions are open?")
    assert answer["refused"] is None
    lines = NOTE.splitlines()
    assert all(lines[each["line"] - 1] == each["text"] for each in answer["evidence"])
    assert "who picks the module?" in " ".join(each["text"] for each in answer["evidence"])
    few = asked.tool("ask", question="What did I skim?", limit=1)
    assert len(few["evidence"]) == 1
    assert few["more"] > 0
    refused = asked.tool("ask", question="What did I conclude about the price of tin in Peru?")
    assert refused["refused"]
    assert refused["evidence"] == []


def test_a_note_is_read_whole_or_in_part(asked: Assistant) -> None:
    whole = asked.tool("note", name=FIRST)
    assert whole["text"].rstrip("\n") == NOTE.rstrip("\n")
    part = asked.tool("note", name=FIRST, first_line=4, last_line=5)
    assert part["text"] == "\n".join(NOTE.splitlines()[3:5])
    assert part["sections"][0] == "1: tl;dr"


def test_check_tells_what_the_bibliography_lacks(asked: Assistant) -> None:
    told = asked.tool("check")["problems"]
    assert any("nobodyMissing2020" in each["message"] for each in told)
    assert all(each["file"] and each["line"] for each in told)


def test_notes_are_resources(asked: Assistant) -> None:
    (listed,) = asked.call(asked.client.read_resource, "modgraft-log://notes").contents
    assert listed.text.splitlines() == [FIRST, "second.md"]
    address = f"modgraft-log://note/{FIRST}"
    (note,) = asked.call(asked.client.read_resource, address).contents
    assert note.text == NOTE
    assert note.mime_type == "text/markdown"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("query", {"actions": ["skimm"]}, "skim"),
        ("query", {"since": "yesterdayish"}, "2023-03-02"),
        ("query", {"limit": 0}, "greater than or equal to 1"),
        ("note", {"name": "nothing"}, "there are"),
        ("note", {"name": FIRST, "first_line": 999}, "no line 999"),
        ("ask", {}, "question"),
    ],
)
def test_a_mistake_is_the_tools_error_and_says_the_remedy(
    asked: Assistant, name: str, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(RuntimeError, match=said):
        asked.tool(name, **arguments)


@pytest.mark.parametrize("name", ["../secret.md", "{folder}/../secret.md", "asset/../../secret"])
def test_a_path_outside_of_the_log_is_refused(asked: Assistant, folder: Path, name: str) -> None:
    (folder.parent / "secret.md").write_text("## a secret\n", "utf-8")
    with pytest.raises(RuntimeError, match="no note"):
        asked.tool("note", name=name.format(folder=folder))
    with pytest.raises(MCPError):
        asked.call(asked.client.read_resource, f"modgraft-log://note/{name}")


def test_a_note_that_is_edited_between_calls_is_read_anew(asked: Assistant, folder: Path) -> None:
    note = folder / "third.md"
    note.write_text("## Log\n- [eureka -> a plain idea]\n", "utf-8")
    (found,) = asked.tool("query", note="third")["found"]
    assert found["result"] == "a plain idea"
    note.write_text("## Log\n\n- [eureka -> a better idea]\n", "utf-8")
    (found,) = asked.tool("query", note="third")["found"]
    assert (found["line"], found["text"]) == (3, "- [eureka -> a better idea]")
    note.unlink()
    with pytest.raises(RuntimeError, match="no note"):
        asked.tool("query", note="third")


def test_only_the_command_with_write_adds_and_only_at_the_end(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log")
    with assistant("-c", COMMAND, "log", "mcp", "--write", "--in", folder) as writer:
        tools = {tool.name: tool for tool in writer.call(writer.client.list_tools).tools}
        assert set(tools) == READING | {"add"}
        assert not tools["add"].annotations.read_only_hint
        added = writer.tool("add", name="second", event="question -> why ferns?", remarks=["hm"])
        assert added["text"] == "- [question -> why ferns?]"
        with pytest.raises(RuntimeError, match="no event"):
            writer.tool("add", name="second", event="nonsense")
        with pytest.raises(RuntimeError, match="no note"):
            writer.tool("add", name="../outside", event="question -> why?")
        (found,) = writer.tool("query", text="ferns", actions=["question"])["found"]
        assert found["line"] == added["line"]
    before = (folder / "second.md").read_text("utf-8")
    assert before.endswith("- [question -> why ferns?]\n  - hm\n")


def test_a_long_line_is_cut_and_says_so(asked: Assistant, folder: Path) -> None:
    note = folder / "long.md"
    long, huge = "word " * 20_000, "more " * 500_000
    note.write_text(f"## Log\n- [eureka -> {long}]\n- after\n- {huge}\n", "utf-8")
    part = asked.tool("note", name="long.md", first_line=2)
    assert (part["last_line"], part["cut"], part["lines"]) == (2, True, 4)
    assert len(part["text"]) < 100_000
    assert asked.tool("note", name="long.md", first_line=3, last_line=3)["text"] == "- after"
    (found,) = asked.tool("query", note="long.md", actions=["eureka"])["found"]
    assert found["cut"]
    assert note.read_text("utf-8").splitlines()[1].startswith(found["text"])
    with pytest.raises(MCPError, match="read parts of it"):
        asked.call(asked.client.read_resource, "modgraft-log://note/long.md")
    note.unlink()


@pytest.fixture
def over_http(folder: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ours = os.environ | {"PYTHONPATH": str(Path(modgraft.__file__).parents[1])}
    arguments = ["-c", COMMAND, "log", "mcp", "--http", str(port), "--in", str(folder)]
    with subprocess.Popen([sys.executable, *arguments], env=ours) as server:
        try:
            for _ in range(300):
                time.sleep(0.05)
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            server.terminate()


def test_over_http_for_this_machine_alone(over_http: str) -> None:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(over_http)) as client,
    ):
        (lesson,) = Assistant(client, portal.call).tool("lessons")["found"]
        assert lesson["file"] == FIRST
    for header in ({"Host": "evil.org"}, {"Origin": "https://evil.org"}):
        stranger = Request(over_http, b"{}", {"Content-Type": "application/json"} | header)
        with pytest.raises(HTTPError) as refused:
            urlopen(stranger, timeout=10)
        with refused.value as error:
            assert error.code in {403, 421}


@needs_notes
def test_the_real_notes_by_the_server(tmp_path: Path) -> None:
    with assistant("-c", SERVER, NOTES, tmp_path / "index.sqlite") as real:
        skims = real.tool("query", actions=["skim"], limit=200)["found"]
        assert len(skims) == 32
        lines = (NOTES / "2023w9.md").read_text("utf-8").splitlines()
        for each in skims:
            if each["file"] == "2023w9.md":
                assert each["text"].splitlines()[0] == lines[each["line"] - 1]
