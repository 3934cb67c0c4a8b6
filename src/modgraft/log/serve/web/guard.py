"""Who may ask the page, and what its answers may do in a browser."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from modgraft.core.errors import ModgraftError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names under which a browser may ask; any other is a stranger's page that was rebound to us."""

HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
    "script-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""What goes with every answer: nothing of elsewhere, no script but ours, nothing kept."""


class AddressError(ModgraftError):
    """An address that is not this machine's own."""


def loopback(host: str) -> str:
    """Give `host` back where it is a loopback address.

    Raises:
        AddressError: it is reached from elsewhere; a log is not for others to read.
    """
    try:
        own = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        own = False
    if not own:
        raise AddressError(
            f"{host}: the log is served on this machine only. Use 127.0.0.1, and from another "
            "machine a tunnel: ssh -L 8765:127.0.0.1:8765 HERE"
        )
    return host


class Guard:
    """Adds `HEADERS` to every answer, errors included; one that an answer has itself is kept.

    What another site's page loads from here (a picture, a script, a frame) is refused: it could not
    read the answer, but a question of its own might be passed on to a server that phrases answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer back with the headers."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.decode("latin-1").lower() for name, _ in message["headers"]}
                more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n not in own]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        asked = Headers(scope=scope) if scope["type"] == "http" else Headers()
        site, what = asked.get("sec-fetch-site", "none"), asked.get("sec-fetch-dest", "document")
        strange = site not in ("none", "same-origin") and what != "document"  # a link is followed
        refusal = PlainTextResponse("Another site asks for this.", 403)
        await (refusal if strange else self.app)(scope, receive, with_headers)
