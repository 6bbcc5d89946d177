"""The end of the process: every stream is closed at a time of its own, and its client reconnects elsewhere."""

from __future__ import annotations

import asyncio
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Drain"]

_SPREAD = 0.8
"""Share of the drain over which streams are closed: the last ones still have time to take their `closing`."""


class Drain:
    """Counts what is going on, and ends it. Everything is called in the loop's thread."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._busy = 0
        self._closers: dict[int, Callable[[], None]] = {}
        self._next = 0
        self._begun = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._began_at = 0.0
        self.is_over = False
        """Whether connections are closed now, whatever goes on in them: a client that is gone did not leave."""

    @property
    def is_draining(self) -> bool:
        """Whether the drain has begun."""
        return self._begun.is_set()

    @property
    def seconds(self) -> float:
        """Seconds since the drain began; 0 before."""
        return asyncio.get_running_loop().time() - self._began_at if self.is_draining else 0.0

    @property
    def busy(self) -> int:
        """Requests and streams that are going on."""
        return self._busy

    def begin(self) -> None:
        """Begin the drain: each stream is closed within the time for that. Repeated calls do nothing."""
        if self.is_draining:
            return
        loop = asyncio.get_running_loop()
        self._began_at = loop.time()
        self._begun.set()
        for close in self._closers.values():
            self._close_later(close)

    async def finish(self, _: object = None) -> None:
        """Note that the server closes all connections now."""
        self.is_over = True

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while the block runs."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Count a request until `leave` is called."""
        self._busy += 1
        self._idle.clear()

    def leave(self) -> None:
        """Undo one `enter`."""
        self._busy -= 1
        if not self._busy:
            self._idle.set()

    @contextmanager
    def stream(self, close: Callable[[], None]) -> Iterator[None]:
        """Have `close` called during the drain, unless the block was left before. It may be called after the block."""
        number = self.register(close)
        try:
            yield
        finally:
            self.unregister(number)

    def register(self, close: Callable[[], None]) -> int:
        """Have `close` called during the drain, unless `unregister` was called before with the number that is returned."""
        number = self._next
        self._next += 1
        self._closers[number] = close
        if self.is_draining:
            self._close_later(close)
        return number

    def unregister(self, number: int) -> None:
        """Undo `register`. `close` may be called nevertheless."""
        del self._closers[number]

    async def wait(self) -> None:
        """Wait until the drain has begun, and then until nothing goes on or its time is over."""
        await self._begun.wait()
        try:
            async with asyncio.timeout(self._drain_s):
                await self._idle.wait()
        except TimeoutError:
            pass

    def _close_later(self, close: Callable[[], None]) -> None:
        delay_s = random.uniform(0, self._drain_s * _SPREAD)  # noqa: S311 - not a secret
        asyncio.get_running_loop().call_later(delay_s, close)
