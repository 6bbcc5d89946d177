"""What interrupts a block, and when: to the millisecond of a turned clock."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.testing import MemoryClock
from streamworker.worker.timeouts import Interrupt, StreamTimeouts
from tests.streams import NOW
from tests.turnable import quiet


def now() -> float:
    return asyncio.get_running_loop().time()


def make_timeouts(*, deadline_in_s: float | None = None) -> StreamTimeouts:
    """Return the interrupts of a delivery whose job has a deadline in this number of seconds."""
    deadline = None if deadline_in_s is None else NOW / 1000 + deadline_in_s
    return StreamTimeouts(MemoryClock(NOW), deadline)


async def waited(timeouts: StreamTimeouts, first_delta_s: float, idle_s: float) -> float:
    """Block until an interrupt; return after how many seconds it came."""
    began = now()
    async with timeouts.watch(first_delta_s=first_delta_s, idle_s=idle_s):
        await asyncio.Event().wait()
    return round(now() - began, 3)


async def test_timeouts_without_delta_ends_at_the_first_delta_timeout() -> None:
    """Silence from the start has its own timeout and its own name."""
    timeouts = make_timeouts()

    assert await waited(timeouts, first_delta_s=60, idle_s=30) == 60
    assert timeouts.interrupted_by is Interrupt.FIRST_DELTA


@pytest.mark.parametrize("first_delta_s", [5, 60])
async def test_timeouts_after_a_delta_ends_at_the_idle_timeout(first_delta_s: float) -> None:
    """The idle timeout runs from the last delta, also where the first-delta timeout is longer."""
    timeouts = make_timeouts()
    async with timeouts.watch(first_delta_s=first_delta_s, idle_s=30):
        await asyncio.sleep(1)
        timeouts.delta_came()
        began = now()
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 30
    assert timeouts.interrupted_by is Interrupt.IDLE


async def test_timeouts_with_a_delta_in_time_again_and_again_is_not_interrupted() -> None:
    """Every delta restarts the idle timeout."""
    timeouts = make_timeouts()
    async with timeouts.watch(first_delta_s=2, idle_s=1):
        for _ in range(100):
            await asyncio.sleep(0.99)
            timeouts.delta_came()

    assert timeouts.interrupted_by is None


async def test_timeouts_many_deltas_arm_few_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta arms no timer: it would cost more than the rest of the work per delta."""
    armed = 0
    loop = asyncio.get_running_loop()
    call_at = loop.call_at

    def count(*arguments: object, **options: object) -> asyncio.TimerHandle:
        nonlocal armed
        armed += 1
        return call_at(*arguments, **options)  # type: ignore[arg-type]

    async with make_timeouts().watch(first_delta_s=60, idle_s=30) as timeouts:
        monkeypatch.setattr(loop, "call_at", count)
        for _ in range(1000):
            timeouts.delta_came()

    assert armed <= 1


async def test_timeouts_at_the_deadline_ends() -> None:
    """Deltas do not extend the deadline."""
    timeouts = make_timeouts(deadline_in_s=5)
    began = now()
    async with timeouts.watch(first_delta_s=60, idle_s=30):
        while True:
            await asyncio.sleep(0.9)
            timeouts.delta_came()

    assert round(now() - began, 3) == 5
    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_timeouts_with_a_deadline_in_the_past_ends_at_once() -> None:
    """A deadline in the past interrupts the block on the next turn of the loop."""
    timeouts = make_timeouts(deadline_in_s=-5)

    assert await waited(timeouts, first_delta_s=60, idle_s=30) == 0
    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_timeouts_while_paused_does_not_end() -> None:
    """Time in which the worker does not read does not count; `resume` continues with the seconds that were left."""
    timeouts = make_timeouts()
    async with timeouts.watch(first_delta_s=10, idle_s=10):
        await asyncio.sleep(4)
        left = timeouts.pause()
        await asyncio.sleep(1000)
        timeouts.resume(left)
        began = now()
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 6
    assert timeouts.interrupted_by is Interrupt.FIRST_DELTA


async def test_timeouts_while_paused_still_ends_at_the_deadline() -> None:
    """The deadline runs on while the stream's timeouts are paused."""
    timeouts = make_timeouts(deadline_in_s=50)
    began = now()
    async with timeouts.watch(first_delta_s=1, idle_s=1):
        timeouts.pause()
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 50
    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_timeouts_interrupted_twice_keeps_the_first_reason() -> None:
    """The first interrupt names the reason, and the task is cancelled once."""
    timeouts = make_timeouts()
    loop = asyncio.get_running_loop()
    loop.call_later(1, timeouts.interrupt, Interrupt.CANCEL)
    loop.call_later(1, timeouts.interrupt, Interrupt.DEADLINE)

    assert await waited(timeouts, first_delta_s=60, idle_s=30) == 1
    assert timeouts.interrupted_by is Interrupt.CANCEL


