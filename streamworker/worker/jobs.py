"""The open jobs of a worker: records are accepted, run until their terminal events, and cancelled by their ids."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from random import uniform
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import StreamworkerError
from streamworker.model import ErrorCode
from streamworker.redaction import without_message
from streamworker.worker.cancellations import Cancellations
from streamworker.worker.delivery import Delivery, HeldTurn
from streamworker.worker.intake import Accepted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from streamworker.model import Cause, ConsumerRecord, TopicPartition
    from streamworker.observe import CancelEffect
    from streamworker.worker.duplicates import Duplicates
    from streamworker.worker.intake import Intake, Refused
    from streamworker.worker.partition import AssignedPartition
    from streamworker.worker.runner import Tools

__all__ = ["Jobs"]

_CRASH_BACKOFF_S = 1.0

SUSPECT_SPREAD_S = 2.0
"""Within how many seconds the jobs start that were open when their worker died once."""

ISOLATED_AFTER = 2
"""Deaths after which a job runs while no other such suspect runs in this worker."""

log = structlog.get_logger()


class Jobs:
    """The open jobs. `on_room` is called when another record may be accepted."""

    def __init__(
        self,
        tools: Tools,
        intake: Intake,
        duplicates: Duplicates,
        *,
        in_key_order: bool,
        max_waiting: int,
        max_held_bytes: int,
        on_room: Callable[[], None],
    ) -> None:
        """With `in_key_order`, the jobs of one record key run one after another.

        The waiting jobs of one upstream of several take at most half of `max_waiting`. `max_held_bytes` bounds the records of
        the open jobs.
        """
        self.open = 0
        """Jobs that were accepted and have not ended."""
        self.open_of: Counter[str] = Counter()
        """The same for each topic."""
        self.held_bytes_of: Counter[str] = Counter()
        """Bytes of their records for each topic."""
        self._tools = tools
        self._observer = tools.observer
        self._intake = intake
        self._duplicates = duplicates
        self._in_key_order = in_key_order
        self._on_room = on_room
        has_others = len(tools.queues.queues) > 1
        self._max_waiting_per_upstream = max(1, max_waiting // 2) if has_others else max_waiting
        self._max_held_bytes = max_held_bytes
        self._held_bytes = 0
        self._is_full = False
        self._open_at: dict[str, int] = {}
        self._blocked: dict[TopicPartition, str] = {}
        self._suspects_waiting = 0
        self._isolation = asyncio.Lock()
        self._cancels = Cancellations()
        self._deliveries: dict[str, set[Delivery]] = {}

    @property
    def waiting(self) -> int:
        """Jobs that wait because their worker died while they ran."""
        return self._suspects_waiting

    @property
    def has_room(self) -> bool:
        """Whether another record may be held in memory.

        After a record that did not fit there is room again when a quarter of the bound is free.
        """
        return not self._is_full

    def is_blocked(self, topic_partition: TopicPartition) -> bool:
        """Return whether the partition's next record waits for an upstream whose jobs take their share of the room.

        The partition is free again when the upstream has a quarter of its share left.
        """
        upstream = self._blocked.get(topic_partition)
        if upstream is None:
            return False
        if self._waiting_at(upstream) <= 3 * self._max_waiting_per_upstream // 4:
            del self._blocked[topic_partition]
            return False
        return True

    def accept(self, partition: AssignedPartition, record: ConsumerRecord) -> bool:
        """Begin the job of a fetched record, or write what a record that is not a valid job owes.

        Returns False for a record that has to be fetched again later, because there is no room for its job.
        """
        size = len(record.value or b"")
        if self._held_bytes and self._held_bytes + size > self._max_held_bytes:
            self._is_full = True
            return False
        progress, offset = partition.committer.progress, record.at.offset
        deliveries = progress.begin(offset)
        if not deliveries:
            self._duplicates.remember(partition.recent_ids, record)
            self._observer.record_skipped(record.topic_partition)
        elif record.value is None and record.unreadable is None:
            partition.committer.finish(offset, ())
            self._observer.tombstone_skipped(record.topic_partition)
        elif not self._decide(partition, record, deliveries):
            progress.give_back([offset])
            return False
        return True

    def cancel(self, job_id: str, timestamp: int, reason: str) -> None:
        """Cancel the job with this id that was submitted before `timestamp` (in ms), now or when it arrives."""
        self._cancels.note(job_id, timestamp, reason)
        effect: CancelEffect = "no_open_job"
        for delivery in self._deliveries.get(job_id, ()):
            effect = "too_early" if effect == "no_open_job" else effect
            if (found := self._cancels.reason_for(delivery.job)) is not None:
                delivery.cancel(found)
                effect = "cancelled"
        self._observer.cancel_received(job_id, effect)

    def _decide(self, partition: AssignedPartition, record: ConsumerRecord, deliveries: int) -> bool:
        """Begin or refuse a record's job; return False if its upstream has no room for another job."""
        try:
            decision = self._intake.take(record, deliveries)
        except StreamworkerError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug, which one record may trigger
            self._retry_intake(partition, record, deliveries, error)
            return True
        if not isinstance(decision, Accepted):
            if decision.code is ErrorCode.MAX_DELIVERIES:  # the job was valid, and has run
                self._duplicates.check(
                    partition.recent_ids, record, decision.rejection.job_id, has_begun=True
                )
            self._refuse(partition, record, decision)
            return True
        earlier = self._duplicates.check(
            partition.recent_ids, record, decision.job.job_id, has_begun=deliveries > 1
        )
        if earlier is not None:
            partition.committer.finish(record.at.offset, ())
            decision.span.abandoned("duplicate")
            self._observer.duplicate_skipped(decision.job, earlier)
            return True
        upstream = decision.upstreams[0]
        if self._waiting_at(upstream) >= self._max_waiting_per_upstream:
            self._blocked[record.topic_partition] = upstream
            return False
        self._begin(partition, record, decision, deliveries)
        return True

    def _retry_intake(
        self, partition: AssignedPartition, record: ConsumerRecord, deliveries: int, error: Exception
    ) -> None:
        """Deliver a record again whose reading raised an exception, which is a bug; give it up in the end."""
        log.error("intake.crashed", at=str(record.at), exc_info=without_message(error))
        partition.committer.progress.count(record.at.offset)
        if deliveries >= self._intake.max_deliveries:
            self._refuse(partition, record, self._intake.give_up_unread(record))
            return

        def again() -> None:
            if partition.is_active:
                self._decide(partition, record, deliveries + 1)

        asyncio.get_running_loop().call_later(_CRASH_BACKOFF_S, again)

    def _waiting_at(self, upstream: str) -> int:
        return self._open_at.get(upstream, 0) - self._tools.queues.queues[upstream].in_flight

    def _begin(
        self, partition: AssignedPartition, record: ConsumerRecord, accepted: Accepted, deliveries: int
    ) -> None:
        upstream, size = accepted.upstreams[0], len(record.value or b"")

        def ended() -> None:
            self.open -= 1
            self._open_at[upstream] -= 1
            self._held_bytes -= size
            self.held_bytes_of[record.at.topic] -= size
            self._is_full &= self._held_bytes > 3 * self._max_held_bytes // 4
            self.open_of[record.at.topic] -= 1
            self._on_room()
            accepted.span.abandoned(
                partition.leaving
            )  # counts for a job whose task was cancelled before it ran

        turn: AbstractAsyncContextManager[None] = nullcontext()
        if self._in_key_order and record.key is not None:
            turn = partition.turn(record.key, waits=self._on_room)
        if deliveries > 1:
            turn = self._suspect_turn(turn, deaths=deliveries - 1)
        delivery = self._new_delivery(partition, accepted, deliveries, turn)
        self.open += 1
        self._open_at[upstream] = self._open_at.get(upstream, 0) + 1
        self._held_bytes += size
        self.held_bytes_of[record.at.topic] += size
        self.open_of[record.at.topic] += 1
        partition.run(delivery, self._run(partition, record, delivery, deliveries), ended=ended)

    @asynccontextmanager
    async def _suspect_turn(
        self, turn: AbstractAsyncContextManager[None], *, deaths: int
    ) -> AsyncIterator[None]:
        """Wait before a job whose worker has died while the job ran: it may be what killed the worker.

        After one death the open jobs of that worker start at different times. After `ISOLATED_AFTER` deaths they run
        one after another, so that the next death has one possible cause.
        """
        async with AsyncExitStack() as held:
            await held.enter_async_context(turn)
            self._suspects_waiting += 1
            self._on_room()
            try:
                await asyncio.sleep(uniform(0, SUSPECT_SPREAD_S))  # noqa: S311 - jitter
                if deaths >= ISOLATED_AFTER:
                    await held.enter_async_context(self._isolation)
            finally:
                self._suspects_waiting -= 1
            yield

    def _new_delivery(
        self,
        partition: AssignedPartition,
        accepted: Accepted,
        deliveries: int,
        turn: AbstractAsyncContextManager[None],
    ) -> Delivery:
        cause: Cause = "new" if deliveries == 1 else "redelivered"
        return Delivery(self._tools, accepted, partition.committer, cause=cause, turn=turn)

    def _refuse(self, partition: AssignedPartition, record: ConsumerRecord, refused: Refused) -> None:
        done = partition.committer.finish(record.at.offset, refused.records, fallback=refused.fallback)

        def report(future: asyncio.Future[int | None]) -> None:
            if future.cancelled():
                refused.span.abandoned(partition.leaving)
                return
            self._observer.job_rejected(refused.rejection, refused.code)
            refused.span.refused(refused.code)

        done.add_done_callback(report)

    async def _run(
        self, partition: AssignedPartition, record: ConsumerRecord, delivery: Delivery, deliveries: int
    ) -> None:
        """Run a job until its terminal event is durable.

        An exception is a bug, and the job may be what triggers it: the job is delivered again, and the delivery counts.
        """
        async with HeldTurn() as held:  # over all deliveries of the job
            while True:
                try:
                    return await self._run_cancellable(delivery, held)
                except Exception as error:
                    if delivery.is_finished:  # nothing may run a job again whose terminal event is durable
                        log.error("job.crashed_after_its_end", exc_info=without_message(error))  # noqa: TRY400 - the text may repeat the prompt
                        with suppress(Exception):
                            self._observer.telemetry_failed()
                        return None
                    log.error("job.crashed", job_id=delivery.job.job_id, exc_info=without_message(error))  # noqa: TRY400 - the exception's text may repeat the prompt
                    self._observer.job_crashed(delivery.job)
                    delivery.span.crashed()
                finally:
                    delivery.span.abandoned(partition.leaving)  # nothing happens if the span has ended
                await asyncio.sleep(_CRASH_BACKOFF_S)
                deliveries += 1
                decision = self._intake.take(record, deliveries)
                if not isinstance(decision, Accepted):
                    return self._refuse(partition, record, decision)
                delivery = self._new_delivery(partition, decision, deliveries, nullcontext())
                partition.replace(delivery)

    async def _run_cancellable(self, delivery: Delivery, held: HeldTurn) -> None:
        """Run a delivery where `cancel` finds it; apply a cancel record that arrived before the job."""
        job = delivery.job
        if (reason := self._cancels.reason_for(job)) is not None:
            delivery.cancel(reason)
        running = self._deliveries.setdefault(job.job_id, set())
        running.add(delivery)
        try:
            await delivery.run(held)
        finally:
            running.discard(delivery)
            if not running:
                self._deliveries.pop(job.job_id, None)
