"""How long a job waits for its upstream, and what may interrupt it.

Only deltas count as life: comments and pings keep a connection open, not a generation alive. The time in which we do
not read, because the broker is slow, is not the upstream's fault and does not count.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Interrupt", "StreamTimeouts"]


class Interrupt(Enum):
    """Why a wait was ended from outside."""

    FIRST_DELTA = "no delta within the first-delta timeout"
    IDLE = "no delta within the idle timeout"
    DEADLINE = "the job's deadline"
    CANCEL = "a control record"


class StreamTimeouts:
    """A block of code that can be interrupted by time, by `interrupt`, and by nothing else.

    Leaving the block because of an interruption raises nothing: `interruption` tells. A cancellation of the task that
    comes from elsewhere passes through. One timer, armed again only when it fires: a delta costs no timer.
    """

    def __init__(self, *, first_delta_s: float, idle_s: float, deadline: float = inf) -> None:
        """Timeouts in seconds; `deadline` on the loop's clock."""
        self.interrupted_by: Interrupt | None = None
        self._idle_s = idle_s
        self._first_delta_s = first_delta_s
        self._deadline = deadline
        self._deadline_means = Interrupt.DEADLINE
        self._due = inf
        self._due_means = Interrupt.FIRST_DELTA
        self._last_delta: float | None = None
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._cancelling = 0

    async def __aenter__(self) -> Self:
        """Begin to wait for the first delta."""
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._due = self._loop.time() + self._first_delta_s
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Swallow the cancellation that an interruption made, and only that."""
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self.interrupted_by is None or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    def delta_came(self) -> float | None:
        """Wait for the next one; return the seconds since the one before, None for the first."""
        now, before = self._loop.time(), self._last_delta
        self._last_delta = now
        self._due_means = Interrupt.IDLE
        self._due = now + self._idle_s
        if (
            self._timer is None or self._due < self._timer.when()
        ):  # it waits for the first delta, longer than idle
            self._arm()
        return None if before is None else now - before

    def pause(self) -> float:
        """Stop the clock, for we ourselves are in the way; return what `resume` wants back: the time left."""
        left = self._due - self._loop.time()
        self._due = inf
        return left

    def resume(self, left: float) -> None:
        """Let the clock run on."""
        self._due = self._loop.time() + left
        self._arm()

    def hurry(self, seconds: float, reason: Interrupt) -> None:
        """Interrupt for this reason after so many seconds, paused or not, unless the block ends before."""
        ends = self._loop.time() + seconds
        if ends < self._deadline:
            self._deadline, self._deadline_means = ends, reason
            self._arm()

    def interrupt(self, reason: Interrupt) -> None:
        """End the block now. The first interruption counts; outside of the block nothing happens."""
        if self._task is not None and self.interrupted_by is None:
            self.interrupted_by = reason
            self._task.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        when = min(self._due, self._deadline) if self._task is not None else inf
        self._timer = None if when == inf else self._loop.call_at(when, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._deadline:
            self.interrupt(self._deadline_means)
        elif now >= self._due:
            self.interrupt(self._due_means)
        else:  # a delta came since the timer was set
            self._arm()
