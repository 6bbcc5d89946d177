"""The tasks of a worker: which failure ends it, and what `stop` cancels."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import pytest

from streamworker.worker.supervisor import Supervisor


class Broken(Exception):
    pass


async def fail() -> NoReturn:
    raise Broken


async def wait(for_: asyncio.Event | None = None) -> None:
    await (for_ or asyncio.Event()).wait()


async def test_run_until_failed_cancels_its_work_when_a_task_fails() -> None:
    """The work has ended when the task's exception is raised."""
    supervisor, go = Supervisor(), asyncio.Event()
    cancelled = []

    async def fail_later() -> None:
        await go.wait()
        raise Broken

    async def work() -> None:
        go.set()
        try:
            await wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    supervisor.spawn(fail_later(), name="late")
    with pytest.raises(Broken):
        await supervisor.run_until_failed(work())
    assert cancelled == [True]
    await supervisor.stop()


async def test_run_until_failed_behind_a_failure_raises_at_once() -> None:
    """A task may fail before the worker runs."""
    supervisor = Supervisor()
    await asyncio.wait([supervisor.spawn(fail(), name="early")])
    with pytest.raises(Broken):
        await supervisor.run_until_failed(wait())
    await supervisor.stop()


async def test_run_until_failed_ends_with_its_work() -> None:
    """And raises what the work raises."""
    supervisor = Supervisor()
    supervisor.spawn(wait(), name="idle")
    await supervisor.run_until_failed(asyncio.sleep(0))
    with pytest.raises(Broken):
        await supervisor.run_until_failed(fail())
    assert not supervisor.failure.done()
    await supervisor.stop()


async def test_run_until_failed_cancels_work_that_takes_too_long() -> None:
    """The timeout is not an error: the caller sees what was not finished."""
    supervisor, began = Supervisor(), asyncio.Event()
    ended = []

    async def work() -> None:
        began.set()
        try:
            await wait()
        finally:
            ended.append(True)

    await supervisor.run_until_failed(work(), timeout_s=0.01)
    assert began.is_set()
    assert ended == [True]
    await supervisor.stop()


async def test_stop_cancels_the_tasks_and_waits_for_those_that_must_end_by_themselves() -> None:
    """A task that is stopped is not a failure."""
    supervisor, may_end = Supervisor(), asyncio.Event()
    cancelled = supervisor.spawn(wait(), name="cancelled")
    kept = supervisor.spawn(wait(may_end), name="kept", is_cancelled=False)
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.wait([cancelled])
    assert (cancelled.cancelled(), kept.done(), stopping.done()) == (True, False, False)
    may_end.set()
    await stopping

    assert (kept.cancelled(), kept.done(), supervisor.failure.done()) == (False, True, False)
    assert cancelled.get_name() == "cancelled"
    await supervisor.stop()  # nothing is left


async def test_first_failure_is_kept() -> None:
    """Of a task or of a watched future; a future that is cancelled or ends well is none."""
    supervisor = Supervisor()
    loop = asyncio.get_running_loop()
    good, dropped, bad = (loop.create_future() for _ in range(3))
    for future in (good, dropped, bad):
        supervisor.watch(future)
    good.set_result(None)
    dropped.cancel()
    await asyncio.sleep(0)
    assert not supervisor.failure.done()
    bad.set_exception(Broken("first"))
    await asyncio.sleep(0)
    supervisor.spawn(fail(), name="second")
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    with pytest.raises(Broken, match="first"):
        await supervisor.run_until_failed(wait())
    await supervisor.stop()


async def test_stop_retrieves_a_failure_that_was_never_raised() -> None:
    """Otherwise the loop would log it when the future is collected; and it holds no task that has ended."""
    supervisor = Supervisor()
    task = supervisor.spawn(fail(), name="broken")
    await asyncio.wait([task])
    await asyncio.sleep(0)
    await supervisor.stop()

    assert (supervisor._tasks, supervisor._uncancelled) == (set(), set())
    assert isinstance(supervisor.failure.exception(), Broken)
