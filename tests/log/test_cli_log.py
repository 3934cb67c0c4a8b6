"""`modgraft log` and `modgraft ask`, run as a shell would, on notes made here."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import modgraft.log as package
from command import Result, modgraft

BIB = """@article{huLowRank2021,
  title = {Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward and Shen, Yelong},
  year = {2021}
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODGRAFT_LOG", raising=False)
    return tmp_path


@pytest.fixture
def noted(folder: Path) -> Path:
    """A log of one note, made by the commands."""
    assert log("new", "fusion").out == "log/fusion.md\n"
    (folder / "log" / "papers.bib").write_text(BIB)
    log("add", "skim(@huLowRank2021) -> _digging", "Low rank is enough for most of it.")
    log("add", "question -> does it hold for vision too?", "--under", "last")
    log("add", "lesson_learned -> write the control first")
    return folder


def log(*args: str | Path) -> Result:
    return modgraft("log", *args)


def test_recording_by_commands(noted: Path) -> None:
    text = (noted / "log" / "fusion.md").read_text()
    assert text.endswith(
        "## Log\n- [skim(@huLowRank2021) -> _digging]\n  - Low rank is enough for most of it.\n"
        "  - [question -> does it hold for vision too?]\n"
        "- [lesson_learned -> write the control first]\n"
    )
    assert log("finish").out == "log/fusion.md: 1 to Learned, 0 to Next?\n"
    assert log("finish", "fusion").out == "log/fusion.md: 0 to Learned, 0 to Next?\n"
    assert log("new", "another").code == 0
    assert log("add", "start(another)").out == "log/another.md:12\n"
    assert log("add", "read(@huLowRank2021)", "--note", "fusion").out == "log/fusion.md:17\n"
    assert log("add", "return(fusion)").out == "log/fusion.md:18\n"  # the last one used


def test_what_cannot_be_recorded_is_one_line_that_says_why(noted: Path) -> None:
    before = (noted / "log" / "fusion.md").read_bytes()
    for args, said in [
        (("add", "skimm(@huLowRank2021)"), "Did you mean skim?"),
        (("add", "read(@huLowRank2021)", "--note", "nope"), "there are: fusion"),
        (("add", "read(@huLowRank2021)", "--under", "3"), "append-only"),
        (("new", "fusion"), "such a note already"),
    ]:
        result = log(*args)
        assert result.code == 1
        assert said in result.err
        assert result.err.startswith("error: ")
        assert len(result.err.strip().splitlines()) == 1
    assert (noted / "log" / "fusion.md").read_bytes() == before


def test_what_was_added_is_looked_at_once_there_is_an_index(noted: Path) -> None:
    assert log("add", "read(@huLowRnak2021)").err == ""
    log("index")
    done = log("add", "read(@huLowRnak2021)", "a remark")
    assert done.out == "log/fusion.md:17\n"
    assert done.err.startswith("log/fusion.md:17: error near-key @huLowRnak2021 is not in the")
    assert len(done.err.splitlines()) == 1


def test_a_new_note_goes_to_the_first_folder_that_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "runs").mkdir()  # is not where people write
    assert log("new", "a").out == "log/a.md\n"
    assert log("new", "b", "--in", "runs").out == "runs/b.md\n"
    (folder / "diary").mkdir()
    monkeypatch.setenv("MODGRAFT_LOG", "diary")
    assert log("new", "c").out == "diary/c.md\n"
    assert log("add", "start(c)").out == "diary/c.md:12\n"


@pytest.mark.parametrize("name", ["", " ", "."])
def test_a_note_needs_a_name(folder: Path, name: str) -> None:
    assert log("new", name).code == 2
    assert not list(folder.iterdir())


def test_without_a_log_it_says_how_to_start_one(folder: Path) -> None:
    assert "modgraft log new NAME" in log("query").err
    assert "modgraft log new NAME" in log("add", "start(a)").err
    (folder / "log").mkdir()
    assert "no note is being worked on" in log("add", "start(a)").err
    (folder / "log" / "a.md").write_text("## Log\n")
    assert log("add", "start(a)").out == "log/a.md:2\n"  # the only one
    (folder / "log" / "a.md").unlink()
    assert "the note that was worked on last is gone" in log("add", "start(a)").err


def test_a_configured_action_can_be_recorded(folder: Path) -> None:
    table = '[tool.modgraft.log]\nfolders = ["diary"]\n[tool.modgraft.log.actions]\nran = ["exp"]\n'
    (folder / "pyproject.toml").write_text(table)
    (folder / "diary").mkdir()
    assert log("new", "a").out.strip().endswith("diary/a.md")
    assert log("add", "exp(3) -> 98 %").code == 0
    assert json.loads(log("query", "--action", "ran", "--json").out)[0]["arguments"] == "3"


