"""A connection while it carries a websocket: messages in, pings, and the closing handshake (RFC 6455)."""

from __future__ import annotations

import asyncio
import binascii
from base64 import b64decode, b64encode
from hashlib import sha1
from typing import TYPE_CHECKING

from aiohttp import EofStream, HttpVersion11, WebSocketError, WSMsgType
from aiohttp._websocket.reader import WebSocketDataQueue  # the only queue that `WebSocketReader` takes
from aiohttp.http_websocket import WS_KEY, WebSocketReader

from streamworker.gateway.frame_heads import FrameHeads
from streamworker.gateway.stream_connection import StreamConnection
from streamworker.gateway.websocket_frames import control_frame

if TYPE_CHECKING:
    from aiohttp import web

    from streamworker.gateway.stream_connection import ConnectionOwner

__all__ = ["PING_S", "PONG_S", "SocketClosed", "SocketConnection", "SocketFailed", "accept_of"]

PING_S = 25.0
"""Time without anything from the client after which it is sent a ping."""

PONG_S = 10.0
"""How long the client may take to answer."""

_QUEUE_BYTES = 65_536
"""Of received messages. Above it nothing is read from the client."""

_EARLY_S = 0.005
"""By how much a timer may be early."""

_CLOSE_S = 2.0
_CLOSE, _PING, _PONG = 8, 9, 10
_PROTOCOL_ERROR = 1002
_NO_CODES = frozenset({1004, 1005, 1006, 1015})
"""Codes below 5000 that no close frame may have; the reader refuses those without a meaning (RFC 6455 section 7.4)."""


class SocketClosed(Exception):
    """The client has closed the websocket; `code` is that of the answer."""

    def __init__(self, code: int) -> None:
        super().__init__("the client has closed the websocket")
        self.code = code


class SocketFailed(Exception):
    """What the client sent is not valid; `code` is that of the closing handshake."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def accept_of(request: web.Request) -> str | None:
    """Return the `Sec-WebSocket-Accept` of a handshake; None if it is not valid. Its version is not looked at."""
    headers = request.headers
    options = {option.strip().lower() for option in ",".join(headers.getall("Connection", ())).split(",")}
    key = headers.get("Sec-WebSocket-Key", "")
    try:
        is_key = len(b64decode(key)) == 16
    except (binascii.Error, ValueError):
        return None
    if not is_key or "upgrade" not in options or request.version < HttpVersion11:
        return None
    return b64encode(sha1(key.encode() + WS_KEY).digest()).decode()  # noqa: S324 - RFC 6455 section 4.2.2


class SocketConnection(StreamConnection):
    """Runs the task of a websocket. One task may receive at a time."""

    __slots__ = (
        "_has_closed",
        "_heads",
        "_loop",
        "_pinged_at",
        "_queue",
        "_reader",
        "_reading_paused",
        "_received_at",
        "_timer",
    )

    def __init__(self, transport: asyncio.Transport, owner: ConnectionOwner, max_message_bytes: int) -> None:
        super().__init__(transport, owner)
        loop = asyncio.get_running_loop()
        self._reading_paused = False  # the queue reads this
        self._queue = WebSocketDataQueue(self, _QUEUE_BYTES, loop=loop)  # type: ignore[arg-type]  # it uses the next two methods
        # The reader refuses messages of the size that it is given.
        self._reader = WebSocketReader(self._queue, max_message_bytes + 1, compress=False, decode_text=True)
        self._heads = FrameHeads()
        self._has_closed = False
        self._loop = loop
        self._received_at = loop.time()
        self._pinged_at: float | None = None
        """When the ping was sent that was not answered yet."""
        self._timer = loop.call_later(PING_S, self._look)

    def pause_reading(self) -> None:
        """Read nothing from the client: the queue is full."""
        self._reading_paused = True
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._reading_paused = False
        self.transport.resume_reading()

    async def receive(self) -> str | bytes:
        """Return the next message, text as `str`. Pings are answered.

        Raises:
            ConnectionResetError: the client is gone.
            SocketClosed: the client has closed the websocket. The caller ends what writes to it, then calls `answer_close`.
            SocketFailed: what it sent is not valid.
        """
        while True:
            try:
                message = await self._queue.read()
            except EofStream:
                raise ConnectionResetError("the client is gone") from None
            except WebSocketError as error:
                raise SocketFailed(error.code, str(error)) from None
            match message.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    data: str | bytes = message.data
                    return data
                case WSMsgType.PING:
                    await self.drain()  # answers must not gather for a client that takes none
                    self.transport.write(control_frame(_PONG, message.data))
                case WSMsgType.CLOSE:
                    raise SocketClosed(_answer_to(message.data))

    def answer_close(self, code: int) -> None:
        """Answer the client's close frame. Nothing may be written behind it (RFC 6455 section 5.5.1)."""
        self._say_close(code, b"")

    async def close(self, code: int, message: bytes) -> None:
        """Close the websocket, and wait a short time for the client's side of it."""
        if self._has_closed:
            return
        self._say_close(code, message)
        try:
            async with asyncio.timeout(_CLOSE_S):
                try:
                    while (await self._queue.read()).type is not WSMsgType.CLOSE:
                        pass
                except WebSocketError:
                    await self._outlast()
        except (TimeoutError, EofStream):
            pass

    async def _outlast(self) -> None:
        """Wait until the client closes the connection, which cancels this. What it sends meanwhile is dropped.

        Had the connection been closed with such data unread, the system would have reset it, and the client might lose
        the close frame.
        """
        if self.transport.can_write_eof():
            self.transport.write_eof()
        await self._loop.create_future()

    def _say_close(self, code: int, message: bytes) -> None:
        if not self._has_closed:
            self._has_closed = True
            self._timer.cancel()  # a ping behind the close frame has no answer, and behind `write_eof` it raises
            self.transport.write(control_frame(_CLOSE, code.to_bytes(2, "big") + message))

    # Called by the transport

    def data_received(self, data: bytes) -> None:
        """Read frames."""
        self._received_at = self._loop.time()
        heads = self._heads
        if heads.fault is not None:
            return
        size = heads.valid_bytes(data)
        has_failed, _ = self._reader.feed_data(data[:size])
        if heads.fault is not None and not has_failed:
            self._queue.set_exception(WebSocketError(_PROTOCOL_ERROR, heads.fault))

    def connection_lost(self, error: BaseException | None) -> None:
        """End the task, and what it waits for."""
        self._timer.cancel()
        self._queue.feed_eof()
        super().connection_lost(error)

    # Quiet clients

    def _look(self) -> None:
        """Send a ping to a client that was silent for `PING_S`; cut one that did not answer."""
        loop = self._loop
        now = loop.time()
        if self._pinged_at is not None and self._received_at < self._pinged_at:
            self.transport.abort()
            return
        self._pinged_at = None
        due = self._received_at + PING_S
        if now < due - _EARLY_S:
            self._timer = loop.call_at(due, self._look)
            return
        self.transport.write(control_frame(_PING, b""))
        self._pinged_at = now
        self._timer = loop.call_later(PONG_S, self._look)


def _answer_to(code: int) -> int:
    """Return the code with which a close frame is answered. A code of 0 means that it had none."""
    is_valid = code < 5000 and code not in _NO_CODES
    return (code or 1000) if is_valid else _PROTOCOL_ERROR
