"""A language server for notes, over stdio: `modgraft log lsp`.

Diagnostics with their fixes, completion of actions and citation keys, hover, definition,
references, and renaming of a key in all notes and the bibliography. What is known comes from
`workspace`; here it is put into the protocol's terms.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from lsprotocol import types as t
from pygls import uris
from pygls.exceptions import JsonRpcInvalidParams
from pygls.lsp.server import LanguageServer

from modgraft.core.errors import ModgraftError
from modgraft.log.check import check_note, found_at
from modgraft.log.index.bibliography import Bibliography, Entry
from modgraft.log.serve.workspace import Place, Text, Workspace
from modgraft.log.syntax.note import Diagnostic

_KEY_BEFORE = re.compile(rb"(?<![A-Za-z0-9_/.])@([\w:.+/\x80-\xff-]*)\Z")
_ACTION_BEFORE = re.compile(rb"(?<!\\)\[([\w\x80-\xff]*)\Z")
_STATUS_BEFORE = re.compile(rb"\[\s*skim\b[^\[\]]*->\s*(_?\w*)\Z", re.IGNORECASE)
_SEVERITY = {
    "error": t.DiagnosticSeverity.Error,
    "warning": t.DiagnosticSeverity.Warning,
    "info": t.DiagnosticSeverity.Information,
}
_ABSTRACT = 60  # words of it in a hover


class Server(LanguageServer):
    """The server; one log, that of the folder which the editor opened."""

    def __init__(self) -> None:
        # Whole texts: what a line is, editors and Python do not agree on (U+2028, form feeds).
        full = t.TextDocumentSyncKind.Full
        super().__init__("modgraft-log", version("modgraft"), text_document_sync_kind=full)
        self._log: Workspace | None = None

    @property
    def log(self) -> Workspace:
        """The log, found at the first request."""
        if self._log is None:
            root = self.workspace.root_path
            opened = [
                Path(p) for uri in self.workspace.text_documents if (p := uris.to_fs_path(uri))
            ]
            self._log = Workspace(
                Path(root) if root else opened[0].parent if opened else Path.cwd()
            )
        self._log.opened = {
            Path(path): document.source.encode("utf-8", "surrogatepass")
            for uri, document in self.workspace.text_documents.items()
            if (path := uris.to_fs_path(uri))
        }
        return self._log

    def text(self, path: Path) -> Text:
        """A file's text, whose columns are counted as the editor does."""
        return Text(self.log.data(path), self.workspace.position_codec.client_num_units)

    def at(self, uri: str, position: t.Position) -> tuple[Path, Text, int]:
        """The file, its text and the byte that a request is about."""
        path = _path(uri)
        text = self.text(path)
        return path, text, text.offset(position.line, position.character)

    def range(self, text: Text, start: int, end: int) -> t.Range:
        """A stretch of bytes in the editor's terms."""
        return t.Range(t.Position(*text.position(start)), t.Position(*text.position(end)))

    def location(self, place: Place) -> t.Location:
        """A stretch of a file in the editor's terms."""
        where = self.range(self.text(place.path), place.start, place.end)
        return t.Location(place.path.as_uri(), where)

    def problems(self, path: Path) -> list[Diagnostic]:
        """What is wrong with a note."""
        log = self.log
        return check_note(log.note(path), path, log.bibliography, log.roots)

    def publish(self, uri: str) -> None:
        """Tell the editor what is wrong with a note, or a bibliography."""
        if uris.to_fs_path(uri) is None:
            return  # a text without a file has no place in a log yet
        path = _path(uri)
        text = self.text(path)
        if path.suffix == ".bib":
            broken = Bibliography.read([path]).broken if path.is_file() else ()
            shown = [
                t.Diagnostic(
                    t.Range(t.Position(one.line - 1, 0), t.Position(one.line, 0)),
                    one.reason, severity=t.DiagnosticSeverity.Error, source="modgraft",
                )
                for one in broken
            ]  # fmt: skip
        else:
            shown = [self.diagnostic(one, text) for one in self.problems(path)]
        self.text_document_publish_diagnostics(t.PublishDiagnosticsParams(uri, shown))

    def diagnostic(self, one: Diagnostic, text: Text) -> t.Diagnostic:
        """A problem in the editor's terms; of a long stretch, its first line."""
        line = text.data[one.start : one.end].splitlines()[:1]
        end = one.start + len(line[0]) if line else one.end
        where = self.range(text, one.start, end)
        severity = _SEVERITY[one.severity]
        return t.Diagnostic(where, one.message, severity=severity, code=one.code, source="modgraft")


