"""One assigned partition: its lane, and the jobs of it that are open."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from streamworker.core.ordering import KeyOrder
from streamworker.errors import KafkaError
from streamworker.worker.lane import MAX_COMMIT_RECORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

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


class _Waiting(NamedTuple):
    job: Job
    begin: Callable[[], None]


class PartitionWork:
    """What goes on in one assignment of one partition. Once gone it stays gone: a new assignment is a new one."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.holding = Holding.OPENING
        self.opening: asyncio.Task[None] | None = None
        self.committing: asyncio.Task[None] | None = None
        self._jobs: dict[int, tuple[Job, asyncio.Task[None]]] = {}
        self._is_stopping = False
        self._order: KeyOrder[_Waiting] = KeyOrder()

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
        """The jobs that run now."""
        return [job for job, _ in self._jobs.values()]

    def run(self, job: Job, work: Coroutine[Any, Any, None], *, ended: Callable[[], None]) -> None:
        """Run a job as a task of this partition. `ended` is called however it ends."""
        offset = job.source.offset
        task = asyncio.create_task(work, name=f"job {job.job_id}")
        self._jobs[offset] = (job, task)

        def forget(_: asyncio.Task[None]) -> None:
            del self._jobs[offset]
            ended()

        task.add_done_callback(forget)

    def in_order(self, key: bytes, job: Job, begin: Callable[[], None]) -> None:
        """Begin a job when those of its key that came before have ended; `key_left` has to be told of each end."""
        if self._order.enter(key, _Waiting(job, begin)):
            begin()

    def key_left(self, key: bytes) -> None:
        """A job of this key has ended: let the next one begin."""
        waiting = self._order.leave(key)
        if waiting is not None and self.holding is Holding.OPEN:
            waiting.begin()

    @property
    def waiting(self) -> int:
        """How many jobs wait for one of their key."""
        return self._order.waiting

    def drain(self) -> list[Job]:
        """Begin nothing new; return the jobs that waited. They are handed back with the partition."""
        if self.holding is not Holding.OPEN:
            return []
        self.holding = Holding.DRAINING
        jobs = [waiting.job for waiting in self._order.clear()]
        for job in jobs:
            self.lane.progress.hand_back(job.source.offset)
        return jobs

    async def idle(self) -> None:
        """Wait until no job is open."""
        while self._jobs:
            await asyncio.wait([task for _, task in self._jobs.values()])

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
        jobs = await self._stop_jobs()
        if was_open:
            for job in jobs:
                self.lane.progress.hand_back(job.source.offset)
            await asyncio.wait([self.lane.touch()], timeout=_LAST_COMMIT_S)
        await self.let_go()
        return [*jobs, *waited]

    async def _stop_jobs(self) -> list[Job]:
        """Cancel what is open; once, for a second cancellation would leak what the first one closes."""
        tasks = [task for _, task in self._jobs.values()]
        jobs = [] if self._is_stopping else self.open_jobs
        if not self._is_stopping:
            self._is_stopping = True
            for task in tasks:
                task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return jobs
