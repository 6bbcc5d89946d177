"""Runs the tasks that live as long as the worker; the first one that fails ends the worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["Supervisor"]


class Supervisor:
    """Owns tasks. `failure` has the first exception of a task, or of a watched future. Create it inside the loop.

    It is not a TaskGroup because partitions are assigned, and their tasks spawned, before and after `Worker.run`.
    """

    def __init__(self) -> None:
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._uncancelled: set[asyncio.Task[None]] = set()

    def spawn(
        self, work: Coroutine[Any, Any, None], *, name: str, is_cancelled: bool = True
    ) -> asyncio.Task[None]:
        """Run a coroutine as a task. With `is_cancelled` false, `stop` waits for its end instead of cancelling it."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if not is_cancelled:
            self._uncancelled.add(task)
            task.add_done_callback(self._uncancelled.discard)
        self.watch(task)
        return task

    def watch(self, future: asyncio.Future[None]) -> None:
        """Fail with this future's exception, if it ever has one."""
        future.add_done_callback(self._on_done)

    async def run_until_failed(
        self, work: Coroutine[Any, Any, Any], *, timeout_s: float | None = None
    ) -> None:
        """Run a coroutine to its end, until the timeout, or until a task fails. Raises that task's exception."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait([task, self.failure], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.wait([task])
        if self.failure.done():
            self.failure.result()  # always an exception
        if not task.cancelled():
            task.result()

    async def stop(self) -> None:
        """Cancel the tasks and wait for their ends."""
        for task in self._tasks - self._uncancelled:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self.failure.done():
            self.failure.exception()  # it was raised, or is hidden by another exception: retrieve it

    def _on_done(self, future: asyncio.Future[None]) -> None:
        if future.cancelled() or self.failure.done():
            return
        if (error := future.exception()) is not None:
            self.failure.set_exception(error)
