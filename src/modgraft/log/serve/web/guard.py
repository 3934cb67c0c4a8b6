"""Restrict who may use the website, and what its pages may do in a browser."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from modgraft.core.errors import ModgraftError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Allowed host names; any other comes from another site by DNS rebinding."""

HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
    "script-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Headers of every response: no content from elsewhere, no inline scripts, no caching."""


class AddressError(ModgraftError):
    """An address that is not a loopback address, or is in use."""


def loopback(host: str) -> str:
    """Return `host` if it is a loopback address.

    Raises:
        AddressError: it is reachable from other machines, which must not read the log.
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
    """Adds `HEADERS` to every response, errors included, and refuses requests by other sites.

    A header that a response has already is kept. Another site that loads something from here (a
    picture, a script, a frame) could not read the response, but it could ask a question, which
    might be passed on to the server that phrases answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and add the headers to its response."""

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
