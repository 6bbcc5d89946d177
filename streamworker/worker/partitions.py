"""One assigned partition: its lane, and the jobs of it that are open."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from streamworker.errors import KafkaError
from streamworker.progress.ordering import KeyOrder
from streamworker.worker.committer import MAX_COMMIT_RECORDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from streamworker.model import Job
    from streamworker.worker.committer import PartitionCommitter

__all__ = ["Ownership", "PartitionWork"]

_BACKOFF_S = 1.0
_LAST_COMMIT_S = 5.0

log = structlog.get_logger()


class Ownership(Enum):
    """How we hold a partition."""

    OPENING = "ours, being taken over"
    OPEN = "ours, its records are read"
    DRAINING = "ours, its open jobs end, nothing new begins"
    GONE = "another's; nothing of it may be written"


class OpenDelivery(Protocol):
    """What a task of a partition works on."""

    @property
    def job(self) -> Job:
        """The job."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of it was begun."""
        ...


class _Open(NamedTuple):
    delivery: OpenDelivery
    task: asyncio.Task[None]


class PartitionWork:
    """What goes on in one assignment of one partition. Once gone it stays gone: a new assignment is a new one."""

    def __init__(self, committer: PartitionCommitter) -> None:
        self.committer = committer
        self.ownership = Ownership.OPENING
        self.opening: asyncio.Task[None] | None = None
        self.committing: asyncio.Task[None] | None = None
        self._open: dict[int, _Open] = {}
        self._is_stopping = False
        self.leaving = "stopped"
        """Why jobs of it are let go, once they are."""
        self._order: KeyOrder[asyncio.Future[None]] = KeyOrder()

    async def open(self) -> int:
        """Take the partition over, as long as it takes; return the offset to read from."""
        while True:
            try:
                offset = await self.committer.open()
                break
            except KafkaError as error:
                log.warning(
                    "partition.cannot_open_yet", partition=str(self.committer.partition), reason=str(error)
                )
                await asyncio.sleep(_BACKOFF_S)
        return offset

    @property
    def has_room(self) -> bool:
        """Whether records of this partition may be taken in."""
        committer = self.committer
        return (
            self.ownership is Ownership.OPEN
            and committer.backlog < MAX_COMMIT_RECORDS
            and not committer.progress.is_full
        )

    @property
    def open_jobs(self) -> list[Job]:
        """The jobs that were taken in and have not ended."""
        return [delivery.job for delivery, _ in self._open.values()]

    def run(
        self, delivery: OpenDelivery, work: Coroutine[Any, Any, None], *, ended: Callable[[], None]
    ) -> None:
        """Work on a job as a task of this partition. `ended` is called however it ends."""
        offset = delivery.job.source.offset
        task = asyncio.create_task(work, name=f"job {delivery.job.job_id}")
        self._open[offset] = _Open(delivery, task)

        def forget(_: asyncio.Task[None]) -> None:
            del self._open[offset]
            ended()

        task.add_done_callback(forget)

    def replace(self, delivery: OpenDelivery) -> None:
        """Let another errand stand for the job that a task works on: the former one crashed."""
        offset = delivery.job.source.offset
        self._open[offset] = self._open[offset]._replace(delivery=delivery)

    @property
    def waiting(self) -> int:
        """Jobs that wait for one of their key."""
        return self._order.waiting

    @asynccontextmanager
    async def turn(self, key: bytes, *, waits: Callable[[], None]) -> AsyncIterator[None]:
        """Wait until the jobs of this key that came before have ended; leaving lets the next one go.

        `waits` is called if it has to wait: another one may be taken in.
        """
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._order.enter(key, place):
            waits()
            try:
                await place
            except asyncio.CancelledError:
                if place.cancelled():
                    self._order.withdraw(key, place)
                else:  # its turn came in the same moment
                    self._leave(key)
                raise
        try:
            yield
        finally:
            self._leave(key)

    def drain(self) -> list[Job]:
        """Begin nothing new; return the jobs that had not begun. They are handed back with the partition."""
        if self.ownership is not Ownership.OPEN:
            return []
        self.ownership, self.leaving = Ownership.DRAINING, "drain"
        waiting = [one for one in self._open.values() if one.delivery.is_waiting]
        for one in waiting:
            one.task.cancel()
        return [one.delivery.job for one in waiting]

    async def idle(self) -> None:
        """Wait until no job is open."""
        while self._open:
            await asyncio.wait([task for _, task in self._open.values()])

    async def let_go(self) -> list[Job]:
        """Stop all work at once and write nothing more; return the jobs that were open."""
        self.ownership = Ownership.GONE
        jobs = await self._stop_jobs()
        # Opening is cut short too: it would shut out the next owner.
        rest = [task for task in (self.opening, self.committing) if task is not None and not task.done()]
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)
        await self.committer.close()
        return jobs

    async def hand_back(self) -> list[Job]:
        """Stop the jobs that are open and put on record that it was not their fault; then let go."""
        waited = self.drain()
        was_open, self.ownership = self.ownership is Ownership.DRAINING, Ownership.GONE
        self.leaving = "drain_timeout"
        begun = {one.delivery.job.source.offset for one in self._open.values() if not one.delivery.is_waiting}
        jobs = await self._stop_jobs()
        if was_open:
            for job in jobs:
                if job.source.offset in begun:
                    self.committer.progress.undo_count(job.source.offset)
            await asyncio.wait([self.committer.touch()], timeout=_LAST_COMMIT_S)
        await self.let_go()
        return [*waited, *(job for job in jobs if job not in waited)]

    async def _stop_jobs(self) -> list[Job]:
        """Cancel what is open; once, for a second cancellation would leak what the first one closes."""
        tasks = [task for _, task in self._open.values()]
        jobs = [] if self._is_stopping else self.open_jobs
        if not self._is_stopping:
            self._is_stopping = True
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return jobs

    def _leave(self, key: bytes) -> None:
        following = self._order.leave(key)
        while following is not None and following.done():  # cancelled in this very moment
            following = self._order.leave(key)
        if following is not None:
            following.set_result(None)
