"""What is written to one client: directly to its transport, with a bound on what waits there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.gateway.stream_connection import StreamConnection

__all__ = ["Outbound", "Starved"]


class Starved(Exception):
    """The client takes what other streams of its connection write, and this one had no turn for too long."""


class Outbound:
    """Writes to a connection.

    `hold` is called when it becomes full: nothing may be pushed to it then. `stalled` is called if the client takes nothing
    of what waits for `stall_s`.
    """

    __slots__ = (
        "_connection",
        "_hold",
        "_loop",
        "_stall_s",
        "_stalled",
        "_taken_before",
        "_turns",
        "_watch",
        "_written",
        "transport",
    )

    def __init__(
        self,
        connection: StreamConnection,
        stall_s: float,
        *,
        hold: Callable[[], None],
        stalled: Callable[[], None],
    ) -> None:
        self._connection = connection
        self.transport = connection.transport
        self._hold = hold
        self._stall_s = stall_s
        self._stalled = stalled
        self._loop = asyncio.get_running_loop()
        self._turns: asyncio.Lock | None = None  # its waiters come in the order of their arrival
        self._written = 0
        self._taken_before = 0
        self._watch: asyncio.TimerHandle | None = None
        connection.on_pause(self._paused)
        if connection.is_paused:
            self._paused()

    def stop(self) -> None:
        """Watch the client no longer."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def write(self, data: bytes) -> None:
        """Write without waiting.

        The only stream of a connection may write to `transport` instead, except while `is_full` is true.
        """
        self._written += len(data)
        self.transport.write(data)

    def abort(self) -> None:
        """Cut the connection; what waits is lost."""
        self.transport.abort()

    @property
    def is_full(self) -> bool:
        """Whether a stream should wait before it writes more."""
        return self._connection.is_paused

    async def drained(self) -> None:
        """Wait until the client has taken what waits. Several tasks may wait. Raises ConnectionResetError."""
        await self._connection.drain()

    async def turn(self) -> None:
        """Wait until a stream of several may write: one after another, in the order in which they came.

        The caller writes before it waits again. Raises Starved: other streams had their turns for `stall_s`, and the
        client took something; ConnectionResetError.
        """
        turns = self._turns = self._turns or asyncio.Lock()
        while True:
            taken = self._taken
            try:
                async with asyncio.timeout(self._stall_s):
                    await turns.acquire()
            except TimeoutError:
                if self._taken > taken:
                    raise Starved from None
                continue  # it takes nothing at all: `stalled` ends the connection
            try:
                while self.is_full:
                    await self.drained()
            finally:
                turns.release()
            return

    @property
    def _taken(self) -> int:
        """The number of bytes that the client has taken."""
        return self._written - self.transport.get_write_buffer_size()

    def _paused(self) -> None:
        """Watch the client from now on, whether a stream waits for it or has nothing to write."""
        self._hold()
        self.stop()
        self._arm()

    def _arm(self) -> None:
        self._taken_before = self._taken
        self._watch = self._loop.call_later(self._stall_s, self._look)

    def _look(self) -> None:
        self._watch = None
        if not self.is_full:
            return
        if self._taken > self._taken_before:
            self._arm()
        else:
            self._stalled()
