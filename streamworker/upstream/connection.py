"""One connection to an upstream: an asyncio protocol that serves one request at a time.

The hot path is one call per read: `Connection.data_received()` -> llhttp -> the subscriber of the body.
"""

from __future__ import annotations

import asyncio
import select
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import httpx

from streamworker.upstream.body import Body
from streamworker.upstream.http1_request import request_bytes
from streamworker.upstream.http1_response import ResponseParser, ServerDisconnected

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Connection", "Origin", "Owner", "Route"]

MAX_DRAINED_BYTES = 64 << 10
"""Body bytes that `Body.drain()` throws away before it closes the connection."""

WRITE_BYTES = 64 << 10
"""A request body is written in pieces of this size, so that the write timeout applies to progress, not to the whole."""


class Origin(NamedTuple):
    """What connections have to agree on to be interchangeable."""

    scheme: str
    host: str
    port: int
    server_name: str
    """The name in the TLS handshake: SNI, and what the certificate is checked for."""


class Route(NamedTuple):
    """What requests contain in addition on a connection to an HTTP proxy."""

    target_prefix: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Owner(Protocol):
    """The pool, as its connections see it."""

    def release(self, connection: Connection) -> None:
        """Take a connection whose exchange is complete, and which can serve another."""

    def discard(self, connection: Connection) -> None:
        """Forget a connection that is closed."""