def test_queries_print_a_line_a_hit_and_json(noted: Path) -> None:
    lines = log("query").out.splitlines()
    assert [line.split("\t")[1:] for line in lines] == [
        ["log/fusion.md:12", "- [skim(@huLowRank2021) -> _digging] …"],
        ["log/fusion.md:14", "- [question -> does it hold for vision too?]"],
        ["log/fusion.md:15", "- [lesson_learned -> write the control first]"],
    ]
    (found,) = json.loads(log("query", "--action", "skim", "--status", "digging", "--json").out)
    assert (found["note"], found["line"], found["keys"]) == ("log/fusion.md", 12, ["huLowRank2021"])
    assert "log/fusion.md:13" in log("query", "low rank").out
    assert "log/fusion.md:14" in log("questions").out
    assert "log/fusion.md:15" in log("lessons").out
    assert "log/fusion.md:12" in log("backlinks", "huLowRank2021").out
    assert [line.split("\t")[1] for line in log("changed", "2020").out.splitlines()] == [
        f"log/fusion.md:{n}" for n in (12, 13, 14, 15)
    ]
    assert log("changed", "2020", "2021").out == ""
    queue = log("queue").out.rstrip("\n").split("\t")
    assert queue[0] == "digging"
    assert queue[2:4] == ["@huLowRank2021", "Low-Rank Adaptation of Large Language Models"]
    assert json.loads(log("queue", "--json").out)[0]["key"] == "huLowRank2021"


def test_the_index_says_what_it_saw(noted: Path) -> None:
    (noted / "log" / "bytes.md").write_bytes(b"## Log\n- [read(@huLowRank2021)] \xff\n")
    out = log("index").out
    assert "2 notes seen = 1 parsed + 1 degraded" in out
    assert "bytes.md:2" in out
    assert "log/bytes.md:2" in log("query", "--action", "read").out  # kept and found


def test_asking_shows_the_lines_or_says_why_not(noted: Path) -> None:
    done = modgraft("ask", "which questions are open?")
    assert done.code == 0
    assert "log/fusion.md:14  - [question -> does it hold for vision too?]" in done.out
    done = modgraft("ask", "what did I think of @huLowRank2021?", "--json")
    answer = json.loads(done.out)
    text = (noted / "log" / "fusion.md").read_text().splitlines()
    assert answer["evidence"]
    assert all(text[one["line"] - 1] == one["quote"] for one in answer["evidence"])
    done = modgraft("ask", "what did I think of @nobody1999?")
    assert done.code == 2
    assert done.out.startswith("No answer: @nobody1999 is neither in the bibliography nor cited")
    log("add", "question -> and without a gate?")  # is seen at once
    assert "and without a gate?" in modgraft("ask", "which questions are open?").out


def test_what_a_terminal_would_obey_is_shown_instead(noted: Path) -> None:
    log("add", "question -> \x1b[31mred\x1b]0;title\x07 [bold]x[/bold]?")
    out = log("questions").out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "�[31mred" in out
    assert "[bold]x[/bold]" in out


def test_check_says_what_is_wrong_and_mends_what_it_is_told_to(noted: Path) -> None:
    done = log("check")
    assert (done.code, done.out) == (0, "nothing to mend\n")
    log("add", "read(@huLowRnak2021)", "networkâ€™s", "--note", "fusion")
    log("add", "calculate(2 + 2) -> 5")
    done = log("check")
    assert done.code == 1
    assert "log/fusion.md:16: error near-key @huLowRnak2021 is not in the bibliography" in done.out
    assert "log/fusion.md:18: error" in done.out
    said = log("check", "--fix")
    assert "nobody to ask" in said.err
    done = log("check", "--fix", "--code", "near-key")
    assert "log/fusion.md:16: mended near-key" in done.out
    text = (noted / "log" / "fusion.md").read_text()
    assert "read(@huLowRank2021)" in text
    assert "networkâ€™s" in text  # not asked for
    done = log("check", "--fix", "--code", "all", "log/fusion.md", "--json")
    assert {one["code"] for one in json.loads(done.out)} <= {"calculate"}
    assert "network’s" in (noted / "log" / "fusion.md").read_text()


@pytest.mark.parametrize(
    ("command", "package"), [("page", "starlette"), ("mcp", "mcp"), ("lsp", "pygls")]
)
def test_without_the_extra_it_says_what_to_install(
    command: str, package: str, noted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("modgraft.log.")]:
        if name.rpartition(".")[2] in ("page", "mcp_server", "lsp") or ".web" in name:
            monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = log(command)
    assert result.code == 1
    assert 'pip install "modgraft[log]"' in result.err


def modules(code: str) -> set[str]:
    """What is imported once `code` has run in a process of its own."""
    text = f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


COMMAND = """
sys.argv = ["modgraft", {}]
from modgraft.cli.app import entry
try:
    entry()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
HEAVY = {
    *("torch", "transformers", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "jinja2"),
    *("bibtexparser", "mcp", "pygls", "starlette", "uvicorn", "sqlite3", "asyncio"),
}


def test_help_imports_nothing_that_takes_long() -> None:
    for args in ("'--help'", "'log', '--help'", "'log', 'query', '--help'", "'--version'"):
        found = modules(COMMAND.format(args))
        assert not HEAVY & found, args
        assert not {name for name in found if name.startswith("modgraft.log.")}, args


def test_the_log_imports_neither_torch_nor_transformers(noted: Path) -> None:
    found = modules("import modgraft.log")
    assert not (HEAVY | {"rich", "subprocess", "markdown_it"}) & found
    model = HEAVY & {"torch", "transformers", "numpy", "scipy", "sklearn", "matplotlib"}
    everything = "from modgraft.log import *\nfrom modgraft.log.record import record, runs"
    assert not model & modules(everything)
    names = [
        f"import {one.name}" for one in pkgutil.walk_packages(package.__path__, "modgraft.log.")
    ]
    assert len(names) > 20
    assert not {"torch", "transformers"} & modules("\n".join(names))
    for args in ("'log', 'query'", "'log', 'queue'", "'log', 'add', 'read(@huLowRank2021)'"):
        assert not model & modules(COMMAND.format(args)), args
