"""A proxy that cuts each connection behind the first event that it has carried."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Cutter"]

_EVENT = re.compile(rb"\nid: [^\n]*\ndata: [^\n]*\n\n")
_RETRY = re.compile(rb"retry: \d{4}")


class Cutter:
    """An async context manager. `port` is that of the gateway."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.requests: list[bytes] = []
        self.port = 0
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            async with closed(writer):
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                back, to = await asyncio.open_connection("127.0.0.1", self._target)
                async with closed(to):
                    to.write(head)
                    await _carry(back, writer)


async def _carry(back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forward an answer up to the end of its first event."""
    carried = b""
    while data := await back.read(1 << 16):
        event = _EVENT.search(carried + data)
        # The length stays the same, so that chunks keep theirs. A client would wait for seconds at each cut.
        part = data if event is None else data[: event.end() - len(carried)]
        writer.write(_RETRY.sub(b"retry: 0010", part))
        await writer.drain()
        if event is not None:
            return
        carried += data


@asynccontextmanager
async def closed(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a connection at the end."""
    try:
        yield
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