class Connection(asyncio.Protocol):
    """A connection that serves one exchange (a request and its response) at a time."""

    __slots__ = (
        "_body",
        "_drain_timer",
        "_drained",
        "_early",
        "_is_sent",
        "_is_used",
        "_is_write_paused",
        "_loop",
        "_on_data",
        "_owner",
        "_parser",
        "_transport",
        "_waiter",
        "origin",
        "route",
    )

    def __init__(self, origin: Origin, owner: Owner, route: Route = Route()) -> None:  # noqa: B008 - a constant
        self.origin = origin
        self.route = route
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self._body: Body | None = None
        self._on_data: Callable[[bytes], None] = _ignore
        self._waiter: asyncio.Future[None] | None = None
        self._is_write_paused = False
        self._is_sent = False
        self._is_used = False
        self._early = b""
        self._drained = 0
        self._drain_timer: asyncio.TimerHandle | None = None

    # What the pool and the transport call.

    @property
    def is_usable(self) -> bool:
        """Whether an idle connection can serve a request: it is open, and nothing has arrived on it, EOF included.

        The socket is asked, because the event loop may not have noticed yet: the server closes many at once.
        """
        transport = self._transport
        if transport is None or transport.is_closing() or self._parser is not None:
            return False
        readable = select.poll()
        readable.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not readable.poll(0)

    async def exchange(self, request: httpx.Request) -> httpx.Response:
        """Send a request; return the response once its head has arrived.

        Raises httpx.TransportError, and ServerDisconnected among them. Then, and when cancelled, the connection is
        closed.
        """
        if self._transport is None or self._transport.is_closing():
            raise ServerDisconnected
        timeouts = request.extensions.get("timeout", {})
        read_timeout = timeouts.get("read")
        parser = self._parser = ResponseParser(request.method)
        body = self._body = Body(self, read_timeout)
        self._on_data = body.buffer
        self._is_used, self._is_sent = True, False
        if self._early:
            self._transport.resume_reading()
            self.data_received(self._early)
        try:
            await self._send(request, parser, timeouts.get("write"))
            while parser.head is None and parser.error is None:
                await self._wait(read_timeout, httpx.ReadTimeout)
        except BaseException:
            self.abandon(body)
            raise
        head = parser.head
        if head is None:
            raise parser.error or ServerDisconnected
        parser.release_headers()
        return httpx.Response(
            head.status,
            headers=head.headers,
            stream=body,
            extensions={
                "http_version": head.http_version,
                "reason_phrase": head.reason,
                "body_feed": body,
            },
        )

    def abandon(self, body: Body) -> None:
        """Close the connection, unless the exchange of this body is over. Its reader is not notified."""
        if self._body is body:
            self._detach()
            self.abort()

    def abort(self) -> None:
        """Close the socket at once. The reader of an open body is notified."""
        self._owner.discard(self)
        if self._transport is not None:
            self._transport.abort()
        if self._parser is not None:
            self._parser.fail(httpx.ReadError("the client was closed"))
            self._end(self._parser)

    # What the body calls.

    def forward(self, on_data: Callable[[bytes], None]) -> None:
        """Call `on_data` with each piece of the body from now on."""
        self._on_data = on_data

    def pause_reading(self) -> None:
        """Stop reading; the server is slowed down by TCP."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Resume reading."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def drain(self, body: Body, timeout_s: float) -> None:
        """Throw the rest of a body away, for at most `timeout_s` and MAX_DRAINED_BYTES; then close the connection."""
        if self._body is body:
            self._on_data = self._drop
            self._drained = 0
            self._drain_timer = self._loop.call_later(timeout_s, self.abandon, body)
            self.resume_reading()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse what was read; pass the body on."""
        parser = self._parser
        if parser is None:
            self._receive_unasked(data)
            return
        body = parser.feed(data)
        if body:
            self._on_data(body)
        if parser.changed and self._parser is parser:
            parser.changed = False
            if parser.is_complete or parser.error is not None:
                self._end(parser)
            self._wake()

    def eof_received(self) -> None:
        """End the response, or the idle connection. asyncio closes the transport afterwards."""
        self._owner.discard(self)
        if self._parser is not None:
            self._parser.feed_eof()
            self._end(self._parser)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the response with what broke the connection."""
        self._owner.discard(self)
        self._is_write_paused = False
        parser = self._parser
        if parser is None:
            self._wake()
            return
        if exc is None:
            parser.feed_eof()
        elif parser.is_untouched:
            parser.fail(_caused(ServerDisconnected(), exc))
        else:
            parser.fail(_caused(httpx.ReadError(str(exc) or type(exc).__name__), exc))
        self._end(parser)

    def pause_writing(self) -> None:
        """Make `_write()` wait."""
        self._is_write_paused = True

    def resume_writing(self) -> None:
        """Make `_write()` continue."""
        self._is_write_paused = False
        self._wake()

    # Inside.

    def _receive_unasked(self, data: bytes) -> None:
        """Keep what a server sends on accept, such as "503": it is the answer. Close a connection out of step."""
        if self._is_used or self._transport is None:
            self.abort()
        else:
            self._early = data
            self._transport.pause_reading()

    async def _send(self, request: httpx.Request, parser: ResponseParser, timeout_s: float | None) -> None:
        """Write the request. Stops early where the response has already begun, or the connection is lost."""
        pieces = request_bytes(request, target_prefix=self.route.target_prefix, headers=self.route.headers)
        async with aclosing(pieces):
            async for data in pieces:
                await self._write(data, parser, timeout_s)
                if parser.head is not None or parser.error is not None:
                    return
        self._is_sent = True

    async def _write(self, data: bytes, parser: ResponseParser, timeout_s: float | None) -> None:
        view = memoryview(data)
        for start in range(0, len(data), WRITE_BYTES):
            while self._is_write_paused and parser.head is None and parser.error is None:
                await self._wait(timeout_s, httpx.WriteTimeout)
            transport = self._transport
            if transport is None or transport.is_closing() or parser.head is not None:
                return
            transport.write(view[start : start + WRITE_BYTES])

    async def _wait(self, timeout_s: float | None, exception: type[httpx.TimeoutException]) -> None:
        """Wait until the response has begun or ended, or the write buffer has drained."""
        self._waiter = waiter = self._loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError as error:
            raise exception(f"the upstream did nothing for {timeout_s:g} s") from error
        finally:
            if self._waiter is waiter:
                self._waiter = None

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _end(self, parser: ResponseParser) -> None:
        """End the exchange: release or close the connection, and notify the reader of the body."""
        body = self._body
        self._detach()
        transport = self._transport
        if (
            parser.is_complete
            and parser.is_reusable
            and self._is_sent
            and not self._is_write_paused
            and not self._early  # the request may be answered once more
            and transport is not None
            and not transport.is_closing()
        ):
            transport.resume_reading()  # a reader may have paused it; an idle connection has to notice EOF
            self._owner.release(self)
        else:
            self.abort()
        self._wake()
        if body is not None:
            body.end(parser.error)

    def _detach(self) -> None:
        self._parser = self._body = None
        self._on_data = _ignore
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _drop(self, data: bytes) -> None:
        self._drained += len(data)
        if self._drained > MAX_DRAINED_BYTES and self._body is not None:
            self.abandon(self._body)


def _ignore(_data: bytes) -> None:
    """Drop what arrives after the exchange."""


def _caused(error: httpx.TransportError, cause: Exception) -> httpx.TransportError:
    error.__cause__ = cause
    return error
