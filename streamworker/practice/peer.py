"""One client connection. h11 parses its requests; every wait ends as soon as the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import h11
import orjson

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""Maximum size of a request: a prompt with images may have tens of megabytes."""

_READ_BYTES: Final = 64 * 1024
_MAX_EARLY_BYTES: Final = 1024 * 1024  # read from a client that sends its next request during our answer


class ClientGoneError(Exception):
    """The client closed or reset the connection."""


class BadRequestError(Exception):
    """The request is not valid HTTP; the connection must be closed after the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Request(NamedTuple):
    """A whole request; `headers` has names in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """Read requests and write bytes. `send*` and `pause` raise ClientGoneError as soon as the client has gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # No buffer above the socket's: after a drain all bytes are in the kernel, so that a scripted reset loses
        # nothing that was counted as sent.
        writer.transport.set_write_buffer_limits(high=0)
        self._http = h11.Connection(h11.SERVER)
        self._loop = asyncio.get_running_loop()
        self._chunked = False
        self._gone = False
        self._pausing: asyncio.Future[None] | None = None
        self.first_byte_at: float | None = None

    async def next_request(self) -> Request | None:
        """Return the next whole request, or None at a clean end. Raises BadRequestError."""
        try:
            return await self._request()
        except h11.RemoteProtocolError as error:
            raise BadRequestError(error.error_status_hint, str(error)) from error
        except OSError:
            return None

    async def _request(self) -> Request | None:
        head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        self.first_byte_at = None
        body = bytearray()
        while isinstance(part := await self._event(), h11.Data):
            body += part.data
            if len(body) > MAX_REQUEST_BYTES:
                raise BadRequestError(413, f"the request is over {MAX_REQUEST_BYTES} bytes")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        return Request(head.method.decode("ascii"), head.target.decode("ascii"), headers, bytes(body))

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self.send(self._framed(h11.InformationalResponse(status_code=100, headers=[])))
            self._http.receive_data(await self._reader.read(_READ_BYTES))
        return event  # type: ignore[return-value]  # NEED_DATA is handled before

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Notice inside the block that the client has gone, even when nothing is written."""
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.wait({watch})

    async def _watch(self) -> None:
        early = 0
        with contextlib.suppress(OSError):
            while data := await self._reader.read(_READ_BYTES):
                self._http.receive_data(data)
                early += len(data)
                if early > _MAX_EARLY_BYTES:
                    return
        self._gone = True
        _release(self._pausing)

    async def pause(self, seconds: float | None) -> None:
        """Wait for `seconds`, or for ever if None. A future is cheaper than a task: a stream pauses before every delta."""
        if seconds is not None and seconds <= 0:
            await asyncio.sleep(0)
        elif not self._gone:
            self._pausing = self._loop.create_future()
            timer = seconds and self._loop.call_later(seconds, _release, self._pausing)
            try:
                await self._pausing
            finally:
                if timer:
                    timer.cancel()
        if self._gone:
            raise ClientGoneError

    async def send(self, data: bytes) -> None:
        """Write, and wait until the socket has accepted the bytes."""
        if self._gone:
            raise ClientGoneError
        if self.first_byte_at is None:
            self.first_byte_at = self._loop.time()
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError as error:
            raise ClientGoneError from error

    async def send_head(
        self,
        status: int,
        headers: Iterable[tuple[str, str]],
        *,
        closes: bool = False,
        length: int | None = None,
    ) -> None:
        """Send the head of a response whose body has a `length`, is chunked, or ends when the connection is closed."""
        self._chunked = False
        if closes:  # h11 would send it chunked, so the head is written here
            lines = [*headers, ("connection", "close")]
            head = "".join(f"{name}: {value}\r\n" for name, value in lines)
            await self.send(f"HTTP/1.1 {status} OK\r\n{head}\r\n".encode())
            return
        if length is not None:
            headers = [*headers, ("content-length", str(length))]
        else:
            self._chunked = (self._http.their_http_version or b"1.1") >= b"1.1"
        await self.send(self._framed(_response(status, headers)))

    async def send_body(self, data: bytes) -> None:
        """Send bytes of the body; if it is chunked, as one HTTP chunk."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def send_torn(self, data: bytes) -> None:
        """Send bytes of the body; if it is chunked, in an HTTP chunk that never ends."""
        await self.send(b"%x\r\n%b" % (len(data) + 64, data) if self._chunked else data)

    async def end_body(self) -> None:
        """End a chunked body, after which the connection may serve the next request. Other bodies need no end."""
        if self._chunked:
            await self.send(self._framed(h11.EndOfMessage()))

    async def reply(
        self, status: int, content_type: str, body: bytes, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """Send a whole response of known length."""
        known = [("content-type", content_type), ("content-length", str(len(body))), *headers]
        head = self._framed(_response(status, known))
        await self.send(head + self._framed(h11.Data(data=body)) + self._framed(h11.EndOfMessage()))

    async def reply_json(self, status: int, body: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Send a whole response with a JSON body."""
        await self.reply(status, "application/json", orjson.dumps(body), headers)

    async def refuse(self, status: int, body: Any) -> None:
        """Answer an invalid request, if HTTP still allows an answer."""
        if self._http.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            with contextlib.suppress(ClientGoneError):
                await self.reply_json(status, body, [("connection", "close")])

    def _framed(self, event: h11.Event) -> bytes:
        return self._http.send(event) or b""

    def reuse(self) -> bool:
        """Prepare for the next request on this connection; return False if it must be closed."""
        if self._gone or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def reset(self) -> None:
        """Close the connection with RST."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection with FIN. Bytes that the client has not read are dropped."""
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _response(status: int, headers: Iterable[tuple[str, str]]) -> h11.Response:
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:  # 524, 529 and the like have no name in the standard
        reason = ""
    return h11.Response(status_code=status, headers=list(headers), reason=reason)


def _release(pausing: asyncio.Future[None] | None) -> None:
    if pausing is not None and not pausing.done():
        pausing.set_result(None)
