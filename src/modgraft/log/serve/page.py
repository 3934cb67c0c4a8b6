"""Serve the log as a website on this machine: timeline, notes, search, queue, questions, answers.

It is read-only, is served on a loopback address only, and needs no JavaScript. The text of notes is
escaped (`web.inline`), and headers restrict what a browser may do with it (`web.guard`).
"""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from modgraft.core.errors import ModgraftError
from modgraft.log.index.database import LockedIndexError
from modgraft.log.index.query import Query
from modgraft.log.index.select import STATUSES
from modgraft.log.serve.web import lists, rendering
from modgraft.log.serve.web.guard import HOSTS, AddressError, Guard, loopback
from modgraft.log.serve.web.inline import web
from modgraft.log.serve.web.outline import outline

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from modgraft.log.index.query import Hit
    from modgraft.log.log import Log

PORT = 8765
PAGE_SIZE = 50
"""Events on one page."""

LINES = 100
"""Lines shown under an answer; the rest is counted."""

GROUP_SIZE = 20
"""Sources of each group of the reading queue, on the page of all groups."""

FRESH = 1.0
"""Seconds after an update of the index before the next one."""

NAV = (
    ("/", "Timeline"), ("/notes", "Notes"), ("/queue", "Reading queue"),
    ("/questions", "Questions"), ("/lessons", "Lessons"),
)  # fmt: skip
FIELDS = ("q", "action", "cites", "note", "status", "since", "until")
"""The fields of the search form; all but the first two are fields of `Query`."""

KINDS = {
    "structured": "Exact: read off the events themselves.",
    "backlink": "Exact: every place that cites it.",
    "temporal": "Exact: by the dates of the lines.",
    "free": "By likeness: the passages that fit the question best.",
}
PICTURE = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
"""The content security policy of a picture: an SVG may draw, and do nothing else."""

TITLES = {404: "Not found", 405: "Only for reading", 503: "Not now"}
"""Status → the title of the error page."""

NO_SOURCES = (
    "There is no bibliography, so that sources have no titles. Put a .bib file, as Zotero exports "
    "it, into the log’s folder."
)
EXAMPLES = (
    "Which questions are open?",
    "What did I learn?",
    "What do I still owe a full read?",
    "What changed last month?",
)


def app(log: Log) -> ASGIApp:
    """Build the website over `log`, as an ASGI application."""
    page = Page(log)
    static = StaticFiles(directory=rendering.FOLDER / "static")
    routes = [
        Route("/", page.timeline),
        Route("/notes", page.notes),
        Route("/note/{name:path}", page.note),
        Route("/search", page.search),
        Route("/ask", page.ask),
        Route("/queue", page.queue),
        Route("/questions", page.questions),
        Route("/lessons", page.lessons),
        Route("/source/{key:path}", page.source),
        Route("/figure/{path:path}", page.figure),
        Mount("/static", static),
    ]
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    handlers = {HTTPException: page.error, ModgraftError: page.error}
    # The headers are added outermost, so that error pages have them too.
    return Guard(Starlette(routes=routes, middleware=[guard], exception_handlers=handlers))


def serve(log: Log, *, host: str = "127.0.0.1", port: int = PORT) -> None:
    """Serve `log` until it is stopped (Ctrl-C).

    Raises:
        AddressError: `host` is no loopback address, or the port is taken.
    """
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.create_server((loopback(host), port), family=family)
    except OSError as error:
        raise AddressError(
            f"{host}:{port}: {error.strerror}. Another page is served there? Name another port"
        ) from error
    config = uvicorn.Config(app(log), log_level="warning", server_header=False)
    with bound:
        uvicorn.Server(config).run(sockets=[bound])