def _path(uri: str) -> Path:
    path = uris.to_fs_path(uri)
    if path is None:
        raise JsonRpcInvalidParams(message=f"{uri} is no file")
    return Path(path)


def _entry(entry: Entry) -> str:
    """A source in a few lines of Markdown: title, authors and year, how its abstract begins."""
    words = entry.abstract.split()
    abstract = " ".join(words[:_ABSTRACT]) + (" …" if len(words) > _ABSTRACT else "")
    who = f"{', '.join(entry.authors) or 'no author'} · {entry.year or 'no year'}"
    parts = [f"**{_plain(entry.title) or entry.key}**", _plain(who), _plain(abstract)]
    return "\n\n".join(part for part in parts if part)


def _plain(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", text)


def opened(ls: Server, params: t.DidOpenTextDocumentParams) -> None:
    """Report on a text as it is opened."""
    ls.log.look_again()
    ls.publish(params.text_document.uri)


def changed(ls: Server, params: t.DidChangeTextDocumentParams) -> None:
    """Report on a text as it is typed."""
    ls.publish(params.text_document.uri)


def saved(ls: Server, params: t.DidSaveTextDocumentParams) -> None:
    """Report on all texts: a saved source may be what they cite."""
    ls.log.look_again()
    for uri in ls.workspace.text_documents:
        ls.publish(uri)


def closed(ls: Server, params: t.DidCloseTextDocumentParams) -> None:
    """A closed text has nothing to report."""
    uri = params.text_document.uri
    ls.text_document_publish_diagnostics(t.PublishDiagnosticsParams(uri, []))


def completion(ls: Server, params: t.CompletionParams) -> list[t.CompletionItem]:
    """Keys after `@`, actions after `[`, how far to follow a source after `->`."""
    _, text, at = ls.at(params.text_document.uri, params.position)
    before = text.before(at)
    if found := _KEY_BEFORE.search(before):
        return _keys(ls, ls.range(text, at - len(found[1]), at))
    if found := _STATUS_BEFORE.search(before):
        where = ls.range(text, at - len(found[1]), at)
        said = {"_digging": "look into it further", "_full_read": "read it in full"}
        kind = t.CompletionItemKind.EnumMember
        return [_item(word, meaning, kind, where) for word, meaning in said.items()]
    if found := _ACTION_BEFORE.search(before):
        where, kind = ls.range(text, at - len(found[1]), at), t.CompletionItemKind.Function
        return [_item(row.name, row.meaning, kind, where) for row in ls.log.actions]
    return []


def _keys(ls: Server, where: t.Range) -> list[t.CompletionItem]:
    """All sources; what is typed may be of the key, of an author or of the title."""
    items = []
    for entry in ls.log.bibliography.entries.values():
        item = _item(
            entry.key, f"{entry.short}: {entry.title}", t.CompletionItemKind.Reference, where
        )
        item.filter_text = f"{entry.key} {' '.join(entry.authors)} {entry.title}"
        item.documentation = t.MarkupContent(t.MarkupKind.Markdown, _entry(entry))
        items.append(item)
    return items


def _item(label: str, detail: str, kind: t.CompletionItemKind, where: t.Range) -> t.CompletionItem:
    return t.CompletionItem(label, detail=detail, kind=kind, text_edit=t.TextEdit(where, label))


def hover(ls: Server, params: t.HoverParams) -> t.Hover | None:
    """A source in a few lines, or what an action means."""
    path, text, at = ls.at(params.text_document.uri, params.position)
    found = ls.log.key_at(path, at)
    if found is not None:
        key, place = found
        sources = ls.log.bibliography
        if key in sources:
            said = _entry(sources.entries[key])
        else:
            near = ", ".join(f"@{one}" for one in sources.nearest(key))
            said = _plain(f"{key} is not in the bibliography. {near and f'Near: {near}'}")
        where = ls.range(text, place.start, place.end)
        return t.Hover(t.MarkupContent(t.MarkupKind.Markdown, said), where)
    for event in ls.log.note(path).events if path.suffix == ".md" else ():
        head = event.inside[0] if event.inside else event.start + 1 + len(event.written)
        if event.start <= at < head and (row := ls.log.actions.find(event.action)):
            said = f"**{_plain(row.name)}**: {_plain(row.meaning)}"
            where = ls.range(text, event.start, head)
            return t.Hover(t.MarkupContent(t.MarkupKind.Markdown, said), where)
    return None


def definition(ls: Server, params: t.DefinitionParams) -> list[t.Location]:
    """The entry of a key, the file of a link."""
    path, _, at = ls.at(params.text_document.uri, params.position)
    found = ls.log.key_at(path, at)
    if found is not None:
        return [ls.location(place) for place in ls.log.declarations(found[0])]
    if path.suffix != ".md":
        return []
    note = ls.log.note(path)
    for link in (*note.links, *note.figures):
        if link.start <= at < link.end:
            return _targets(link.target, (path.parent, *ls.log.roots))
    return []


def _targets(target: str, folders: tuple[Path, ...]) -> list[t.Location]:
    path = next(filter(None, (found_at(folder, target) for folder in folders)), None)
    start = t.Position(0, 0)
    return [] if path is None else [t.Location(path.resolve().as_uri(), t.Range(start, start))]


def references(ls: Server, params: t.ReferenceParams) -> list[t.Location]:
    """Everywhere that a key is cited."""
    path, _, at = ls.at(params.text_document.uri, params.position)
    found = ls.log.key_at(path, at)
    if found is None:
        return []
    key = found[0]
    places = [Place(where, one.start, one.end) for where, one in ls.log.citations(key)]
    if params.context.include_declaration:
        places += ls.log.declarations(key)
    return [ls.location(place) for place in places]


def prepare(ls: Server, params: t.PrepareRenameParams) -> t.PrepareRenamePlaceholder | None:
    """What would be renamed: the key under the cursor."""
    path, text, at = ls.at(params.text_document.uri, params.position)
    found = ls.log.key_at(path, at)
    if found is None:
        return None
    key, place = found
    return t.PrepareRenamePlaceholder(ls.range(text, place.start, place.end), key)


def rename(ls: Server, params: t.RenameParams) -> t.WorkspaceEdit | None:
    """A key under another name, in every note and every .bib."""
    path, _, at = ls.at(params.text_document.uri, params.position)
    found = ls.log.key_at(path, at)
    if found is None:
        return None
    try:
        places = ls.log.rename(found[0], params.new_name)
    except ModgraftError as error:
        raise JsonRpcInvalidParams(message=str(error)) from error
    edits: dict[str, list[t.TextEdit]] = {}
    for place in places:
        where = ls.location(place)
        edits.setdefault(where.uri, []).append(t.TextEdit(where.range, params.new_name))
    return t.WorkspaceEdit(changes=edits)


def fixes(ls: Server, params: t.CodeActionParams) -> list[t.CodeAction]:
    """The fixes of what is wrong in a range."""
    uri = params.text_document.uri
    path, text, start = ls.at(uri, params.range.start)
    end = text.offset(params.range.end.line, params.range.end.character)
    if path.suffix != ".md":
        return []
    actions = []
    for one in ls.problems(path):
        if one.fix and one.start <= end and start <= one.end:
            new = one.fix.replacement.decode("utf-8", "replace")
            edit = t.TextEdit(ls.range(text, one.fix.start, one.fix.end), new)
            actions.append(
                t.CodeAction(
                    one.fix.what[:1].upper() + one.fix.what[1:],
                    kind=t.CodeActionKind.QuickFix,
                    diagnostics=[ls.diagnostic(one, text)],
                    edit=t.WorkspaceEdit(changes={uri: [edit]}),
                )
            )
    return actions


_FEATURES = (
    (t.TEXT_DOCUMENT_DID_OPEN, opened, None),
    (t.TEXT_DOCUMENT_DID_CHANGE, changed, None),
    (t.TEXT_DOCUMENT_DID_SAVE, saved, None),
    (t.TEXT_DOCUMENT_DID_CLOSE, closed, None),
    (
        t.TEXT_DOCUMENT_COMPLETION,
        completion,
        t.CompletionOptions(trigger_characters=["@", "[", "_"]),
    ),
    (t.TEXT_DOCUMENT_HOVER, hover, None),
    (t.TEXT_DOCUMENT_DEFINITION, definition, None),
    (t.TEXT_DOCUMENT_REFERENCES, references, None),
    (t.TEXT_DOCUMENT_PREPARE_RENAME, prepare, None),
    (t.TEXT_DOCUMENT_RENAME, rename, t.RenameOptions(prepare_provider=True)),
    (t.TEXT_DOCUMENT_CODE_ACTION, fixes, t.CodeActionOptions([t.CodeActionKind.QuickFix])),
)


def server() -> Server:
    """The server with its features, not yet started."""
    made = Server()
    for name, answer, options in _FEATURES:
        made.feature(name, options)(answer)
    return made


def main() -> None:
    """Serve an editor over standard input and output."""
    server().start_io()


if __name__ == "__main__":
    main()
