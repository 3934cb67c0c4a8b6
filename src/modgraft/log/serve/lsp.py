"""A language server for notes, over stdio: `modgraft log lsp`.

Diagnostics with their fixes, completion of actions and citation keys, hover, definition,
references, and renaming of a key in all notes and the bibliography. The log is read by
`workspace`; here it is translated to the protocol.
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
    """The server of one log, that of the folder which the editor opened."""

    def __init__(self) -> None:
        # Full texts, since editors and Python disagree about lines (U+2028, form feeds).
        full = t.TextDocumentSyncKind.Full
        super().__init__("modgraft-log", version("modgraft"), text_document_sync_kind=full)
        self._log: Workspace | None = None

    @property
    def log(self) -> Workspace:
        """The log, opened at the first request."""
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
        """Return a file's text, with columns in the editor's units."""
        return Text(self.log.data(path), self.workspace.position_codec.client_num_units)

    def at(self, uri: str, position: t.Position) -> tuple[Path, Text, int]:
        """Return the file, its text and the byte at a position."""
        path = _path(uri)
        text = self.text(path)
        return path, text, text.offset(position.line, position.character)

    def key(self, uri: str, position: t.Position) -> tuple[str, Place] | None:
        """Return the citation key at a position, and its place."""
        path, _, at = self.at(uri, position)
        return self.log.key_at(path, at)

    def range(self, text: Text, start: int, end: int) -> t.Range:
        """Convert a range of bytes to the protocol."""
        return t.Range(t.Position(*text.position(start)), t.Position(*text.position(end)))

    def location(self, place: Place) -> t.Location:
        """Convert a range of a file to the protocol."""
        where = self.range(self.text(place.path), place.start, place.end)
        return t.Location(place.path.as_uri(), where)

    def problems(self, path: Path) -> list[Diagnostic]:
        """Find the problems of a note."""
        log = self.log
        return check_note(log.note(path), path, log.bibliography, log.roots)

    def publish(self, uri: str) -> None:
        """Send the problems of a note or a bibliography to the editor."""
        if uris.to_fs_path(uri) is None:
            return  # a text without a file is not in the log yet
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
        """Convert a problem to the protocol; a long range is cut to its first line."""
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
    """Describe a source in Markdown: title, authors, year, and the start of its abstract."""
    words = entry.abstract.split()
    abstract = " ".join(words[:_ABSTRACT]) + (" …" if len(words) > _ABSTRACT else "")
    who = f"{', '.join(entry.authors) or 'no author'} · {entry.year or 'no year'}"
    parts = [f"**{_plain(entry.title) or entry.key}**", _plain(who), _plain(abstract)]
    return "\n\n".join(part for part in parts if part)


def _plain(text: str) -> str:
    """Escape Markdown, so that `text` is shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", text)


def opened(ls: Server, params: t.DidOpenTextDocumentParams) -> None:
    """Report the problems of a text that was opened."""
    ls.log.forget_files()
    ls.publish(params.text_document.uri)


def changed(ls: Server, params: t.DidChangeTextDocumentParams) -> None:
    """Report the problems of a text that was edited."""
    ls.publish(params.text_document.uri)


def saved(ls: Server, params: t.DidSaveTextDocumentParams) -> None:
    """Report the problems of all open texts, which may cite what was saved."""
    ls.log.forget_files()
    for uri in ls.workspace.text_documents:
        ls.publish(uri)


def closed(ls: Server, params: t.DidCloseTextDocumentParams) -> None:
    """Clear the problems of a text that was closed."""
    uri = params.text_document.uri
    ls.text_document_publish_diagnostics(t.PublishDiagnosticsParams(uri, []))


def completion(ls: Server, params: t.CompletionParams) -> list[t.CompletionItem]:
    """Complete keys after `@`, actions after `[`, and the status of a skim after `->`."""
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
    """Offer all sources; the editor filters by key, authors and title."""
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
    """Describe the source or the action at a position."""
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
    """Find the entry of a key, or the file of a link."""
    path, _, at = ls.at(params.text_document.uri, params.position)
    found = ls.log.key_at(path, at)
    if found is not None:
        return [ls.location(place) for place in ls.log.declarations(found[0])]
    if path.suffix != ".md":
        return []
    note = ls.log.note(path)
    for link in (*note.links, *note.figures):
        if link.start <= at < link.end:
            files = (found_at(folder, link.target) for folder in (path.parent, *ls.log.roots))
            file, start = next(filter(None, files), None), t.Position(0, 0)
            return [t.Location(file.resolve().as_uri(), t.Range(start, start))] if file else []
    return []


def references(ls: Server, params: t.ReferenceParams) -> list[t.Location]:
    """Find all citations of a key."""
    found = ls.key(params.text_document.uri, params.position)
    if found is None:
        return []
    key = found[0]
    places = [Place(where, one.start, one.end) for where, one in ls.log.citations(key)]
    if params.context.include_declaration:
        places += ls.log.declarations(key)
    return [ls.location(place) for place in places]


def prepare(ls: Server, params: t.PrepareRenameParams) -> t.PrepareRenamePlaceholder | None:
    """Return the key at the cursor, which is what would be renamed."""
    found = ls.key(params.text_document.uri, params.position)
    return found and t.PrepareRenamePlaceholder(ls.location(found[1]).range, found[0])


def rename(ls: Server, params: t.RenameParams) -> t.WorkspaceEdit | None:
    """Rename a key in every note and every .bib file."""
    found = ls.key(params.text_document.uri, params.position)
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
    """Offer the fixes of the problems in a range."""
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
    """Build the server with its features, without starting it."""
    made = Server()
    for name, answer, options in _FEATURES:
        made.feature(name, options)(answer)
    return made


def main() -> None:
    """Serve an editor over standard input and output."""
    server().start_io()


if __name__ == "__main__":
    main()
