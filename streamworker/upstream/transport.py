"""The transport of httpx for upstreams: HTTP/1.1 over asyncio and llhttp.

httpx stays the client: URLs, headers, authentication, timeouts and exceptions are its own, and any other transport can
stand in for this one. What it adds is a pool without limits and without cost per open stream, framing faults that are
found in the read in which they arrive, and bodies that are pushed: see `Body.subscribe()`, and use
`response.extensions["body_feed"]` to get at it.

No HTTP/2: to close one of its streams early does not tell every server to stop, and one lost packet stalls all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from streamworker.upstream.connection import Connection, Origin
from streamworker.upstream.dial import Dialer, tls_context
from streamworker.upstream.http1_response import ServerDisconnected
from streamworker.upstream.pool import KEEPALIVE_S, ConnectionPool
from streamworker.upstream.proxy import proxy_finder

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

__all__ = ["HttpTransport"]

_PORTS = {"http": 80, "https": 443}


class HttpTransport(httpx.AsyncBaseTransport):
    """Send requests over HTTP/1.1. Use it inside one running loop.

    `ssl_context` is a context, or a function such as `TlsFiles` that returns it for each new connection. `proxy` is a
    proxy URL, "" for none, or "env". Raises ValueError where it is not valid; the text does not repeat it.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | Callable[[], ssl.SSLContext] = tls_context,
        proxy: str = "",
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        make_context = ssl_context if callable(ssl_context) else lambda: ssl_context
        self._dialer = Dialer(proxy_finder(proxy), make_context)
        self._pool = ConnectionPool(keepalive_s)

    @property
    def open_connections(self) -> int:
        """The number of open connections, idle ones included."""
        return self._pool.open_count

    @property
    def idle_connections(self) -> int:
        """The number of connections that wait for a request."""
        return self._pool.idle_count

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request on an idle connection or a new one; return when the response's head has arrived.

        An idle connection that turns out to be closed is replaced by a new one, once and without the caller noticing.
        Raises httpx.TransportError.
        """
        origin = _origin(request)
        # A body that is generated cannot be sent again, so it does not meet connections that may be closed.
        can_repeat = isinstance(request.stream, httpx.ByteStream)
        if can_repeat and (connection := self._pool.take(origin)) is not None:
            try:
                return await connection.exchange(request)
            except ServerDisconnected:
                self._pool.drop_idle(origin)
        connection = await self._connect(origin, request)
        return await connection.exchange(request)

    async def aclose(self) -> None:
        """Close every connection. Bodies that are still open end with httpx.ReadError."""
        self._pool.close()

    async def _connect(self, origin: Origin, request: httpx.Request) -> Connection:
        timeout_s = request.extensions.get("timeout", {}).get("connect")
        connection = await self._dialer.connect(origin, self._pool, timeout_s)
        self._pool.add(connection)
        return connection


def _origin(request: httpx.Request) -> Origin:
    url = request.url
    if url.scheme not in _PORTS:
        raise httpx.UnsupportedProtocol("the URL has to begin with http:// or https://")
    host = url.raw_host.decode("ascii")
    if not host:
        raise httpx.UnsupportedProtocol("the URL has no host")
    server_name = str(request.extensions.get("sni_hostname") or host)
    return Origin(url.scheme, host, url.port or _PORTS[url.scheme], server_name)
