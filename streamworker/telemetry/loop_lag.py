"""Event-loop lag: how late the loop comes to what is due. A late loop misses heartbeats and delays every stream."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["LoopLag"]


class LoopLag:
    """Measures by a timer that sets itself again: no task, nothing to await.

    Every `interval_s` one lateness is noted; `lag_s` is the largest of the last `window_s`, so that a scrape sees a
    stall that happened between two of them.
    """

    def __init__(self, *, interval_s: float = 0.25, window_s: float = 15.0) -> None:
        self._interval_s = interval_s
        self._seen: deque[float] = deque(maxlen=max(1, round(window_s / interval_s)))
        self._due = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def lag_s(self) -> float:
        """Seconds; the wait that is not over yet counts as well."""
        overdue = 0.0 if self._loop is None else self._loop.time() - self._due
        return max(0.0, overdue, *self._seen)

    def start(self) -> None:
        """Begin, on the running loop."""
        self.stop()
        self._loop = asyncio.get_running_loop()
        self._wait(self._loop)

    def stop(self) -> None:
        """End. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + self._interval_s
        self._timer = loop.call_at(self._due, self._note, loop)

    def _note(self, loop: asyncio.AbstractEventLoop) -> None:
        self._seen.append(max(0.0, loop.time() - self._due))
        self._wait(loop)
