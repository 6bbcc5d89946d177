"""One assigned partition: its committer, and its jobs that are open."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from streamworker.errors import KafkaError
from streamworker.progress.dedup import RecentIds
from streamworker.progress.ordering import KeyOrder
from streamworker.worker.committer import MAX_COMMIT_RECORDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from streamworker.model import Job, TopicPartition
    from streamworker.worker.committer import PartitionCommitter

__all__ = ["AssignedPartition", "OpenDelivery", "Ownership"]

_OPEN_BACKOFF_S = 1.0
_LAST_COMMIT_S = 5.0

log = structlog.get_logger()


class Ownership(Enum):
    """The state of one assignment of a partition."""

    OPENING = "assigned; the former owner is being fenced"
    OPEN = "assigned; its records are fetched"
    PROMISED = "assigned, until its open jobs end; then it moves to another worker, and no new job begins"
    DRAINING = "assigned; its open jobs end, no new job begins"
    GONE = "not assigned any more; nothing of it may be written"


class OpenDelivery(Protocol):
    """The delivery that a task of the partition runs."""

    @property
    def job(self) -> Job:
        """The job."""
        ...

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of the job has begun."""
        ...

    @property
    def is_between_tries(self) -> bool:
        """Whether a try has failed and the job waits for the next one."""
        ...


@dataclass(kw_only=True, slots=True)
class _OpenJob:
    delivery: OpenDelivery
    task: asyncio.Task[None]


