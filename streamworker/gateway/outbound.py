"""What is written to one client: directly to its transport, with a bound on what waits there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

__all__ = ["HIGH_WATER_BYTES", "Outbound"]

HIGH_WATER_BYTES = 65_536
"""Bytes that may wait in the transport before a stream waits for the client."""


class Outbound:
    """Writes to the transport of a request. `stalled` is called if the client takes nothing for `stall_s`."""

    def __init__(self, request: web.Request, stall_s: float, stalled: Callable[[], None]) -> None:
        """Raises ConnectionResetError: the client is gone."""
        if request.transport is None:
            raise ConnectionResetError("the client is gone")
        self._transport = request.transport
        self._writer = request.writer
        self._stall_s = stall_s
        self._stalled = stalled
        self._loop = asyncio.get_running_loop()
        self._waiters = 0
        self._left = 0
        self._watch: asyncio.TimerHandle | None = None
        self.has_written = False
        """Whether anything was written since the flag was cleared."""

    def write(self, data: bytes) -> None:
        """Write without waiting."""
        self.has_written = True
        self._transport.write(data)

    def abort(self) -> None:
        """Cut the connection; what waits is lost."""
        self._transport.abort()

    @property
    def is_full(self) -> bool:
        """Whether a stream should wait before it writes more."""
        return self._transport.get_write_buffer_size() > HIGH_WATER_BYTES

    @property
    def is_waiting(self) -> bool:
        """Whether a stream waits for the client."""
        return self._waiters > 0

    async def drained(self) -> None:
        """Wait until the client has taken what waits. Several tasks may wait. Raises ConnectionResetError."""
        if not self._waiters:
            self._left = self._transport.get_write_buffer_size()
            self._watch = self._loop.call_later(self._stall_s, self._look)
        self._waiters += 1
        try:
            await self._writer.drain()
        finally:
            self._waiters -= 1
            if not self._waiters and self._watch is not None:
                self._watch.cancel()
                self._watch = None

    def _look(self) -> None:
        left = self._transport.get_write_buffer_size()
        if left >= self._left:
            self._stalled()
            return
        self._left = left
        self._watch = self._loop.call_later(self._stall_s, self._look)
