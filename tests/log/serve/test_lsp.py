"""The language server as a process of its own, asked by pygls' client over stdio."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from log.real_notes import NOTES, needs_notes

pytest.importorskip("pygls", reason="the language server needs the extra log: pygls")
from lsprotocol import types as t
from pygls.exceptions import JsonRpcException
from pygls.lsp.client import LanguageClient

BIB = """@article{smithThing2020,
  title = {A {{Thing}} of *Stars*},
  author = {Smith, Ann and Jones, Bo},
  date = {2020-03-01},
  abstract = {We show a thing. It works.},
}

@inproceedings{otherPaper2021, title = {Other}, crossref = {smithThing2020}, year = 2021 }
"""
NOTE = """## Log
- 💡 [skim(@smithThing2020) -> _digging] networkâ€™s
  - 你們 💡 see @smithThing2020, and [made.py](made.py)
- [read(@smithThink2020)]
- [
- @
- [skim(@otherPaper2021) -> _
"""
OTHER = (
    "- also smithThing2020 and `@smithThing2020` in code\r\n"
    "- and @smithThing2020a, not the same\r\n"
)

Answer = TypeVar("Answer")


class Editor:
    """A client with one folder open, which keeps what the server reports of its own accord."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client = LanguageClient("test", "1")
        self.problems: dict[str, list[t.Diagnostic]] = {}
        self.news = asyncio.Event()

        @self.client.feature(t.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        def published(params: t.PublishDiagnosticsParams) -> None:
            self.problems[params.uri] = list(params.diagnostics)
            self.news.set()

    def uri(self, name: str) -> str:
        return (self.folder / name).as_uri()

    async def start(self, encodings: list[t.PositionEncodingKind | str]) -> None:
        run = "from modgraft.cli.app import entry; entry()"
        await self.client.start_io(sys.executable, "-c", run, "log", "lsp")
        general = t.GeneralClientCapabilities(position_encodings=encodings)
        await self.client.initialize_async(
            t.InitializeParams(t.ClientCapabilities(general=general), root_uri=self.folder.as_uri())
        )
        self.client.initialized(t.InitializedParams())

    async def stop(self) -> None:
        await self.client.shutdown_async(None)
        self.client.exit(None)
        await self.client.stop()

    async def open(self, name: str, text: str | None = None) -> list[t.Diagnostic]:
        self.news.clear()
        said = (self.folder / name).read_text() if text is None else text
        item = t.TextDocumentItem(self.uri(name), "markdown", 1, said)
        self.client.text_document_did_open(t.DidOpenTextDocumentParams(item))
        await asyncio.wait_for(self.news.wait(), 20)
        return self.problems[self.uri(name)]

    def at(self, name: str, line: int, column: int) -> tuple[t.TextDocumentIdentifier, t.Position]:
        return t.TextDocumentIdentifier(self.uri(name)), t.Position(line, column)


def drive(
    folder: Path, task: Callable[[Editor], Awaitable[Answer]], encoding: str = "utf-16"
) -> Answer:
    async def run() -> Answer:
        editor = Editor(folder)
        await editor.start([encoding])
        try:
            return await asyncio.wait_for(task(editor), 50)
        finally:
            await editor.stop()

    return asyncio.run(run())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "papers.bib").write_text(BIB)
    (tmp_path / "made.py").touch()
    (tmp_path / "n.md").write_text(NOTE)
    (tmp_path / "other.md").write_bytes(OTHER.encode())
    return tmp_path


def spot(range: t.Range) -> tuple[int, int, int, int]:
    return range.start.line, range.start.character, range.end.line, range.end.character


def edited(text: str, edits: list[t.TextEdit]) -> str:
    """`text` as an editor that counts in UTF-16 would change it."""
    lines = text.splitlines(keepends=True)
    for edit in sorted(edits, key=lambda edit: spot(edit.range), reverse=True):
        first, start, last, end = spot(edit.range)
        assert first == last
        line = lines[first].encode("utf-16-le")
        new = line[: 2 * start] + edit.new_text.encode("utf-16-le") + line[2 * end :]
        lines[first] = new.decode("utf-16-le")
    return "".join(lines)


def test_an_editor_at_work(folder: Path) -> None:
    async def task(editor: Editor) -> None:
        client = editor.client
        problems = await editor.open("n.md")
        assert [(one.code, spot(one.range)) for one in problems] == [
            ("mojibake", (1, 48, 1, 51)),  # the light bulb counts as two
            ("near-key", (3, 8, 3, 23)),
            ("unclosed", (6, 2, 6, 29)),
        ]
        hover = await client.text_document_hover_async(t.HoverParams(*editor.at("n.md", 2, 20)))
        assert hover is not None
        assert isinstance(hover.contents, t.MarkupContent)
        assert hover.contents.value == (
            "**A Thing of \\*Stars\\***\n\nAnn Smith, Bo Jones · 2020\n\nWe show a thing. It works."
        )
        assert hover.range is not None
        assert spot(hover.range) == (2, 15, 2, 29)
        action = await client.text_document_hover_async(t.HoverParams(*editor.at("n.md", 1, 7)))
        assert action is not None
        assert isinstance(action.contents, t.MarkupContent)
        assert action.contents.value == "**skim**: is this source worth my time?"

        keys = await client.text_document_completion_async(
            t.CompletionParams(*editor.at("n.md", 5, 3))
        )
        assert isinstance(keys, list)
        assert [item.label for item in keys] == ["smithThing2020", "otherPaper2021"]
        assert keys[0].detail == "Smith and Jones 2020: A Thing of *Stars*"
        assert keys[0].filter_text is not None
        assert "Jones" in keys[0].filter_text
        actions = await client.text_document_completion_async(
            t.CompletionParams(*editor.at("n.md", 4, 3))
        )
        assert isinstance(actions, list)
        assert "lesson_learned" in [item.label for item in actions]
        statuses = await client.text_document_completion_async(
            t.CompletionParams(*editor.at("n.md", 6, 30))
        )
        assert isinstance(statuses, list)
        assert [item.label for item in statuses] == ["_digging", "_full_read"]

        places = await client.text_document_definition_async(
            t.DefinitionParams(*editor.at("n.md", 2, 20))
        )
        assert isinstance(places, list)
        assert [(place.uri, spot(place.range)) for place in places] == [
            (editor.uri("papers.bib"), (0, 9, 0, 23))
        ]
        linked = await client.text_document_definition_async(
            t.DefinitionParams(*editor.at("n.md", 2, 40))
        )
        assert isinstance(linked, list)
        assert [place.uri for place in linked] == [editor.uri("made.py")]

        where, position = editor.at("papers.bib", 0, 12)
        for declared in (True, False):
            cited = await client.text_document_references_async(
                t.ReferenceParams(t.ReferenceContext(declared), where, position)
            )
            assert cited is not None
            found = sorted((Path(one.uri).name, spot(one.range)) for one in cited)
            assert found == [
                ("n.md", (1, 11, 1, 26)),
                ("n.md", (2, 14, 2, 29)),
                ("other.md", (0, 7, 0, 21)),
                *([("papers.bib", (0, 9, 0, 23))] if declared else []),
            ]

    drive(folder, task)


def test_a_key_is_renamed_everywhere(folder: Path) -> None:
    async def task(editor: Editor) -> None:
        client = editor.client
        await editor.open("n.md", NOTE + "- unsaved: @smithThing2020\n")
        where, position = editor.at("n.md", 2, 20)
        asked = await client.text_document_prepare_rename_async(
            t.PrepareRenameParams(where, position)
        )
        assert isinstance(asked, t.PrepareRenamePlaceholder)
        assert (asked.placeholder, spot(asked.range)) == ("smithThing2020", (2, 15, 2, 29))
        edit = await client.text_document_rename_async(
            t.RenameParams(where, position, "smithStars2020")
        )
        assert edit is not None
        assert edit.changes is not None
        texts = {
            "n.md": NOTE + "- unsaved: @smithThing2020\n",
            "other.md": OTHER,
            "papers.bib": BIB,
        }
        assert {Path(uri).name for uri in edit.changes} == set(texts)
        for uri, edits in edit.changes.items():
            name = Path(uri).name
            new = edited(texts[name], list(edits))
            expected = texts[name].replace("smithThing2020", "smithStars2020")
            # Code is left alone, and so is a key that only begins alike.
            expected = expected.replace("`@smithStars2020`", "`@smithThing2020`")
            assert new == expected.replace("smithStars2020a", "smithThing2020a")
        for bad, why in (("a b", "cannot be cited"), ("otherPaper2021", "another source's key")):
            with pytest.raises(JsonRpcException, match=why):
                await client.text_document_rename_async(t.RenameParams(where, position, bad))

    drive(folder, task)


def test_fixes_are_offered_where_they_are(folder: Path) -> None:
    async def task(editor: Editor) -> None:
        await editor.open("n.md")
        where, start = editor.at("n.md", 1, 49)
        actions = await editor.client.text_document_code_action_async(
            t.CodeActionParams(where, t.Range(start, start), t.CodeActionContext([]))
        )
        assert actions is not None
        (fix,) = actions
        assert isinstance(fix, t.CodeAction)
        assert fix.edit is not None
        assert fix.edit.changes is not None
        assert edited(NOTE, list(fix.edit.changes[where.uri])) == NOTE.replace("â€™", "’")

    drive(folder, task)


def test_a_change_is_seen_and_a_saved_bibliography_too(folder: Path) -> None:
    async def task(editor: Editor) -> None:
        client, uri = editor.client, editor.uri("other.md")
        assert [one.code for one in await editor.open("other.md")] == [
            "key-without-at",
            "missing-key",
        ]
        editor.news.clear()
        text = "- \u2028\f💡 @newThing2024 [calculate(1+1) -> 3]\n"
        client.text_document_did_change(
            t.DidChangeTextDocumentParams(
                t.VersionedTextDocumentIdentifier(2, uri),
                [t.TextDocumentContentChangeWholeDocument(text)],
            )
        )
        await asyncio.wait_for(editor.news.wait(), 20)
        assert [(one.code, spot(one.range)) for one in editor.problems[uri]] == [
            ("missing-key", (0, 7, 0, 20)),
            ("calculate", (0, 21, 0, 42)),
        ]
        (editor.folder / "papers.bib").write_text(BIB + "@misc{newThing2024, title={New}}\n")
        editor.news.clear()
        bib = t.TextDocumentIdentifier(editor.uri("papers.bib"))
        client.text_document_did_save(t.DidSaveTextDocumentParams(bib))
        await asyncio.wait_for(editor.news.wait(), 20)
        assert [one.code for one in editor.problems[uri]] == ["calculate"]

    drive(folder, task)


def test_a_text_without_a_file_and_a_broken_bibliography(folder: Path) -> None:
    (folder / "papers.bib").write_text(BIB + "@misc{open2020,\n  title = {never\n")

    async def task(editor: Editor) -> None:
        item = t.TextDocumentItem("untitled:Untitled-1", "markdown", 1, "- [skimm(@x2)]\n")
        editor.client.text_document_did_open(t.DidOpenTextDocumentParams(item))
        (broken,) = await editor.open("papers.bib")
        assert (broken.range.start.line, broken.message[:18]) == (8, "not BibTeX from he")
        assert list(editor.problems) == [editor.uri("papers.bib")]

    drive(folder, task)


def test_columns_are_counted_as_the_client_counts(folder: Path) -> None:
    async def task(editor: Editor) -> tuple[int, ...]:
        slip = (await editor.open("n.md"))[0]
        return slip.range.start.character, slip.range.end.character

    assert drive(folder, task, "utf-16") == (48, 51)
    assert drive(folder, task, "utf-8") == (50, 58)


@needs_notes
def test_the_real_notes_in_an_editor() -> None:
    async def task(editor: Editor) -> None:
        problems = await editor.open("2023w9.md")
        assert len(problems) == 9
        where, position = editor.at("2023w9.md", 23, 12)  # line 24: the skim of the survey
        cited = await editor.client.text_document_references_async(
            t.ReferenceParams(t.ReferenceContext(False), where, position)
        )
        assert cited is not None
        assert sorted((Path(one.uri).name, one.range.start.line + 1) for one in cited) == [
            ("2023w9.md", 24), ("2023w9.md", 111), ("2023w9_draft.md", 16), ("gpt.md", 91),
            ("modular_deep_learning.md", 23),
        ]  # fmt: skip

    drive(NOTES, task)
