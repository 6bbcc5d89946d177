"""A connection while it carries an event stream.

A stream lasts as long as a job, and most of what aiohttp keeps of a request is not needed for that: the request with its
headers, the response with its own, the parser, two tasks and their coroutines, 15 KB together. So the stream takes the
transport over, and the handler returns. Behind the stream the transport gets a new protocol of aiohttp.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import structlog
from aiohttp import web

from streamworker.redaction import without_message

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["StreamConnection", "StreamedResponse"]

T = TypeVar("T", bound="StreamConnection")

log = structlog.get_logger()

_MAX_KEPT_BYTES = 16_384
"""Of what the client sends during the stream. The connection is closed behind the stream if it sends more."""

_FLUSH_S = 30.0
"""How long a client may take for the rest of an ended stream before the connection is cut."""


class StreamedResponse(web.StreamResponse, Generic[T]):
    """A response whose body is written by a stream that outlives the handler."""

    connection: T

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: the stream ends the body."""


class ConnectionOwner(Protocol):
    """The server of a connection."""

    def adopt(self, connection: StreamConnection, received: bytes, *, is_paused: bool) -> None:
        """Serve further requests on the connection.

        `received` was sent during the stream. `is_paused`: the transport has called `pause_writing`.
        """
        ...

    def forget(self, connection: StreamConnection) -> None:
        """Note that the connection is closed."""
        ...


class StreamConnection(asyncio.Protocol):
    """Runs the task of a stream, and cancels it when the client is gone."""

    __slots__ = (
        "_ended",
        "_is_kept",
        "_kept",
        "_owner",
        "_paused",
        "_waiter",
        "is_paused",
        "task",
        "transport",
    )

    def __init__(self, transport: asyncio.Transport, owner: ConnectionOwner) -> None:
        """Take the transport over."""
        self.transport = transport
        self.task: asyncio.Task[None] | None = None
        self._owner = owner
        self._is_kept = False
        self._kept = b""
        self.is_paused = False
        """Whether more than the transport's limit waits there for the client: a stream should wait before it writes more."""
        self._paused: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended: Callable[[int], None] | None = None
        transport.set_protocol(self)

    def run(self, stream: Coroutine[Any, Any, int], *, keep_alive: bool) -> None:
        """Run a stream in a task. It returns the status for the access log.

        With `keep_alive`, the connection serves further requests behind it. Otherwise, and where the stream was cut, it
        is closed.
        """
        self._is_kept = keep_alive
        self.task = asyncio.get_running_loop().create_task(self._run(stream))

    def on_end(self, ended: Callable[[int], None]) -> None:
        """Have `ended(status)` called when the stream is over."""
        self._ended = ended

    def on_pause(self, paused: Callable[[], None]) -> None:
        """Have `paused()` called when `is_paused` becomes true, which happens in a write."""
        self._paused = paused

    async def _run(self, stream: Coroutine[Any, Any, int]) -> None:
        status = 499  # the client disconnected
        try:
            status = await stream
        except Exception as error:
            log.error("gateway.stream_failed", exc_info=without_message(error))  # noqa: TRY400 - without the exception's message
            self.transport.abort()  # the client sees that the stream is not whole
        finally:
            if self._ended is not None:
                self._ended(status)
            self._release(is_whole=status == 200)

    def _release(self, *, is_whole: bool) -> None:
        self._paused = None
        if is_whole and self._is_kept and not self.transport.is_closing():
            self._owner.adopt(self, self._kept, is_paused=self.is_paused)
            return
        if self.transport.get_write_buffer_size():  # the client may never take the rest
            asyncio.get_running_loop().call_later(_FLUSH_S, self.transport.abort)
        self.transport.close()

    async def drain(self) -> None:
        """Wait until the transport has passed on what it holds. Raises ConnectionResetError."""
        if self.transport.is_closing():
            raise ConnectionResetError("the client is gone")
        if self.is_paused:
            if self._waiter is None or self._waiter.done():
                self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    # Called by the transport

    def data_received(self, data: bytes) -> None:
        """Keep a request that is sent before the end of the stream."""
        if not self._is_kept:
            return
        self._kept += data
        if len(self._kept) > _MAX_KEPT_BYTES:
            self._is_kept, self._kept = False, b""

    def pause_writing(self) -> None:
        """Let `drain` wait."""
        self.is_paused = True
        if self._paused is not None:
            self._paused()

    def resume_writing(self) -> None:
        """Let `drain` return."""
        self.is_paused = False
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def connection_lost(self, _: BaseException | None) -> None:
        """Cancel the stream."""
        self._owner.forget(self)
        if self.task is not None:
            self.task.cancel()
