"""Render a piece of a note as HTML: inline Markdown by markdown-it, with events and citations.

A note is not trusted. Its HTML is shown as text. Its links may lead to the web, to a mailbox or to
what this website serves; any other link is shown as text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token
    from markdown_it.utils import OptionsDict

    from modgraft.log.syntax.note import Event

KINDS: Mapping[str, str] = {
    "skim": "reading", "read": "reading",
    "question": "asking", "hypothesize": "asking",
    "eureka": "idea", "lesson_learned": "idea",
    "code": "made", "calculate": "made",
    "interrupt": "broke",
}  # fmt: skip
"""Action → the colour of its badge; any other is plain."""

NESTED = 8
"""Levels of nested events that are rendered; deeper ones are shown as text."""

LOST = "There is no such figure in the log’s folders"
UNKNOWN = {False: "not in the bibliography", True: "not in the bibliography; a person, perhaps"}

_URL = re.compile(r"(?<!\w)https?://[^\s<>\"'`\]]+")
_POINTS = re.compile(r"[\s()\[\]:>-]*")
_MATH = re.compile(r"\$(?=\S)[^$\n]{1,2000}?(?<![\s\\])\$(?!\d)")


@dataclass(frozen=True, slots=True)
class View:
    """How the citations, links and pictures of a note are resolved.

    Args:
        title: Citation key → title to show on hover, or None if the bibliography lacks it.
        href: Target of a link → its address, or None to show it as text.
        figure: Target of a picture → its address, or None if it cannot be shown.
        lost: The text to show on hover in place of a missing picture.
    """

    title: Callable[[str], str | None]
    href: Callable[[str], str | None]
    figure: Callable[[str], str | None]
    lost: str = LOST


def web(target: str) -> str | None:
    """Return an address if it leads to the web or to a mailbox; else None."""
    # Browsers ignore blanks and control characters in a scheme, so none are allowed.
    return target if re.fullmatch(r"(?:https?://|mailto:)[^\s\x00-\x20]+", target, re.I) else None


def badge(action: str, written: str) -> Markup:
    """Render an event's name as a badge in the colour of its kind."""
    shown = Markup('<span class="badge {}">{}</span>')
    return shown.format(KINDS.get(action, "plain"), written.replace("_", " "))


def inline(
    text: str,
    view: View,
    keys: Collection[str] = (),
    events: Mapping[int, tuple[Event, int]] = {},
    *,
    level: int = 0,
) -> Markup:
    """Render a piece of Markdown as HTML.

    Args:
        text: The Markdown, of one block.
        view: Resolves citations, links and pictures.
        keys: The citation keys to recognise, with or without @.
        events: Position in `text` → the event that starts there, and the position of its end.
        level: The number of events around it.
    """
    # The length must not change: the events' positions refer to the original text.
    source = text.replace("\r", " ").replace("\0", "\ufffd")
    env: dict[str, Any] = {"view": view, "keys": keys, "events": events, "level": level}
    env["marks"] = _marks(source, keys, events)
    env["places"] = sorted(env["marks"])
    markdown = _markdown()
    # The renderer escapes all text, and every address comes from `View.href`.
    return Markup(markdown.renderInline(source, env))  # noqa: S704


def table(text: str, view: View) -> Markup:
    """Render a Markdown table as HTML."""
    env: dict[str, Any] = {"view": view, "keys": (), "events": {}, "level": 0}
    env |= {"marks": {}, "places": []}  # positions in its cells are not positions in the block
    markdown = _markdown()
    tokens = markdown.parse(text.replace("\0", "\ufffd"), env)
    for token in tokens:
        # The content security policy allows no inline styles.
        if "right" in str(token.attrs.pop("style", "")):
            token.attrs["class"] = "number"
    return Markup(markdown.renderer.render(tokens, markdown.options, env))  # noqa: S704


def _marks(
    source: str, keys: Collection[str], events: Mapping[int, tuple[Event, int]]
) -> dict[int, tuple[str, str]]:
    """Find where an event, a bare address, a formula or a citation starts."""
    marks = {at.start(): ("url", at[0].rstrip(".,;:!?)*_")) for at in _URL.finditer(source)}
    marks |= {at.start(): ("math", at[0]) for at in _MATH.finditer(source)}
    if names := sorted(keys, key=len, reverse=True):
        known = re.compile(rf"(?<![\w@])@?(?:{'|'.join(map(re.escape, names))})(?!\w)")
        marks |= {at.start(): ("citation", at[0]) for at in known.finditer(source)}
    return marks | dict.fromkeys(events, ("event", ""))


@cache
def _markdown() -> MarkdownIt:
    markdown = MarkdownIt("js-default", {"html": False, "maxNesting": 60})
    markdown.inline.ruler.at("text", _text)
    markdown.inline.ruler.before("text", "marks", _mark)
    for rule, render in (("link_open", _link_open), ("link_close", _link_close), ("image", _image)):
        markdown.add_render_rule(rule, render)
    # `View.href` decides about each link when it is rendered; markdown-it drops none before.
    markdown.validateLink = lambda url: True
    return markdown