class AssignedPartition:
    """One assignment of one partition. An assignment that is gone stays gone: the next one is another object."""

    def __init__(self, committer: PartitionCommitter) -> None:
        self.committer = committer
        self.ownership = Ownership.OPENING
        self.recent_ids = RecentIds(0)
        """The ids of the records before the one that is accepted next. `Partitions` sets it before it opens."""
        self.opening: asyncio.Task[None] | None = None
        self.committing: asyncio.Task[None] | None = None
        self.leaving = "stopped"
        """Why the jobs are abandoned, once they are."""
        self._open: dict[int, _OpenJob] = {}
        self._promised_at: float | None = None
        self._is_stopping = False
        self._forgiven: set[int] = set()
        self._order: KeyOrder[asyncio.Future[None]] = KeyOrder()

    @property
    def id(self) -> TopicPartition:
        """The partition's topic and number."""
        return self.committer.partition

    @property
    def has_room(self) -> bool:
        """Whether records of this partition may be accepted."""
        committer = self.committer
        return (
            self.ownership is Ownership.OPEN
            and committer.backlog < MAX_COMMIT_RECORDS
            and not committer.progress.is_full
            and not committer.is_stalled
        )

    @property
    def is_active(self) -> bool:
        """Whether the partition is assigned and its jobs may run."""
        return self.ownership in {Ownership.OPEN, Ownership.DRAINING}

    @property
    def open_jobs(self) -> list[Job]:
        """The jobs that were accepted and have not ended."""
        return [job.delivery.job for job in self._open.values()]

    @property
    def is_busy(self) -> bool:
        """Whether another owner would repeat work: a job is open, or an end is not committed."""
        return bool(self._open) or not self.committer.is_idle

    @property
    def begun_jobs(self) -> int:
        """Open jobs of which something has begun: an upstream was called, or `started` was written."""
        return sum(not job.delivery.is_waiting for job in self._open.values())

    @property
    def promised_s(self) -> float | None:
        """Seconds for which the partition has been promised to another worker; None if it is not."""
        if self._promised_at is None:
            return None
        return asyncio.get_running_loop().time() - self._promised_at

    @property
    def waiting(self) -> int:
        """Jobs that wait for an earlier job of their key."""
        return self._order.waiting

    async def open(self) -> int:
        """Take the partition over, and retry while the broker is unavailable; return the offset to read from."""
        while True:
            try:
                return await self.committer.open()
            except KafkaError as error:
                log.warning("partition.open_failed", partition=str(self.id), reason=str(error))
            await asyncio.sleep(_OPEN_BACKOFF_S)

    def opened(self) -> None:
        """Accept records from now on, unless the partition was promised meanwhile."""
        self.ownership = Ownership.OPEN if self._promised_at is None else Ownership.PROMISED

    def seal(self) -> list[Job]:
        """Begin no new job, because the partition is promised; cancel and return the jobs that have not begun."""
        if self._promised_at is None:
            self._promised_at = asyncio.get_running_loop().time()
        if self.ownership is not Ownership.OPEN:
            return []
        self.ownership = Ownership.PROMISED
        jobs = self._cancel_waiting("moved")
        self.committer.progress.give_back(job.source.offset for job in jobs)
        return jobs

    def resume(self) -> bool:
        """Accept records again, because the partition stays; return whether they must be read again."""
        self._promised_at = None
        if self.ownership is not Ownership.PROMISED:
            return False
        self.ownership, self.leaving = Ownership.OPEN, "stopped"
        return True

    def run(
        self, delivery: OpenDelivery, work: Coroutine[Any, Any, None], *, ended: Callable[[], None]
    ) -> None:
        """Run a job as a task of this partition. `ended` is called however it ends."""
        offset = delivery.job.source.offset
        task = asyncio.create_task(work, name=f"job {delivery.job.job_id}")
        job = self._open[offset] = _OpenJob(delivery=delivery, task=task)

        def forget(_: asyncio.Task[None]) -> None:
            if self._open.get(offset) is job:  # the record may have been accepted once more
                del self._open[offset]
            ended()

        task.add_done_callback(forget)

    def replace(self, delivery: OpenDelivery) -> None:
        """Set the delivery that a job's task now runs: the one before crashed."""
        self._open[delivery.job.source.offset].delivery = delivery

    @asynccontextmanager
    async def turn(self, key: bytes, *, waits: Callable[[], None]) -> AsyncIterator[None]:
        """Wait until the earlier jobs of this key have ended; leaving the block starts the next job of the key.

        `waits` is called if the job has to wait: another record may be accepted.
        """
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._order.enter(key, place):
            waits()
            try:
                await place
            except asyncio.CancelledError:
                if place.cancelled():
                    self._order.withdraw(key, place)
                else:  # its turn came in the same turn of the loop
                    self._leave(key)
                raise
        try:
            yield
        finally:
            self._leave(key)

    def forgive(self) -> None:
        """Commit that the deliveries of the open jobs do not count, until `count_again` is called."""
        if self.ownership is Ownership.OPEN and not self._forgiven:
            begun = [offset for offset, job in self._open.items() if not job.delivery.is_waiting]
            if begun:
                self._forgiven = set(begun)
                for offset in begun:
                    self.committer.progress.undo_count(offset)
                self.committer.touch()

    def count_again(self) -> None:
        """Commit that the deliveries of the open jobs count."""
        still_open, self._forgiven = self._forgiven & self._open.keys(), set()
        if still_open and self.is_active:
            for offset in still_open:
                self.committer.progress.count(offset)
            self.committer.touch()

    def drain(self) -> list[Job]:
        """Begin no new job; cancel and return the jobs without an open call: they go to the partition's next owner."""
        if self.ownership not in {Ownership.OPEN, Ownership.PROMISED}:
            return []
        self.ownership = Ownership.DRAINING
        return [*self._cancel_waiting("drain"), *self.return_between_tries()]

    def return_between_tries(self) -> list[Job]:
        """Cancel and return the jobs of a draining partition that wait for their next try; their deliveries do not count.

        An upstream that is held may make them wait for longer than any stream lasts.
        """
        if self.ownership is not Ownership.DRAINING:
            return []
        returned = {
            offset: job
            for offset, job in self._open.items()
            if job.delivery.is_between_tries and not job.task.cancelling()
        }
        for job in returned.values():
            job.task.cancel()
        for offset in returned.keys() - self._forgiven:
            self.committer.progress.undo_count(offset)
        self._forgiven -= returned.keys()
        if returned:
            self.committer.touch()
        return [job.delivery.job for job in returned.values()]

    async def idle(self) -> None:
        """Wait until no job is open."""
        while self._open:
            await asyncio.wait([job.task for job in self._open.values()])

    async def release(self) -> list[Job]:
        """Stop all work at once and write nothing more; return the jobs that were open."""
        self.ownership = Ownership.GONE
        jobs = await self._stop_jobs()
        # An opening that goes on would fence the next owner.
        rest = [task for task in (self.opening, self.committing) if task is not None and not task.done()]
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)
        await self.committer.close()
        return jobs

    async def return_jobs(self) -> list[Job]:
        """Stop the open jobs, commit that their deliveries do not count, and release the partition.

        Returns the jobs that were open.
        """
        waited = self.drain()
        was_open, self.ownership = self.ownership is Ownership.DRAINING, Ownership.GONE
        self.leaving = "drain_timeout"
        begun = {
            offset
            for offset, job in self._open.items()
            if not job.delivery.is_waiting and not job.task.cancelling()
        }
        jobs = await self._stop_jobs()
        if was_open:
            for job in jobs:
                if job.source.offset in begun - self._forgiven:
                    self.committer.progress.undo_count(job.source.offset)
            await asyncio.wait([self.committer.touch()], timeout=_LAST_COMMIT_S)
        await self.release()
        return [*waited, *(job for job in jobs if job not in waited)]

    def _cancel_waiting(self, reason: str) -> list[Job]:
        """Cancel the jobs that have not begun; return them."""
        self.leaving = reason
        waiting = [job for job in self._open.values() if job.delivery.is_waiting]
        for job in waiting:
            job.task.cancel()
        return [job.delivery.job for job in waiting]

    async def _stop_jobs(self) -> list[Job]:
        """Cancel the open jobs once: a second cancellation would interrupt what the first one closes."""
        tasks = [job.task for job in self._open.values()]
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
        while following is not None and following.done():  # cancelled in this turn of the loop
            following = self._order.leave(key)
        if following is not None:
            following.set_result(None)
