"""The log as a page on this machine: timeline, notes, search, reading queue, questions, answers.

It is read-only, is served on a loopback address alone, and needs no JavaScript. What it shows of a
note is escaped (`web.inline`), and what a browser may do with it is said in `web.guard`.
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
from modgraft.log.serve.web import lists, shown
from modgraft.log.serve.web.guard import HOSTS, AddressError, Guard, loopback
from modgraft.log.serve.web.inline import web
from modgraft.log.serve.web.outline import outline

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from modgraft.log.index.query import Hit
    from modgraft.log.log import Log

PORT = 8765
A_PAGE = 50
"""Events on one page."""

LINES = 100
"""Lines that are shown under an answer; the rest is counted."""

SHOWN = 20
"""Sources of each group of the reading queue, before it is asked for by itself."""

FRESH = 1.0
"""Seconds for which the notes are taken to be as they were last seen."""

NAV = (
    ("/", "Timeline"), ("/notes", "Notes"), ("/queue", "Reading queue"),
    ("/questions", "Questions"), ("/lessons", "Lessons"),
)  # fmt: skip
FIELDS = ("q", "action", "cites", "note", "status", "since", "until")
"""Of the search form; all but the first two are a `Query`'s own."""

KINDS = {
    "structured": "Exact: read off the events themselves.",
    "backlink": "Exact: every place that cites it.",
    "temporal": "Exact: by the dates of the lines.",
    "free": "By likeness: the passages that fit the question best.",
}
PICTURE = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
"""For a picture by itself: an SVG may draw, and do nothing else."""

TITLES = {404: "Not found", 405: "Only for reading", 503: "Not now"}
"""Of the pages that say what went wrong."""

LISTING = ("/", "/queue")
"""Pages that say when there is no bibliography."""

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
    """The page over `log`, as an ASGI application."""
    page = Page(log)
    static = StaticFiles(directory=shown.FOLDER / "static")
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
    handlers = {HTTPException: page.wrong, ModgraftError: page.wrong}
    # The headers go around everything, so that an error's page has them too.
    return Guard(Starlette(routes=routes, middleware=[guard], exception_handlers=handlers))


