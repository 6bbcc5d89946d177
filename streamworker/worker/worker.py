"""The worker: partitions come and go, records become jobs, and at the end everything drains.

The poll loop never waits for a job: it asks for as many records as there is room for, from the partitions that have
room, and goes on asking (for nothing, if need be) so that the group's errors are seen.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import structlog

from streamworker.errors import KafkaError
from streamworker.redaction import without_message
from streamworker.worker.cancellations import Cancellations
from streamworker.worker.committer import PartitionCommitter
from streamworker.worker.delivery import Delivery
from streamworker.worker.intake import Accepted
from streamworker.worker.partitions import Ownership, PartitionWork
from streamworker.worker.stats import worker_stats

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from contextlib import AbstractAsyncContextManager

    from streamworker.model import Cause, ConsumerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStores, Source
    from streamworker.worker.intake import Intake, Refused
    from streamworker.worker.queues import UpstreamQueues
    from streamworker.worker.runner import Tools, UpstreamPolicy
    from streamworker.worker.stats import WorkerStats

__all__ = ["Worker", "WorkerLimits"]

_IDLE_POLL_S = 0.25
_RETRY_S = 1.0
_CRASH_BACKOFF_S = 1.0

log = structlog.get_logger()


class WorkerLimits(NamedTuple):
    """How much at once and how long, from the settings."""

    max_in_flight: int
    max_deliveries: int
    drain_timeout_s: float
    session_timeout_s: float = 45
    in_key_order: bool = False
    max_waiting: int = 1024


class Worker:
    """Owns the partitions that the group assigns to us."""

    def __init__(
        self,
        *,
        source: Source,
        commit_stores: CommitStores,
        intake: Intake,
        tools: Tools,
        policies: Mapping[str, UpstreamPolicy],
        queues: UpstreamQueues,
        limits: WorkerLimits,
        failure: asyncio.Future[None],
    ) -> None:
        """Assemble a worker. `failure` ends it when a part of the process is broken beyond repair."""
        self._source = source
        self._commit_stores = commit_stores
        self._intake = intake
        self._tools = tools
        self._policies = policies
        self._queues = queues
        self._limits = limits
        self._observer: Observer = tools.observer
        self._commit_id = uuid4().hex[:12]
        self._works: dict[TopicPartition, PartitionWork] = {}
        self._jobs_open = 0
        self._cancels = Cancellations()
        self._deliveries_by_id: dict[str, set[Delivery]] = {}
        self._room = asyncio.Event()
        queues.on_room = self._room.set
        self._draining = asyncio.Event()
        self._draining_since: float | None = None
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._releasing: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._failure = failure
        self._joined = False
        self._is_in_doubt = False  # we slept so long that our partitions may be another's
        self.last_poll = tools.clock.monotonic()
        """When the poll loop last turned, in seconds of the monotonic clock: the sign of life."""

    # The life of the process

    async def run(self) -> None:
        """Work until `drain` is called, then until the last job has ended or the drain timeout has passed.

        Cancelling this goes at once: nothing is finished, nothing is lost, the group is left.
        """
        poll = asyncio.create_task(self._poll(), name="poll")
        draining = asyncio.create_task(self._draining.wait())
        try:
            watched: list[asyncio.Future[Any]] = [poll, draining, self._failure]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for ended in (poll, self._failure):
                if ended.done():
                    ended.result()  # only ever an exception
            await self._wait_until_idle()
            await self._hand_back()
        finally:
            draining.cancel()
            poll.cancel()
            await asyncio.wait([poll, draining])
            await self.stop()

    def drain(self) -> None:
        """Take no more jobs, let the open ones end, then stop."""
        if self._draining_since is None:
            self._draining_since = self._tools.clock.monotonic()
        self._draining.set()
        self._room.set()

    def cancel(self, job_id: str, timestamp: int, reason: str) -> None:
        """End the jobs of this id that were submitted before; of those still to come it is remembered."""
        self._cancels.note(job_id, timestamp, reason)
        for delivery in self._deliveries_by_id.get(job_id, ()):
            if delivery.job.timestamp <= timestamp:
                delivery.cancel(reason)

    def readiness(self) -> tuple[bool, dict[str, object]]:
        """Return whether jobs are taken, and what there is to say about it."""
        opening = [
            str(partition) for partition, work in self._works.items() if work.ownership is Ownership.OPENING
        ]
        is_ready = self._joined and not opening and not self._draining.is_set()
        return is_ready, {
            "joined": self._joined,
            "draining": self._draining.is_set(),
            "partitions": len(self._works),
            "partitions_opening": opening,
            "jobs_open": self._jobs_open,
            "upstreams": self._queues.states(),
        }

    def stats(self) -> WorkerStats:
        """Return what is measured of the worker when somebody looks."""
        now = self._tools.clock.monotonic()
        return worker_stats(
            self._works.values(),
            is_ready=self.readiness()[0],
            poll_age_s=now - self.last_poll,
            draining_s=0.0 if self._draining_since is None else now - self._draining_since,
        )

    # Assignments

    def rebalancing(self) -> None:
        """The group calls its members together: what is ours goes on until `assigned` says otherwise."""
        self._observer.rebalancing()

    def assigned(self, partitions: frozenset[TopicPartition], *, is_continuous: bool) -> None:
        """Keep what stays, let go at once of what left, take over what is new."""
        if self._is_stopping:  # taking over anew would shut out our own last commits
            return
        self._joined, self._is_in_doubt = True, False
        held = frozenset(self._works)
        lost = held - partitions if is_continuous else held
        for partition in lost:
            self._release(self._works.pop(partition), "revoked")
        gained = partitions - frozenset(self._works)
        for partition in gained:
            self._take_over(partition)
        self._observer.partitions_changed(len(self._works), len(gained), len(lost))

    def _take_over(self, partition: TopicPartition) -> None:
        work: PartitionWork

        def lost(reason: str) -> None:
            self._spawn(self._reopen(work, reason))

        store = self._commit_stores.store(partition)
        committer = PartitionCommitter(
            partition, store, commit_id=self._commit_id, lost=lost, observer=self._observer
        )
        work = self._works[partition] = PartitionWork(committer)
        work.opening = self._spawn(self._open(work))

    async def _open(self, work: PartitionWork) -> None:
        offset = await work.open()
        work.committing = self._spawn(work.committer.run())
        self._source.seek(work.committer.partition, offset)
        work.ownership = Ownership.OPEN
        self._room.set()
        log.info("partition.opened", partition=str(work.committer.partition), offset=offset)

    async def _reopen(self, work: PartitionWork, reason: str) -> None:
        """Another worker fenced us. If the group still says that the partition is ours, take it over anew."""
        partition = work.committer.partition
        log.warning("partition.fenced", partition=str(partition), reason=reason)
        self._observer.partition_fenced(partition)
        await asyncio.wait([self._release(work, "fenced")])
        while self._is_current(work):
            await asyncio.sleep(_RETRY_S)
            if await self._is_member() and self._is_current(work):
                self._take_over(partition)

    def _release(self, work: PartitionWork, reason: str) -> asyncio.Task[None]:
        """Let go in a task that is never cancelled: a lane that is not closed would hold its transaction."""
        task = self._spawn(self._let_go(work, reason))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        return task

    async def _let_go(self, work: PartitionWork, reason: str) -> None:
        work.leaving = reason
        for job in await work.let_go():
            self._observer.job_abandoned(job, reason)
        log.info("partition.let_go", partition=str(work.committer.partition), reason=reason)

    async def _is_member(self) -> bool:
        """Whether the group says so, here and now. Who slept past its session holds records that are another's."""
        try:
            return await self._source.confirm_membership()
        except KafkaError:
            return False

    def _is_current(self, work: PartitionWork) -> bool:
        return self._works.get(work.committer.partition) is work

    # Records

    async def _poll(self) -> None:
        while True:
            room = 0 if self._draining.is_set() else self._free()
            ready = {partition: work for partition, work in self._works.items() if room > 0 and work.has_room}
            if not ready:
                self._room.clear()
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes with the event.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_POLL_S):
                        await self._room.wait()
            try:
                records = await self._source.receive(ready, room)
            except KafkaError as error:
                log.warning("kafka.unavailable", reason=str(error))
                self._observer.kafka_failed("poll")
                await asyncio.sleep(_RETRY_S)
                continue
            slept_s = self._tools.clock.monotonic() - self.last_poll
            self.last_poll += slept_s
            if self._draining.is_set():  # what came while we were asked to stop is the next owner's
                continue
            self._is_in_doubt |= slept_s > self._limits.session_timeout_s / 2
            if self._is_in_doubt and not await self._is_member():
                self._read_again({record.topic_partition for record in records})
                continue
            self._is_in_doubt = False
            missed = set()
            for record in records:
                # A partition may have gone, and even come back, while we waited; its records come again then.
                work = ready[record.topic_partition]
                if self._is_current(work) and work.ownership is Ownership.OPEN:
                    self._take(work, record)
                else:
                    missed.add(record.topic_partition)
            self._read_again(missed)

    def _free(self) -> int:
        """Return how many records may be taken in."""
        waiting = self._queues.waiting + sum(work.waiting for work in self._works.values())
        # Not the permits that are out: a job that was just taken has not come to its gate yet.
        active = self._jobs_open - waiting
        return min(self._limits.max_in_flight - active, self._limits.max_waiting - waiting)

    def _read_again(self, missed: set[TopicPartition]) -> None:
        """Go back where a partition has come back so soon that its new assignment's records were passed over too."""
        for partition in missed:
            work = self._works.get(partition)
            if work is not None and work.ownership is Ownership.OPEN:
                self._source.seek(partition, work.committer.progress.position)

    def _take(self, work: PartitionWork, record: ConsumerRecord) -> None:
        offset = record.at.offset
        deliveries = work.committer.progress.begin(offset)
        if not deliveries:
            self._observer.record_skipped(record.topic_partition)
        elif record.value is None:
            work.committer.finish(offset, ())
            self._observer.tombstone_skipped(record.topic_partition)
        else:
            self._decide(work, record, deliveries)

    def _decide(self, work: PartitionWork, record: ConsumerRecord, deliveries: int) -> None:
        decision = self._intake.take(record, deliveries, self._limits.max_deliveries)
        if isinstance(decision, Accepted):
            self._begin(work, record, decision, deliveries)
        else:
            self._refuse(work, record, decision)

    def _begin(
        self, work: PartitionWork, record: ConsumerRecord, accepted: Accepted, deliveries: int
    ) -> None:
        def ended() -> None:
            self._jobs_open -= 1
            self._room.set()
            accepted.span.abandoned(work.leaving)  # of a job that was let go before its task began

        is_ordered = self._limits.in_key_order and record.key is not None
        turn = work.turn(record.key or b"", waits=self._room.set) if is_ordered else None
        delivery = self._new_delivery(work, accepted, deliveries, turn)
        self._jobs_open += 1
        work.run(delivery, self._run(work, record, delivery, deliveries), ended=ended)

    def _new_delivery(
        self,
        work: PartitionWork,
        accepted: Accepted,
        deliveries: int,
        turn: AbstractAsyncContextManager[None] | None = None,
    ) -> Delivery:
        cause: Cause = "new" if deliveries == 1 else "redelivered"
        return Delivery(
            self._tools,
            accepted,
            work.committer,
            self._queues,
            self._policies,
            cause=cause,
            turn=turn or nullcontext(),
        )

    def _refuse(self, work: PartitionWork, record: ConsumerRecord, refused: Refused) -> None:
        done = work.committer.finish(record.at.offset, refused.records, fallback=refused.fallback)

        def tell(future: asyncio.Future[None]) -> None:
            if future.cancelled():
                refused.span.abandoned(work.leaving)
                return
            self._observer.job_rejected(refused.rejection, refused.code)
            refused.span.refused(refused.code)

        done.add_done_callback(tell)

    async def _run(
        self, work: PartitionWork, record: ConsumerRecord, delivery: Delivery, deliveries: int
    ) -> None:
        """Run a job to its terminal event. A crash of ours is tried again, as a delivery: it may be the job's doing."""
        async with AsyncExitStack() as held:  # the job's turn, through every crash
            while True:
                try:
                    return await self._watched(delivery, held)
                except Exception as error:
                    log.error("job.crashed", job_id=delivery.job.job_id, exc_info=without_message(error))  # noqa: TRY400 - its words may be the prompt
                    self._observer.job_crashed(delivery.job)
                    delivery.span.crashed()
                finally:
                    delivery.span.abandoned(work.leaving)  # unless it has its end
                await asyncio.sleep(_CRASH_BACKOFF_S)
                deliveries += 1
                decision = self._intake.take(record, deliveries, self._limits.max_deliveries)
                if not isinstance(decision, Accepted):
                    return self._refuse(work, record, decision)
                delivery = self._new_delivery(work, decision, deliveries)
                work.replace(delivery)

    async def _watched(self, delivery: Delivery, held: AsyncExitStack) -> None:
        """Run a job so that a cancellation finds it, also one that came before."""
        job = delivery.job
        if (reason := self._cancels.reason_for(job.job_id, job.timestamp)) is not None:
            delivery.cancel(reason)
        running = self._deliveries_by_id.setdefault(job.job_id, set())
        running.add(delivery)
        try:
            await delivery.run(held)
        finally:
            running.discard(delivery)
            if not running:
                self._deliveries_by_id.pop(job.job_id, None)

    # The end

    async def _wait_until_idle(self) -> None:
        log.info("worker.draining", jobs_open=self._jobs_open, timeout_s=self._limits.drain_timeout_s)
        for work in self._works.values():
            for job in work.drain():
                self._observer.job_abandoned(job, "drain")
        works = list(self._works.values())
        idle = asyncio.gather(*(work.idle() for work in works))
        watched: list[asyncio.Future[Any]] = [idle, self._failure]
        await asyncio.wait(watched, timeout=self._limits.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        with suppress(asyncio.CancelledError):
            await idle
        if self._failure.done():
            self._failure.result()  # only ever an exception

    async def _hand_back(self) -> None:
        self._is_stopping = True
        works = list(self._works.values())
        self._works.clear()
        for jobs in await asyncio.gather(*(work.hand_back() for work in works)):
            for job in jobs:
                self._observer.job_abandoned(job, "drain_timeout")

    async def stop(self) -> None:
        """Let go of everything at once. Also for a worker that joined and was never run."""
        self._is_stopping = True
        works = list(self._works.values())
        self._works.clear()
        await asyncio.gather(*(self._let_go(work, "stopped") for work in works))
        for task in self._side_tasks - self._releasing:
            task.cancel()
        if self._side_tasks:
            await asyncio.wait(self._side_tasks)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_task_ended)
        return task

    def _side_task_ended(self, task: asyncio.Task[None]) -> None:
        self._side_tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failure.done():
            self._failure.set_exception(
                error
            )  # a bug of ours: better to stop, and be started anew, than to stall
