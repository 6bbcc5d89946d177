"""One assigned partition: its lane, and the jobs of it that are open."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from streamworker.core.ordering import KeyOrder
from streamworker.errors import KafkaError
from streamworker.worker.lane import MAX_COMMIT_RECORDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from streamworker.model import Job
    from streamworker.worker.lane import Lane

__all__ = ["Holding", "PartitionWork"]

_BACKOFF_S = 1.0
_LAST_COMMIT_S = 5.0

log = structlog.get_logger()


class Holding(Enum):
    """How we hold a partition."""

    OPENING = "ours, being taken over"
    OPEN = "ours, its records are read"
    DRAINING = "ours, its open jobs end, nothing new begins"
    GONE = "another's; nothing of it may be written"


class Errand(Protocol):
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
    errand: Errand
    task: asyncio.Task[None]


class PartitionWork:
    """What goes on in one assignment of one partition. Once gone it stays gone: a new assignment is a new one."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.holding = Holding.OPENING
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
                offset = await self.lane.open()
                break
            except KafkaError as error:
                log.warning(
                    "partition.cannot_open_yet", partition=str(self.lane.partition), reason=str(error)
                )
                await asyncio.sleep(_BACKOFF_S)
        return offset

    @property
    def has_room(self) -> bool:
        """Whether records of this partition may be taken in."""
        lane = self.lane
        return (
            self.holding is Holding.OPEN and lane.backlog < MAX_COMMIT_RECORDS and not lane.progress.is_full
        )

    @property
    def open_jobs(self) -> list[Job]:
        """The jobs that were taken in and have not ended."""
        return [errand.job for errand, _ in self._open.values()]

    def run(self, errand: Errand, work: Coroutine[Any, Any, None], *, ended: Callable[[], None]) -> None:
        """Work on a job as a task of this partition. `ended` is called however it ends."""
        offset = errand.job.source.offset
        task = asyncio.create_task(work, name=f"job {errand.job.job_id}")
        self._open[offset] = _Open(errand, task)

        def forget(_: asyncio.Task[None]) -> None:
            del self._open[offset]
            ended()

        task.add_done_callback(forget)

    def replace(self, errand: Errand) -> None:
        """Let another errand stand for the job that a task works on: the former one crashed."""
        offset = errand.job.source.offset
        self._open[offset] = self._open[offset]._replace(errand=errand)

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
        if self.holding is not Holding.OPEN:
            return []
        self.holding, self.leaving = Holding.DRAINING, "drain"
        waiting = [one for one in self._open.values() if one.errand.is_waiting]
        for one in waiting:
            one.task.cancel()
        return [one.errand.job for one in waiting]

    async def idle(self) -> None:
        """Wait until no job is open."""
        while self._open:
            await asyncio.wait([task for _, task in self._open.values()])

    async def let_go(self) -> list[Job]:
        """Stop all work at once and write nothing more; return the jobs that were open."""
        self.holding = Holding.GONE
        jobs = await self._stop_jobs()
        # Opening is cut short too: it would shut out the next owner.
        rest = [task for task in (self.opening, self.committing) if task is not None and not task.done()]
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)
        await self.lane.close()
        return jobs

    async def hand_back(self) -> list[Job]:
        """Stop the jobs that are open and put on record that it was not their fault; then let go."""
        waited = self.drain()
        was_open, self.holding = self.holding is Holding.DRAINING, Holding.GONE
        self.leaving = "drain_timeout"
        begun = {one.errand.job.source.offset for one in self._open.values() if not one.errand.is_waiting}
        jobs = await self._stop_jobs()
        if was_open:
            for job in jobs:
                if job.source.offset in begun:
                    self.lane.progress.hand_back(job.source.offset)
            await asyncio.wait([self.lane.touch()], timeout=_LAST_COMMIT_S)
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
