"""Event-loop lag: the delay of timers. A loop that lags misses heartbeats and delays every stream."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["LoopLag"]


class LoopLag:
    """Measure the lag with a timer that reschedules itself; no task is needed.

    One delay is recorded every `interval_s` seconds. `lag_s` is the maximum of the last `window_s` seconds, so that a
    scrape sees a stall that happened between two scrapes.
    """

    def __init__(self, *, interval_s: float = 0.25, window_s: float = 15.0) -> None:
        self._interval_s = interval_s
        self._seen: deque[float] = deque(maxlen=max(1, round(window_s / interval_s)))
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def lag_s(self) -> float:
        """Maximum delay in seconds, including a delay that is not over yet."""
        overdue = 0.0 if self._loop is None else self._loop.time() - self._due
        return max(0.0, overdue, *self._seen)

    def start(self) -> None:
        """Start measuring the running loop."""
        self.stop()
        self._loop = asyncio.get_running_loop()
        self._wait(self._loop)

    def stop(self) -> None:
        """Stop measuring. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + self._interval_s
        self._timer = loop.call_at(self._due, self._note, loop)

    def _note(self, loop: asyncio.AbstractEventLoop) -> None:
        self._seen.append(max(0.0, loop.time() - self._due))
        self._wait(loop)
