"""The life of a worker: it runs, drains, and stops; it reports whether it is ready."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from streamworker.worker.duplicates import Duplicates
from streamworker.worker.jobs import Jobs
from streamworker.worker.partition import Ownership
from streamworker.worker.partitions import Partitions
from streamworker.worker.poller import Poller
from streamworker.worker.stats import worker_stats
from streamworker.worker.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streamworker.model import Job, TopicPartition
    from streamworker.ports import CommitStores, Source
    from streamworker.worker.intake import Intake
    from streamworker.worker.runner import Tools
    from streamworker.worker.stats import WorkerStats

__all__ = ["Worker", "WorkerLimits"]

_RETURN_S = 1.0
"""How often a draining worker looks for jobs whose call has failed since."""

_REPORT_S = 3.0
"""How often a draining worker reports how many jobs are open."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLimits:
    """The worker's limits, from the settings. `max_waiting` bounds the jobs that are accepted and hold no slot.

    `max_held_bytes` bounds the records of the accepted jobs. `dedup_records` is how far back each partition remembers the
    ids of its jobs.

    Where there is a choice among waiting jobs, because there are several job `topics` or because their jobs take turns
    (`is_fair`), jobs are accepted while every slot is held, and `max_waiting` is shared by the topics' `weights`.
    """

    max_in_flight: int
    drain_timeout_s: float
    session_timeout_s: float = 45
    in_key_order: bool = False
    max_waiting: int = 1024
    max_held_bytes: int = 256 << 20
    topics: tuple[str, ...] = ()
    weights: Mapping[str, int] = field(default_factory=dict)
    is_fair: bool = False
    dedup_records: int = 0


class Worker:
    """Runs the jobs of the partitions that the group assigns to this process. Create it inside the running loop."""

    def __init__(
        self,
        *,
        source: Source,
        commit_stores: CommitStores,
        intake: Intake,
        tools: Tools,
        limits: WorkerLimits,
        failure: asyncio.Future[None],
    ) -> None:
        """Assemble a worker. An exception of `failure` ends it: another part of the process has failed."""
        self._source = source
        self._clock = tools.clock
        self._queues = tools.queues
        self._observer = tools.observer
        self._limits = limits
        self._room = asyncio.Event()
        self._queues.on_room = self._room.set
        self._supervisor = Supervisor()
        self._supervisor.watch(failure)
        duplicates = Duplicates(source, intake, records=limits.dedup_records)
        self._partitions = Partitions(
            source, commit_stores, self._supervisor, tools.observer, duplicates, on_opened=self._room.set
        )
        self._jobs = Jobs(
            tools,
            intake,
            duplicates,
            in_key_order=limits.in_key_order,
            max_waiting=limits.max_waiting,
            max_held_bytes=limits.max_held_bytes,
            on_room=self._room.set,
        )
        self._poller = Poller(source, self._partitions, self._jobs, tools, limits, room=self._room)
        self._is_joined = False
        self._draining = asyncio.Event()
        self._draining_since: float | None = None

    async def run(self) -> None:
        """Work until drained.

        Raises:
            Exception: a task of the worker, or `failure`, has failed.
        """
        polling = self._supervisor.spawn(self._poller.run(), name="poll")
        try:
            await self._supervisor.run_until_failed(self._draining.wait())
            await self._wait_until_idle()
            await self._partitions.return_jobs()
        finally:
            polling.cancel()
            await asyncio.wait([polling])
            await self.stop()

    def drain(self) -> None:
        """Accept no more jobs, wait for the open ones, then stop.

        The group moves idle partitions to other workers at once, and the others as soon as their jobs have ended.
        """
        if self._draining_since is None:
            self._draining_since = self._clock.monotonic()
        self._source.announce_departure()
        self._draining.set()
        self._poller.drain()

    async def stop(self) -> None:
        """Stop at once and release everything. May be called for a worker that was never run."""
        await self._partitions.release_all()
        await self._supervisor.stop()

    def cancel(self, job_id: str, timestamp: int, reason: str) -> None:
        """Cancel jobs with this id that were submitted at or before `timestamp`, now or when they arrive."""
        self._jobs.cancel(job_id, timestamp, reason)

    def rebalancing(self) -> None:
        """Begin a rebalance: no records are accepted until `assigned` is called; the partitions are kept."""
        self._observer.rebalancing()
        self._partitions.forgive()
        self._poller.rebalancing()

    def busy_partitions(self) -> frozenset[TopicPartition]:
        """Return the partitions that another owner could not take over without repeating work."""
        return self._partitions.busy

    def assigned(
        self,
        partitions: frozenset[TopicPartition],
        *,
        kept: frozenset[TopicPartition],
        promised: frozenset[TopicPartition],
    ) -> None:
        """Own exactly these partitions from now on; the jobs of those `kept` continue."""
        if self._partitions.assign(partitions, kept=kept, promised=promised):
            self._is_joined = True
            self._poller.assigned()

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        """Take a partition over anew whose offsets mean other records now."""
        self._partitions.reopen(partition, reason)

    @property
    def last_poll(self) -> float:
        """When the poll loop last polled, in seconds of the monotonic clock."""
        return self._poller.last_poll

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """The partitions that this worker owns and whose state it has read."""
        return frozenset(
            partition.id for partition in self._partitions if partition.ownership is Ownership.OPEN
        )

    def readiness(self) -> tuple[bool, dict[str, object]]:
        """Return whether the worker accepts jobs, and the details for `/readyz`."""
        opening = [
            str(partition.id) for partition in self._partitions if partition.ownership is Ownership.OPENING
        ]
        stalled = [str(partition.id) for partition in self._partitions if partition.committer.is_stalled]
        is_ready = self._is_joined and not opening and not stalled and not self._draining.is_set()
        return is_ready, {
            "joined": self._is_joined,
            "draining": self._draining.is_set(),
            "partitions": len(self._partitions),
            "partitions_opening": opening,
            "commits_failing": stalled,
            "partitions_promised": [
                str(partition.id) for partition in self._partitions if partition.promised_s is not None
            ],
            "jobs_open": self._jobs.open,
            "upstreams": self._queues.states(),
        }

    def stats(self) -> WorkerStats:
        """Return the values of the metrics that are read at each scrape."""
        now = self._clock.monotonic()
        return worker_stats(
            self._partitions,
            is_ready=self.readiness()[0],
            poll_age_s=now - self.last_poll,
            draining_s=0.0 if self._draining_since is None else now - self._draining_since,
        )

    async def _wait_until_idle(self) -> None:
        timeout_s = self._limits.drain_timeout_s
        log.info("worker.draining", jobs_open=self._jobs.open, timeout_s=timeout_s)
        for partition in self._partitions:
            self._report_returned(partition.drain())
        await self._supervisor.run_until_failed(self._idle(), timeout_s=timeout_s)

    async def _idle(self) -> None:
        """Wait until no job is open; return those whose call fails meanwhile and that would be tried again."""
        idle = asyncio.gather(*(partition.idle() for partition in self._partitions))
        loop = asyncio.get_running_loop()
        began = reported_at = loop.time()
        try:
            while not (await asyncio.wait([idle], timeout=_RETURN_S))[0]:
                for partition in self._partitions:
                    self._report_returned(partition.return_between_tries())
                if (now := loop.time()) - reported_at >= _REPORT_S:
                    reported_at = now
                    left_s = round(self._limits.drain_timeout_s - (now - began))
                    log.info("worker.draining", jobs_open=self._jobs.open, timeout_s=left_s)
        finally:
            idle.cancel()

    def _report_returned(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._observer.job_abandoned(job, "drain")