class Page:
    """The pages over one log; each updates the index first, at most every `FRESH` seconds."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.lock = Lock()
        self.seen = float("-inf")
        self.problems: tuple[str, ...] = ()
        self.resolver = rendering.Resolver(log)
        self.templates = rendering.environment(self.resolver)

    def fresh(self) -> None:
        """Update the index, unless that was done a moment ago."""
        with self.lock:
            if time.monotonic() - self.seen > FRESH:
                self.problems = self.log.index().problems
                self.resolver.sources = self.log.bibliography.entries
                self.seen = time.monotonic()

    def render(
        self, template: str, here: str = "", *, status: int = 200, **content: Any
    ) -> Response:
        """Render a template with the frame of the website."""
        notices = [NO_SOURCES] if here in ("/", "/queue") and not self.resolver.sources else []
        frame = {"nav": NAV, "here": here, "q": "", "problems": notices}
        frame["folders"] = ", ".join(folder.name for folder in self.log.settings.folders)
        return HTMLResponse(self.templates.get_template(template).render(frame | content), status)

    def found(self, query: Query, page: int) -> tuple[list[Hit], bool]:
        """Return one page of hits, and whether there are more."""
        hits = self.log.query(replace(query, limit=PAGE_SIZE + 1, offset=(page - 1) * PAGE_SIZE))
        return hits[:PAGE_SIZE], len(hits) > PAGE_SIZE

    def timeline(self, request: Request) -> Response:
        """Show all events, the newest first."""
        self.fresh()
        page = _page(request)
        hits, more = self.found(Query(newest=True), page)
        tiles, days = lists.tiles(self.log), lists.days(hits)
        return self.render(
            "timeline.html", "/", tiles=tiles, days=days, page=page, more=more, told=self.problems
        )

    def notes(self, request: Request) -> Response:
        """List all notes, the newest first."""
        self.fresh()
        page = _page(request)
        rows = lists.notes(self.log, PAGE_SIZE + 1, (page - 1) * PAGE_SIZE)
        more = len(rows) > PAGE_SIZE
        return self.render("notes.html", "/notes", notes=rows[:PAGE_SIZE], page=page, more=more)

    def note(self, request: Request) -> Response:
        """Show a note, the places that link to it, and its sources."""
        self.fresh()
        name = request.path_params["name"]
        note = self.log.note(name)
        line = _number(request, "line")
        view = self.resolver.view(note.name or name)
        body = outline(note, view, page=_page(request), lines=(line, line) if line else None)
        return self.render(
            "note.html", note=note, outline=body, facts=lists.facts(self.log, note),
            cited=lists.cited(self.log, note), linking=lists.linking(self.log, note),
        )  # fmt: skip

    def search(self, request: Request) -> Response:
        """Search events and passages by words, action, source, note, status and time."""
        self.fresh()
        asked = request.query_params
        fields = {name: asked.get(name, "").strip() for name in FIELDS}
        page, hits, more = _page(request), [], False
        if any(fields.values()):
            text, action = fields["q"] or None, fields["action"] or ()
            rest: dict[str, Any] = {name: fields[name] or None for name in FIELDS[2:]}
            hits, more = self.found(Query(text=text, actions=action, newest=not text, **rest), page)
        given = {name: value for name, value in fields.items() if value}
        return self.render(
            "search.html", fields=fields, hits=hits, page=page, more=more, asked=bool(given),
            again=f"/search?{urlencode(given)}&page=", statuses=STATUSES,
            actions=[row.name for row in self.log.actions],
        )  # fmt: skip

    def ask(self, request: Request) -> Response:
        """Answer a question, with the lines that support the answer, or say why there is none."""
        self.fresh()
        question = request.query_params.get("q", "").strip()
        answer = self.log.ask(question) if question else None
        return self.render(
            "ask.html", q=question, answer=answer, examples=EXAMPLES, kinds=KINDS, most=LINES
        )

    def queue(self, request: Request) -> Response:
        """Show the reading queue: sources by how far they were read."""
        self.fresh()
        status, page = request.query_params.get("status", ""), _page(request)
        first, size = ((page - 1) * PAGE_SIZE, PAGE_SIZE) if status else (0, GROUP_SIZE)
        groups = [
            (name, title, rows, rows[first : first + size])
            for name, title, rows in lists.queue(self.log.reading_queue())
            if status in ("", name)
        ]
        more = bool(status) and any(len(rows) > first + size for _, _, rows, _ in groups)
        return self.render(
            "queue.html", "/queue", groups=groups, page=page, more=more,
            again=f"/queue?{urlencode({'status': status})}&page=",
        )  # fmt: skip

    def questions(self, request: Request) -> Response:
        """List the questions without an answer, or all."""
        self.fresh()
        page, every = _page(request), "all" in request.query_params
        query = Query(actions="question", status=None if every else "open", newest=True)
        hits, more = self.found(query, page)
        return self.render(
            "events.html", "/questions", title="Questions", hits=hits, page=page, more=more,
            lead="All that were asked." if every else "Those under which nothing is written yet.",
            tabs=(("/questions", "Open", not every), ("/questions?all", "All", every)),
            again="/questions?all&page=" if every else "/questions?page=",
            empty="No question is open. One is written [question -> why is it so?]; what is "
            "written under it answers it.",
        )  # fmt: skip

    def lessons(self, request: Request) -> Response:
        """List the lessons."""
        self.fresh()
        page = _page(request)
        hits, more = self.found(Query(actions="lesson_learned", newest=True), page)
        return self.render(
            "events.html", "/lessons", title="Lessons", hits=hits, page=page, more=more, tabs=(),
            lead="What was learned, the newest first.", again="/lessons?page=",
            empty="No lesson yet. One is written [lesson_learned -> what it was], or in the lines "
            "under [lesson_learned].",
        )  # fmt: skip

    def source(self, request: Request) -> Response:
        """Show a source, and where it is cited."""
        self.fresh()
        key, page = request.path_params["key"], _page(request)
        bibliography, hits = self.log.bibliography, self.log.backlinks(key)
        entry = bibliography.entries.get(key)
        first = (page - 1) * PAGE_SIZE
        return self.render(
            "source.html", key=key, source=entry, near=[] if entry else bibliography.nearest(key),
            url=web(entry.url) if entry else None, hits=hits[first : first + PAGE_SIZE], page=page,
            more=len(hits) > first + PAGE_SIZE, again=f"/source/{quote(key)}?page=",
            status=200 if entry or hits else 404,
        )  # fmt: skip

    def figure(self, request: Request) -> Response:
        """Serve a picture in the log's folders; any other file is 404."""
        root = self.log.settings.root
        place = request.path_params["path"]
        path = None if "\0" in place else rendering.picture(self.log, root / place)
        if path is None:
            raise HTTPException(404, "There is no such figure in the log’s folders.")
        return FileResponse(path, headers={"content-security-policy": PICTURE})

    def error(self, request: Request, error: Exception) -> Response:
        """Show an error: no such page or note, or a field that cannot be read."""
        if isinstance(error, HTTPException):
            text = error.detail if error.detail != "Not Found" else "There is no such page here."
            status = error.status_code
        else:
            text, status = str(error), 404 if isinstance(error, KeyError | OSError) else 400
            status = 503 if isinstance(error, LockedIndexError) else status
        title = TITLES.get(status, "That cannot be read")
        return self.render("error.html", status=status, title=title, text=text)


def _page(request: Request) -> int:
    return max(1, _number(request, "page"))


def _number(request: Request, name: str) -> int:
    """Read a number from the query string; 0 if it is missing, malformed or absurdly large."""
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