async def test_timeouts_interrupted_outside_of_the_block_does_nothing() -> None:
    """A block that was left is not interrupted, also not by a late timer."""
    timeouts = make_timeouts()
    async with timeouts.watch(first_delta_s=60, idle_s=30):
        pass
    timeouts.interrupt(Interrupt.CANCEL)
    timeouts.resume(1)
    timeouts.delta_came()
    await asyncio.sleep(1000)

    assert timeouts.interrupted_by is None


async def test_timeouts_task_cancelled_from_elsewhere_passes_it_on() -> None:
    """Only the cancellation of an interrupt is swallowed."""
    timeouts = make_timeouts()
    task = asyncio.create_task(waited(timeouts, first_delta_s=60, idle_s=30))
    await quiet()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert timeouts.interrupted_by is None


async def test_timeouts_cancelled_and_interrupted_at_once_passes_the_cancellation_on() -> None:
    """An interrupt does not swallow another cancellation of the same task."""
    timeouts = make_timeouts()
    task = asyncio.create_task(waited(timeouts, first_delta_s=60, idle_s=30))
    await quiet()
    timeouts.interrupt(Interrupt.CANCEL)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_timeouts_after_an_interruption_leaves_the_task_uncancelled() -> None:
    """Code after the block may wait: no cancellation is pending."""

    async def work() -> int:
        await waited(make_timeouts(), first_delta_s=1, idle_s=1)
        async with asyncio.timeout(10):
            await asyncio.sleep(5)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert await asyncio.create_task(work()) == 0


async def test_timeouts_left_by_an_error_at_the_moment_of_the_interruption_raises_it() -> None:
    """An exception of the block is not hidden by an interrupt."""
    timeouts = make_timeouts()

    async def work() -> None:
        async with timeouts.watch(first_delta_s=60, idle_s=30):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("closing failed") from None

    task = asyncio.create_task(work())
    await quiet()
    timeouts.interrupt(Interrupt.CANCEL)

    with pytest.raises(ValueError, match="closing failed"):
        await task


async def test_timeouts_cancelled_before_a_block_are_pending() -> None:
    """A cancel record between two blocks is found before the next one."""
    timeouts = make_timeouts()
    assert timeouts.pending is None
    timeouts.cancel("enough")

    assert timeouts.pending is Interrupt.CANCEL
    assert timeouts.cancel_reason == "enough"


async def test_timeouts_after_the_deadline_are_pending() -> None:
    """A deadline that passes between two blocks is found before the next one."""
    assert make_timeouts(deadline_in_s=1).pending is None
    assert make_timeouts(deadline_in_s=-1).pending is Interrupt.DEADLINE


async def test_timeouts_cancelled_with_grace_end_when_it_is_over() -> None:
    """`on_cancel` returns how long the block may go on; a repeated cancel record does not restart that time."""
    timeouts = make_timeouts()
    loop = asyncio.get_running_loop()
    loop.call_later(1, timeouts.cancel, "first")
    loop.call_later(3, timeouts.cancel, "second")
    began = now()
    async with timeouts.watch(on_cancel=lambda: 5.0):
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 6
    assert (timeouts.interrupted_by, timeouts.cancel_reason) == (Interrupt.CANCEL, "first")


async def test_timeouts_cancelled_with_more_grace_than_is_left_end_at_the_deadline() -> None:
    """Grace does not extend the deadline."""
    timeouts = make_timeouts(deadline_in_s=3)
    asyncio.get_running_loop().call_later(1, timeouts.cancel, "enough")
    async with timeouts.watch(on_cancel=lambda: 5.0):
        await asyncio.Event().wait()

    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_timeouts_of_one_block_do_not_reach_the_next() -> None:
    """Each block has its own timeouts and its own interrupt; gaps between deltas are measured within one block."""
    timeouts = make_timeouts()
    assert await waited(timeouts, first_delta_s=1, idle_s=1) == 1
    async with timeouts.watch(idle_s=5):
        assert timeouts.delta_came() is None
        await asyncio.sleep(4)
        assert timeouts.delta_came() == 4
    async with timeouts.watch():
        await asyncio.sleep(1000)
        assert timeouts.delta_came() is None

    assert timeouts.interrupted_by is None
