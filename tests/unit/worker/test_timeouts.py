"""What ends a wait, and when: to the millisecond of a turned clock."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.worker.timeouts import Interrupt, StreamTimeouts
from tests.turnable import quiet


def now() -> float:
    return asyncio.get_running_loop().time()


async def waited(timeouts: StreamTimeouts) -> float:
    """Wait in the block for ever; return after how many seconds it was left."""
    began = now()
    async with timeouts:
        await asyncio.Event().wait()
    return round(now() - began, 3)


async def test_patience_without_delta_ends_at_the_first_delta_timeout() -> None:
    """Silence from the start is told apart from silence later."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30)

    assert await waited(timeouts) == 60
    assert timeouts.interrupted_by is Interrupt.FIRST_DELTA


@pytest.mark.parametrize("first_delta_s", [5, 60])
async def test_patience_after_a_delta_ends_at_the_idle_timeout(first_delta_s: float) -> None:
    """The idle timeout runs from the delta, also where the first-delta timeout would come later."""
    timeouts = StreamTimeouts(first_delta_s=first_delta_s, idle_s=30)
    async with timeouts:
        await asyncio.sleep(1)
        timeouts.delta_came()
        began = now()
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 30
    assert timeouts.interrupted_by is Interrupt.IDLE


async def test_patience_with_a_delta_in_time_again_and_again_never_ends() -> None:
    """Every delta begins the idle timeout anew."""
    timeouts = StreamTimeouts(first_delta_s=2, idle_s=1)
    async with timeouts:
        for _ in range(100):
            await asyncio.sleep(0.99)
            timeouts.delta_came()

    assert timeouts.interrupted_by is None


async def test_patience_many_deltas_arm_few_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delta costs no timer: there are streams with many."""
    armed = 0
    loop = asyncio.get_running_loop()
    call_at = loop.call_at

    def count(*arguments: object, **options: object) -> asyncio.TimerHandle:
        nonlocal armed
        armed += 1
        return call_at(*arguments, **options)  # type: ignore[arg-type]

    async with StreamTimeouts(first_delta_s=60, idle_s=30) as timeouts:
        monkeypatch.setattr(loop, "call_at", count)
        for _ in range(1000):
            timeouts.delta_came()

    assert armed <= 1


async def test_patience_at_the_deadline_ends() -> None:
    """The deadline holds however lively the stream is."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30, deadline=now() + 5)
    began = now()
    async with timeouts:
        while True:
            await asyncio.sleep(0.9)
            timeouts.delta_came()

    assert round(now() - began, 3) == 5
    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_patience_with_the_deadline_behind_it_ends_at_once() -> None:
    """A deadline that has passed is no reason to hang."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30, deadline=now() - 5)

    assert await waited(timeouts) == 0
    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_patience_while_paused_does_not_end() -> None:
    """What we ourselves hold up is not the upstream's silence; afterwards the rest of the time counts."""
    timeouts = StreamTimeouts(first_delta_s=10, idle_s=10)
    async with timeouts:
        await asyncio.sleep(4)
        left = timeouts.pause()
        await asyncio.sleep(1000)
        timeouts.resume(left)
        began = now()
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 6
    assert timeouts.interrupted_by is Interrupt.FIRST_DELTA


async def test_patience_while_paused_still_ends_at_the_deadline() -> None:
    """The deadline is the job's, whoever is slow."""
    timeouts = StreamTimeouts(first_delta_s=1, idle_s=1, deadline=now() + 50)
    began = now()
    async with timeouts:
        timeouts.pause()
        await asyncio.Event().wait()

    assert round(now() - began, 3) == 50
    assert timeouts.interrupted_by is Interrupt.DEADLINE


async def test_patience_interrupted_twice_keeps_the_first_reason() -> None:
    """One end has one reason, and the task is cancelled once."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30)
    loop = asyncio.get_running_loop()
    loop.call_later(1, timeouts.interrupt, Interrupt.CANCEL)
    loop.call_later(1, timeouts.interrupt, Interrupt.DEADLINE)

    assert await waited(timeouts) == 1
    assert timeouts.interrupted_by is Interrupt.CANCEL


async def test_patience_interrupted_outside_of_the_block_does_nothing() -> None:
    """Who has left is not interrupted any more, nor by a timer that was left behind."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30)
    async with timeouts:
        pass
    timeouts.interrupt(Interrupt.CANCEL)
    timeouts.resume(1)
    timeouts.delta_came()
    await asyncio.sleep(1000)

    assert timeouts.interrupted_by is None


async def test_patience_task_cancelled_from_elsewhere_passes_it_on() -> None:
    """A worker that stops is not an interruption."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30)
    task = asyncio.create_task(waited(timeouts))
    await quiet()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert timeouts.interrupted_by is None


async def test_patience_cancelled_and_interrupted_at_once_passes_the_cancellation_on() -> None:
    """An interruption never swallows a cancellation that is not its own."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30)
    task = asyncio.create_task(waited(timeouts))
    await quiet()
    timeouts.interrupt(Interrupt.CANCEL)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


async def test_patience_after_an_interruption_leaves_the_task_uncancelled() -> None:
    """What comes after the block may wait: nothing of the interruption is left behind."""

    async def work() -> int:
        await waited(StreamTimeouts(first_delta_s=1, idle_s=1))
        async with asyncio.timeout(10):
            await asyncio.sleep(5)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert await asyncio.create_task(work()) == 0


async def test_patience_left_by_an_error_at_the_moment_of_the_interruption_raises_it() -> None:
    """An error of the block is not hidden by an interruption."""
    timeouts = StreamTimeouts(first_delta_s=60, idle_s=30)

    async def work() -> None:
        async with timeouts:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("closing failed") from None

    task = asyncio.create_task(work())
    await quiet()
    timeouts.interrupt(Interrupt.CANCEL)

    with pytest.raises(ValueError, match="closing failed"):
        await task
