"""What may interrupt a delivery: the timeouts of its stream, the job's deadline, a cancel record.

Only deltas restart the idle timeout: comments and pings show that the connection is open, not that the upstream still
generates. Time in which the worker itself does not read, because the broker is slow, does not count.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from streamworker.ports import Clock

__all__ = ["Interrupt", "StreamTimeouts"]


class Interrupt(Enum):
    """Why a block was interrupted."""

    FIRST_DELTA = "no delta within the first-delta timeout"
    IDLE = "no delta within the idle timeout"
    DEADLINE = "the job's deadline"
    CANCEL = "a cancel record"


class StreamTimeouts:
    """The interrupts of one delivery. `async with timeouts.watch(...)` runs a block that they can end.

    An interrupt cancels the block, and leaving the block swallows that cancellation: `interrupted_by` names the
    interrupt. A cancellation of the task from elsewhere passes through. Blocks do not nest. A delta arms no timer: the
    one timer is armed again only when it fires.
    """

    __slots__ = (
        "_cancelling",
        "_clock",
        "_due",
        "_due_means",
        "_end_means",
        "_ends",
        "_idle_s",
        "_is_idle_due",
        "_job_deadline",
        "_last_delta",
        "_loop",
        "_on_cancel",
        "_task",
        "_time",
        "_timer",
        "cancel_reason",
        "interrupted_by",
    )

    def __init__(self, clock: Clock, deadline: float | None = None) -> None:
        """`deadline` is the job's, in seconds since the epoch."""
        self.interrupted_by: Interrupt | None = None
        self.cancel_reason: str | None = None
        """Why the job was cancelled; None if it was not."""
        self._clock = clock
        self._job_deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._on_cancel: Callable[[], float] = _cut_at_once
        self._idle_s = self._due = self._ends = inf
        self._due_means = Interrupt.FIRST_DELTA
        self._end_means = Interrupt.DEADLINE
        self._last_delta: float | None = None
        self._is_idle_due = (
            False  # `_due` is the idle timeout after the last delta, and computed when it is needed
        )
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._cancelling = 0

    @property
    def left_s(self) -> float:
        """Seconds until the job's deadline; infinite without one."""
        return inf if self._job_deadline is None else self._job_deadline - self._clock.now_ms() / 1000

    @property
    def pending(self) -> Interrupt | None:
        """The interrupt that ends the delivery before its next block: a cancel record, or a deadline in the past."""
        if self.cancel_reason is not None:
            return Interrupt.CANCEL
        return Interrupt.DEADLINE if self.left_s <= 0 else None

    def watch(
        self,
        *,
        first_delta_s: float = inf,
        idle_s: float = inf,
        on_cancel: Callable[[], float] | None = None,
    ) -> Self:
        """Set the timeouts of the next block; return the context manager.

        `on_cancel` is called when a cancel record arrives inside the block; it returns how many seconds the block may
        go on.
        """
        now = self._loop.time()
        self.interrupted_by = None
        self._on_cancel = on_cancel or _cut_at_once
        self._idle_s = idle_s
        self._set_due(now + first_delta_s)
        self._due_means = Interrupt.FIRST_DELTA
        self._ends, self._end_means = now + self.left_s, Interrupt.DEADLINE
        self._last_delta = None
        return self

    async def __aenter__(self) -> Self:
        """Enter the block: the first-delta timeout and the deadline run."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("StreamTimeouts is used inside a task")
        self._task = task
        self._cancelling = task.cancelling()
        self._arm()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Leave the block; swallow the cancellation of an interrupt, and no other."""
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self.interrupted_by is None or task is None:
            return False
        return task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    def cancel(self, reason: str) -> None:
        """Cancel the job, now or at its next block. Control records may repeat: the first one counts."""
        if self.cancel_reason is not None:
            return
        self.cancel_reason = reason
        if self._task is None:
            return
        grace_s = self._on_cancel()
        if not grace_s:
            self.interrupt(Interrupt.CANCEL)
        elif (ends := self._loop.time() + grace_s) < self._ends:
            self._ends, self._end_means = ends, Interrupt.CANCEL
            self._arm()

    def delta_came(self) -> float | None:
        """Restart the idle timeout; return the seconds since the delta before, None for the first delta."""
        now, before = self._time(), self._last_delta
        self._last_delta = now
        if not self._is_idle_due:
            self._is_idle_due, self._due_means = True, Interrupt.IDLE
            if self._timer is None or now + self._idle_s < self._timer.when():
                # The timer is still set to the first-delta timeout, which is longer than the idle timeout.
                self._arm()
        return None if before is None else now - before

    def pause(self) -> float:
        """Stop the stream's timeouts while the worker does not read; return the seconds that were left."""
        left = self._next_due() - self._loop.time()
        self._set_due(inf)
        return left

    def resume(self, left: float) -> None:
        """Restart the stream's timeouts with `left` seconds, as `pause` returned them."""
        self._set_due(self._loop.time() + left)
        self._arm()

    def interrupt(self, reason: Interrupt) -> None:
        """Cancel the block. The first interrupt counts; outside of a block nothing happens."""
        if self._task is not None and self.interrupted_by is None:
            self.interrupted_by = reason
            self._task.cancel()

    def _set_due(self, when: float) -> None:
        self._due, self._is_idle_due = when, False

    def _next_due(self) -> float:
        """Return when the stream's timeout is over, on the loop's clock."""
        if self._is_idle_due and self._last_delta is not None:
            return self._last_delta + self._idle_s
        return self._due

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        when = min(self._next_due(), self._ends) if self._task is not None else inf
        self._timer = None if when == inf else self._loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        now = self._loop.time()
        if now >= self._ends:
            self.interrupt(self._end_means)
        elif now >= self._next_due():
            self.interrupt(self._due_means)
        else:  # a delta arrived after the timer was armed
            self._arm()


def _cut_at_once() -> float:
    return 0.0