def _text(state: StateInline, silent: bool) -> bool:
    """Parse plain text, up to the next special character or the next mark."""
    found = state.md.inline.terminator_re.search(state.src, state.pos)
    end = min(found.start() if found else state.posMax, state.posMax)
    places = state.env["places"]
    after = bisect_right(places, state.pos)
    end = min([end, *places[after : after + 1]])
    if end == state.pos:
        return False
    if not silent:
        state.append_pending(state.src[state.pos : end])
    state.pos = end
    return True


def _mark(state: StateInline, silent: bool) -> bool:
    """Parse an event, a bare address, a formula or a citation, if one starts here."""
    kind, text = state.env["marks"].get(state.pos, ("", ""))
    if not kind or (kind in {"url", "citation"} and state.linkLevel > 0):
        return False
    if kind == "event":
        return _event(state, silent)
    if state.pos + len(text) > state.posMax:
        return False
    if not silent:
        state.push("html_inline", "", 0).content = _render_mark(kind, text, state.env["view"])
    state.pos += len(text)
    return True


def _render_mark(kind: str, text: str, view: View) -> Markup:
    if kind == "math":
        return Markup('<span class="math">{}</span>').format(text)
    if kind == "url":
        return _anchor(view.href(text), text) + escape(text) + _end(view.href(text))
    key = text.lstrip("@")
    title = view.title(key)
    shown = Markup('<a class="cite{}" href="/source/{}" title="{}">{}</a>')
    missing = "" if title or is_name(key) else " missing"
    return shown.format(missing, quote(key), title or UNKNOWN[is_name(key)], text)


def is_name(key: str) -> bool:
    """Return whether an unknown key is more likely a person's handle, since it has no year."""
    return not any(letter.isdigit() for letter in key)


def _event(state: StateInline, silent: bool) -> bool:
    """Parse `[name(arguments) -> result]`, whose parts are inline text again."""
    event, end = state.env["events"][state.pos]
    if end > state.posMax:
        return False
    if not silent:
        state.push("html_inline", "", 0).content = _render_event(state, event, end)
    state.pos = end
    return True


def _render_event(state: StateInline, event: Event, end: int) -> Markup:
    # Each part is rendered by itself: emphasis that starts in one must not end outside it.
    html = Markup('<span class="event">{}').format(badge(event.action, event.written))
    at = state.pos + 1 + len(event.written)
    for part, name in ((event.arguments, "arguments"), (event.result, "result")):
        found = state.src.find(part, at, end) if part else -1
        if found >= 0:
            html += _between(state.src, at, found)
            at = found + len(part or "")
        if name == "result" and event.result is not None:
            html += Markup(' <span class="arrow" aria-label="gives">→</span>')
        if part:  # a part over several lines is shown as it was parsed
            inner = _part(state, found, at) if found >= 0 else escape(part)
            html += Markup(' <span class="{}">{}</span>').format(name, inner)
    return html + _between(state.src, at, end) + Markup("</span>")


def _part(state: StateInline, start: int, end: int) -> Markup:
    """Render a part of an event, with up to `NESTED` levels of events in it."""
    env, text = state.env, state.src[start:end]
    if env["level"] >= NESTED:
        return escape(text)
    within = {
        at - start: (event, last - start)
        for at, (event, last) in env["events"].items()
        if start <= at and last <= end
    }
    return inline(text, env["view"], env["keys"], within, level=env["level"] + 1)


def _between(source: str, start: int, end: int) -> Markup:
    """Render what stands between an event's parts: nothing for punctuation, but other words."""
    if _POINTS.fullmatch(source, start, end):
        return Markup("")
    return escape(f" {source[start:end].strip()}")


def _link_open(
    self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict,
    env: MutableMapping[str, Any],
) -> str:  # fmt: skip
    target = str(tokens[index].attrGet("href") or "")
    href = env["view"].href(target)
    env.setdefault("open", []).append(href)
    return _anchor(href, target)


def _link_close(
    self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict,
    env: MutableMapping[str, Any],
) -> str:  # fmt: skip
    return _end(env["open"].pop())


def _anchor(href: str | None, target: str) -> Markup:
    if href is None:
        return Markup('<span class="unlinked" title="{}">').format(target)
    outside = Markup(' rel="noreferrer noopener"') if not href.startswith("/") else ""
    return Markup('<a href="{}"{}>').format(href, outside)


def _end(href: str | None) -> Markup:
    return Markup("</span>") if href is None else Markup("</a>")


def _image(
    self: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict,
    env: MutableMapping[str, Any],
) -> str:  # fmt: skip
    target = str(tokens[index].attrGet("src") or "")
    alt = tokens[index].content or target.rpartition("/")[2].rpartition(".")[0].replace("_", " ")
    if source := env["view"].figure(target):
        return Markup('<a class="figure" href="{0}"><img src="{0}" alt="{1}" loading="lazy"></a>'
                      ).format(source, alt)  # fmt: skip
    lost = Markup('<span class="lost" title="{}">▧ {}</span>')
    return lost.format(env["view"].lost, " ".join(filter(None, (tokens[index].content, target))))
