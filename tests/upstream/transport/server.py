"""A server for raw bytes, and clients over the transport under test."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import httpx

from streamworker.upstream.transport import HttpTransport

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["Peer", "Push", "Server", "connect", "serving", "until"]


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.tls: ssl.SSLObject | None = writer.get_extra_info("ssl_object")

    async def request(self) -> tuple[bytes, dict[str, str], bytes]:
        """Read one request: its first line, headers in lower case, and the body, which has a length or none."""
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        headers = dict(line.decode("latin-1").split(": ", 1) for line in lines)
        headers = {name.lower(): value for name, value in headers.items()}
        return first, headers, await self.reader.readexactly(int(headers.get("content-length", "0")))

    async def send(self, data: bytes) -> None:
        """Send bytes. Raises OSError where the client has closed the connection."""
        if self.writer.transport.is_closing():  # uvloop would raise RuntimeError
            raise ConnectionResetError
        self.writer.write(data)
        await self.writer.drain()

    async def send_single_bytes(self, data: bytes) -> None:
        """Send each byte by itself; the client reads few at once."""
        for at in range(len(data)):
            await self.send(data[at : at + 1])
            await asyncio.sleep(0)

    async def closed(self) -> None:
        """Wait until the client has closed the connection."""
        with suppress(OSError):
            while await self.reader.read(1 << 16):
                pass

    def reset(self) -> None:
        """Close with RST."""
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Server:
    """The address of the server, and its connections."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.port = 0
        self.connections = 0
        self.peers: set[Peer] = set()

    @property
    def url(self) -> str:
        """The address."""
        return f"{self.scheme}://127.0.0.1:{self.port}/"


@asynccontextmanager
async def serving(
    serve: Callable[[Peer], Awaitable[None]] | bytes, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """Serve each connection by a coroutine, or answer each request with the same bytes."""
    server = Server("https" if tls else "http")
    tasks: set[asyncio.Task[None]] = set()

    async def answer(peer: Peer) -> None:
        assert isinstance(serve, bytes)
        while True:
            await peer.request()
            await peer.send(serve)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        peer = Peer(reader, writer)
        server.peers.add(peer)
        try:
            await (answer(peer) if isinstance(serve, bytes) else serve(peer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            server.peers.discard(peer)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connection(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls, backlog=2048)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await listener.wait_closed()


@asynccontextmanager
async def connect(
    transport: HttpTransport | None = None, *, limits: httpx.Timeout | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, HttpTransport]]:
    """Make a client over a transport; nothing of it is open afterwards."""
    transport = transport or HttpTransport()
    async with httpx.AsyncClient(transport=transport, timeout=limits or 5.0, trust_env=False) as client:
        yield client, transport
    await until(lambda: transport.open_connections == 0)


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for knows no events
            await asyncio.sleep(0.001)


class Push:
    """A subscriber that keeps what it gets."""

    def __init__(self, response: httpx.Response) -> None:
        self.feed = response.extensions["body_feed"]
        self.pieces: list[bytes] = []
        self.ends: list[httpx.TransportError | None] = []
        self.ended = asyncio.Event()

    def subscribe(self) -> Push:
        """Begin."""
        self.feed.subscribe(self.pieces.append, self.end)
        return self

    def end(self, error: httpx.TransportError | None) -> None:
        """Keep the end."""
        self.ends.append(error)
        self.ended.set()

    @property
    def body(self) -> bytes:
        """What has arrived."""
        return b"".join(self.pieces)