def serve(log: Log, *, host: str = "127.0.0.1", port: int = PORT) -> None:
    """Serve `log` until it is stopped (Ctrl-C).

    Raises:
        AddressError: `host` is no loopback address, or the port is taken.
    """
    import uvicorn

    try:
        bound = socket.create_server((loopback(host), port), family=_family(host))
    except OSError as error:
        raise AddressError(
            f"{host}:{port}: {error.strerror}. Another page is served there? Name another port"
        ) from error
    config = uvicorn.Config(app(log), log_level="warning", server_header=False)
    with bound:
        uvicorn.Server(config).run(sockets=[bound])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class Page:
    """The pages, over one log; each looks at the notes anew, at most every `FRESH` seconds."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.lock = Lock()
        self.seen = float("-inf")
        self.problems: tuple[str, ...] = ()
        self.places = shown.Places(log)
        self.templates = shown.environment(self.places)

    def fresh(self) -> None:
        """Index what has changed."""
        with self.lock:
            if time.monotonic() - self.seen > FRESH:
                self.problems = self.log.index().problems
                self.places.sources = self.log.bibliography.entries
                self.seen = time.monotonic()

    def render(
        self, template: str, here: str = "", *, status: int = 200, **content: Any
    ) -> Response:
        """A page with its head."""
        notices = [NO_SOURCES] if here in LISTING and not self.places.sources else []
        frame = {"nav": NAV, "here": here, "q": "", "problems": notices}
        frame["folders"] = ", ".join(folder.name for folder in self.log.settings.folders)
        return HTMLResponse(self.templates.get_template(template).render(frame | content), status)

    def found(self, query: Query, page: int) -> tuple[list[Hit], bool]:
        """A page of hits, and whether there are more."""
        hits = self.log.query(replace(query, limit=A_PAGE + 1, offset=(page - 1) * A_PAGE))
        return hits[:A_PAGE], len(hits) > A_PAGE

    def timeline(self, request: Request) -> Response:
        """What happened, the newest first."""
        self.fresh()
        page = _page(request)
        hits, more = self.found(Query(newest=True), page)
        tiles, days = lists.tiles(self.log), lists.days(hits)
        return self.render(
            "timeline.html", "/", tiles=tiles, days=days, page=page, more=more, told=self.problems
        )

    def notes(self, request: Request) -> Response:
        """All notes, the newest first."""
        self.fresh()
        page = _page(request)
        rows = lists.notes(self.log, A_PAGE + 1, (page - 1) * A_PAGE)
        more = len(rows) > A_PAGE
        return self.render("notes.html", "/notes", notes=rows[:A_PAGE], page=page, more=more)

    def note(self, request: Request) -> Response:
        """One note, and what leads to it and to its sources."""
        self.fresh()
        name = request.path_params["name"]
        note = self.log.note(name)
        line = _number(request, "line")
        view = self.places.of(note.name or name)
        body = outline(note, view, page=_page(request), lines=(line, line) if line else None)
        return self.render(
            "note.html", note=note, outline=body, facts=lists.facts(self.log, note),
            cited=lists.cited(self.log, note), linking=lists.linking(self.log, note),
        )  # fmt: skip

    def search(self, request: Request) -> Response:
        """Events and passages by words, action, source, note, status and time."""
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
        """An answer with the lines it goes by, or why there is none."""
        self.fresh()
        question = request.query_params.get("q", "").strip()
        answer = self.log.ask(question) if question else None
        return self.render(
            "ask.html", q=question, answer=answer, examples=EXAMPLES, kinds=KINDS, most=LINES
        )

    def queue(self, request: Request) -> Response:
        """The sources, by how far they got."""
        self.fresh()
        status, page = request.query_params.get("status", ""), _page(request)
        every = lists.queue(self.log.reading_queue())
        if status:  # one group, a page of it
            first, more = (
                (page - 1) * A_PAGE,
                any(len(rows) > page * A_PAGE for s, _, rows in every if s == status),
            )
            groups = [
                (s, t, rows, rows[first : first + A_PAGE]) for s, t, rows in every if s == status
            ]
        else:
            groups, more = [(s, t, rows, rows[:SHOWN]) for s, t, rows in every], False
        return self.render(
            "queue.html", "/queue", groups=groups, page=page, more=more,
            again=f"/queue?{urlencode({'status': status})}&page=",
        )  # fmt: skip

    def questions(self, request: Request) -> Response:
        """The questions without an answer, or all."""
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
        """What was learned."""
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
        """One source, and where it is cited."""
        self.fresh()
        key, page = request.path_params["key"], _page(request)
        bibliography, hits = self.log.bibliography, self.log.backlinks(key)
        entry = bibliography.entries.get(key)
        first = (page - 1) * A_PAGE
        return self.render(
            "source.html", key=key, source=entry, near=[] if entry else bibliography.nearest(key),
            url=web(entry.url) if entry else None, hits=hits[first : first + A_PAGE], page=page,
            more=len(hits) > first + A_PAGE, again=f"/source/{quote(key)}?page=",
            status=200 if entry or hits else 404,
        )  # fmt: skip

    def figure(self, request: Request) -> Response:
        """A picture that lies in the log's folders; any other file is not there."""
        root = self.log.settings.root
        place = request.path_params["path"]
        path = None if "\0" in place else shown.picture(self.log, root / place)
        if path is None:
            raise HTTPException(404, "There is no such figure in the log’s folders.")
        return FileResponse(path, headers={"content-security-policy": PICTURE})

    def wrong(self, request: Request, error: Exception) -> Response:
        """What went wrong, in words: no such page or note, or a field that cannot be read."""
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
    """A number of the address; 0 for none, or for what is none or absurd."""
    text = request.query_params.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
