"""The body of a response, between the connection that receives it and the reader that pulls it or is called with it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["MAX_BUFFERED_BYTES", "Body"]

MAX_BUFFERED_BYTES = 64 << 10
"""Body bytes that wait for a slow reader before the connection stops reading. One read (256 KiB) may come on top."""


class Source(Protocol):
    """The connection, as a body sees it."""

    def forward(self, on_data: Callable[[bytes], None]) -> None:
        """Call `on_data` with each piece of the body from now on."""

    def pause_reading(self) -> None:
        """Stop reading."""

    def resume_reading(self) -> None:
        """Resume reading."""

    def drain(self, body: Body, timeout_s: float) -> None:
        """Throw the rest of a body away, within bounds."""

    def abandon(self, body: Body) -> None:
        """Close the connection, unless the exchange of this body is over."""


class Body(httpx.AsyncByteStream):
    """The body of a response, still encoded. It is pulled by `Response.aiter_raw()`, or pushed to a subscriber.

    `response.extensions["body_feed"]` is this object, and `subscribe()` begins the push. The connection returns to the
    pool as soon as the body is complete, whether or not it has been read; `aclose()` before that closes the socket at
    once, so that the upstream stops generating.
    """

    def __init__(self, connection: Source, read_timeout_s: float | None) -> None:
        self._connection: Source | None = connection
        self._read_timeout_s = read_timeout_s
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_paused = False
        self._error: httpx.TransportError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_end: Callable[[httpx.TransportError | None], None] | None = None
        self.is_complete = False
        """The body has arrived as a whole, so that the connection can serve other requests or was closed in order."""

    @property
    def buffered_bytes(self) -> int:
        """The bytes that have arrived and were not read yet."""
        return self._size

    # What a subscriber calls.

    def subscribe(
        self,
        on_data: Callable[[bytes], None],
        on_end: Callable[[httpx.TransportError | None], None],
    ) -> None:
        """Push the body: call `on_data` with each piece, from the loop's read callback, and `on_end` once.

        What has arrived before is delivered by this call. `on_end` gets None at the end of the body, or the exception
        that `aiter_raw()` would raise; everything decoded before a fault precedes it. Neither callback may raise; both
        may call every method of this object. The read timeout does not apply: the subscriber has its own. Use either
        this or `aiter_raw()`, and this once.
        """
        connection = self._connection
        data = self._take()
        self._on_end = on_end
        if connection is not None:
            connection.forward(on_data)
            self.resume_reading()
        if data:
            on_data(data)
        if connection is None:
            self._notify()

    def pause_reading(self) -> None:
        """Stop reading from the socket. `on_data` is not called until `resume_reading()`; `on_end` may be."""
        if self._connection is not None and not self._is_paused:
            self._is_paused = True
            self._connection.pause_reading()

    def resume_reading(self) -> None:
        """Resume reading from the socket."""
        if self._connection is not None and self._is_paused:
            self._is_paused = False
            self._connection.resume_reading()

    def drain(self, timeout_s: float) -> None:
        """Give the rest of the body up, but let it end within `timeout_s`, so that the connection can be used again.

        For a consumer that has all it wants, and expects only the end of the framing. It does not wait; no callback is
        called any more, and `aclose()` does nothing.
        """
        connection, self._connection = self._connection, None
        self._on_end = None
        if connection is not None:
            connection.drain(self, timeout_s)

    # What httpx calls.

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what has arrived since the last time, at least a byte. Raises httpx.TransportError at a fault."""
        while True:
            if data := self._take():
                self.resume_reading()
                yield data
            elif self._connection is None:
                if self._error is not None:
                    raise self._error
                return
            else:
                await self._wait()

    async def aclose(self) -> None:
        """Close the connection at once, unless the body is complete or drained."""
        connection, self._connection = self._connection, None
        self._on_end = None
        self._take()
        if connection is not None:
            connection.abandon(self)

    # What the connection calls.

    def buffer(self, data: bytes) -> None:
        """Keep what has arrived for a reader that is not there yet, or slow."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= MAX_BUFFERED_BYTES:
            self.pause_reading()
        self._wake()

    def end(self, error: httpx.TransportError | None) -> None:
        """End the body."""
        self._connection = None
        self._error = error
        self.is_complete = error is None
        self._wake()
        self._notify()

    # Inside.

    def _notify(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self._error)

    def _take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        self._size = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._read_timeout_s):
                await self._waiter
        except TimeoutError as error:
            await self.aclose()
            text = f"the upstream sent nothing for {self._read_timeout_s:g} s"
            raise httpx.ReadTimeout(text) from error
        finally:
            self._waiter = None
