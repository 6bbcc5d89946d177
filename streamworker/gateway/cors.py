"""Cross-origin requests of browsers (the Fetch standard, "CORS protocol"), for the configured origins only."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Cors"]

_METHODS = "GET, POST, DELETE"
_HEADERS = ("authorization", "content-type", "last-event-id", "idempotency-key", "x-api-key", "x-request-id")
_PREFIXES = ("streamworker-", "x-stainless-")
"""Beginnings of further headers that pages may send. CORS has no wildcard for part of a name."""
_EXPOSED = (
    "streamworker-job-id, streamworker-resumed-from, retry-after, x-request-id, x-should-retry, location, "
    "idempotent-replay"
)
_MAX_AGE_S = "7200"
_MAX_NAMES = 64
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Cors:
    """Answers preflight requests, and adds the headers that let a page read a response. No credentials: no cookies."""

    def __init__(self, origins: Iterable[str], *, has_auth: bool = True) -> None:
        self._origins = frozenset(origins)
        self._has_auth = has_auth

    def allows(self, origin: str) -> bool:
        """Whether pages of this origin may call the gateway."""
        return origin in self._origins

    def may_act(self, request: web.Request) -> bool:
        """Whether the page that sends a request, if a page sends it, may act on the gateway without being asked first.

        Browsers open websockets, and send some POSTs, across origins without a preflight request.
        """
        origin = request.headers.get(hdrs.ORIGIN)
        return origin is None or self.allows(origin) or self._is_own(request, origin)

    def _is_own(self, request: web.Request, origin: str) -> bool:
        """Whether the page was served by this gateway.

        Without authentication only under a loopback name: any page can give its own name to this address (DNS
        rebinding).
        """
        try:
            parts = urlsplit(origin)
            is_loopback = parts.hostname in _LOOPBACK
        except ValueError:
            return False
        is_own = parts.scheme in {"http", "https"} and parts.netloc == request.host
        return is_own and (is_loopback or self._has_auth)

    def preflight(self, request: web.Request) -> web.Response | None:
        """Return the response to a preflight request; None for any other request."""
        headers = request.headers
        if (
            request.method != hdrs.METH_OPTIONS
            or hdrs.ORIGIN not in headers
            or hdrs.ACCESS_CONTROL_REQUEST_METHOD not in headers
        ):
            return None
        response = web.Response(status=204)
        if self.allows(headers[hdrs.ORIGIN]):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = _METHODS
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = _allowed(
                headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
            )
            response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = _MAX_AGE_S
        return response

    def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers that a page of an allowed origin needs."""
        if not self._origins:
            return
        response.headers.add(hdrs.VARY, "Origin")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and self.allows(origin):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED


def _allowed(requested: str) -> str:
    names = [name.strip().lower() for name in requested.split(",")[:_MAX_NAMES]]
    more = sorted({name for name in names if name.startswith(_PREFIXES) and _is_token(name)})
    return ", ".join((*_HEADERS, *more))


def _is_token(name: str) -> bool:
    return name.isascii() and name.replace("-", "").isalnum()
