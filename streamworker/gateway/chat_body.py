"""The body of a response that is written bit by bit, to a client that may not read it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["BodyWriter", "ClientStalled"]


_NEVER_BLOCKS_BYTES: Final = 32 << 10
"""Bytes that may wait for a client without a pause: asyncio and uvloop pause a writer above 64 KiB."""


class ClientStalled(ConnectionError):
    """The client took no byte for too long; its connection is closed."""


class BodyWriter:
    """Writes to a response that has been prepared. At most some 64 KiB wait for the client besides what is written."""

    def __init__(self, request: web.Request, response: web.StreamResponse, stall_s: float) -> None:
        self.response = response
        self._request = request
        self._stall_s = stall_s

    @property
    def is_behind(self) -> bool:
        """Whether bytes wait for the client, because its socket is full."""
        return self._waiting_bytes > 0

    @property
    def _waiting_bytes(self) -> int:
        transport = self._request.transport
        return 0 if transport is None else transport.get_write_buffer_size()

    async def write(self, data: bytes) -> None:
        """Write, and wait while too much is waiting for the client.

        Raises:
            ConnectionError: the client disconnected.
            ClientStalled: it took nothing for `stall_s` seconds.
        """
        if self._waiting_bytes + len(data) <= _NEVER_BLOCKS_BYTES:
            await self.response.write(data)
            return
        writing = asyncio.ensure_future(self.response.write(data))
        try:
            while not writing.done():
                before = self._waiting_bytes
                await asyncio.wait([writing], timeout=self._stall_s)
                if not writing.done() and self._waiting_bytes >= before:
                    self.cut()
                    raise ClientStalled
            writing.result()
        finally:
            writing.cancel()

    async def end(self) -> None:
        """End the body."""
        await self.response.write_eof()

    def cut(self) -> None:
        """Close the connection without the end of the body: the client sees that the answer is not whole."""
        if self._request.transport is not None:
            self._request.transport.abort()
