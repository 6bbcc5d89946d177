"""A server that sends given bytes and counts its connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["EVENT_STREAM", "Peer", "RawUpstream", "chunked", "response", "serving"]

EVENT_STREAM = b"content-type: text/event-stream\r\n"


def response(status: int, body: bytes, headers: bytes = b"content-type: application/json\r\n") -> bytes:
    """Return a whole response with a Content-Length."""
    return b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n%b" % (status, headers, len(body), body)


def chunked(*pieces: bytes, headers: bytes = EVENT_STREAM, ends: bool = True) -> bytes:
    """Return a response with chunked coding, with or without its last chunk."""
    head = b"HTTP/1.1 200 OK\r\n" + headers + b"transfer-encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + body + (b"0\r\n\r\n" if ends else b"")


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def request(self) -> tuple[dict[str, str], bytes]:
        """Read one request; return its headers in lower case and its body."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        return headers, await self._reader.readexactly(int(headers.get("content-length", "0")))

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def gone(self) -> None:
        """Wait until the client has closed the connection."""
        while await self._reader.read(65536):
            pass

    def reset(self) -> None:
        """Close the connection with RST."""
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class RawUpstream:
    """Its address, and the connections and requests that it received."""

    def __init__(self) -> None:
        self.base_url = ""
        self.connections = 0
        self.requests: list[dict[str, str]] = []


@asynccontextmanager
async def serving(
    serve: Callable[[Peer], Awaitable[None]] | bytes, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawUpstream]:
    """Serve each connection with a coroutine, or with the same response per request until the client closes."""
    upstream = RawUpstream()
    tasks: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream.connections += 1
        try:
            peer = Peer(reader, writer)
            if not isinstance(serve, bytes):
                await serve(peer)
                return
            while True:
                headers, _ = await peer.request()
                upstream.requests.append(headers)
                await peer.say(serve)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connection(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    scheme = "https" if tls else "http"
    upstream.base_url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()
