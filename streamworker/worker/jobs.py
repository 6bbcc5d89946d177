"""The open jobs of a worker: records are accepted, run until their terminal events, and cancelled by their ids."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, nullcontext
from typing import TYPE_CHECKING

import structlog

from streamworker.redaction import without_message
from streamworker.worker.cancellations import Cancellations
from streamworker.worker.delivery import Delivery
from streamworker.worker.intake import Accepted

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from streamworker.model import Cause, ConsumerRecord
    from streamworker.worker.intake import Intake, Refused
    from streamworker.worker.partition import AssignedPartition
    from streamworker.worker.runner import Tools

__all__ = ["Jobs"]

_CRASH_BACKOFF_S = 1.0

log = structlog.get_logger()


class Jobs:
    """The open jobs. `on_room` is called when another record may be accepted."""

    def __init__(
        self, tools: Tools, intake: Intake, *, in_key_order: bool, on_room: Callable[[], None]
    ) -> None:
        """With `in_key_order`, the jobs of one record key run one after another."""
        self.open = 0
        """Jobs that were accepted and have not ended."""
        self._tools = tools
        self._observer = tools.observer
        self._intake = intake
        self._in_key_order = in_key_order
        self._on_room = on_room
        self._cancels = Cancellations()
        self._deliveries: dict[str, set[Delivery]] = {}

    def accept(self, partition: AssignedPartition, record: ConsumerRecord) -> None:
        """Begin the job of a fetched record, or write what a record that is not a valid job owes."""
        offset = record.at.offset
        deliveries = partition.committer.progress.begin(offset)
        if not deliveries:
            self._observer.record_skipped(record.topic_partition)
        elif record.value is None and record.unreadable is None:
            partition.committer.finish(offset, ())
            self._observer.tombstone_skipped(record.topic_partition)
        else:
            decision = self._intake.take(record, deliveries)
            if isinstance(decision, Accepted):
                self._begin(partition, record, decision, deliveries)
            else:
                self._refuse(partition, record, decision)

    def cancel(self, job_id: str, timestamp: int, reason: str) -> None:
        """Cancel jobs with this id that were submitted at or before `timestamp`, now or when they arrive."""
        self._cancels.note(job_id, timestamp, reason)
        for delivery in self._deliveries.get(job_id, ()):
            if delivery.job.timestamp <= timestamp:
                delivery.cancel(reason)

    def _begin(
        self, partition: AssignedPartition, record: ConsumerRecord, accepted: Accepted, deliveries: int
    ) -> None:
        def ended() -> None:
            self.open -= 1
            self._on_room()
            accepted.span.abandoned(
                partition.leaving
            )  # counts for a job whose task was cancelled before it ran

        turn: AbstractAsyncContextManager[None] = nullcontext()
        if self._in_key_order and record.key is not None:
            turn = partition.turn(record.key, waits=self._on_room)
        delivery = self._new_delivery(partition, accepted, deliveries, turn)
        self.open += 1
        partition.run(delivery, self._run(partition, record, delivery, deliveries), ended=ended)

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

        def report(future: asyncio.Future[None]) -> None:
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
        async with AsyncExitStack() as held:  # the job's turn is held over all deliveries
            while True:
                try:
                    return await self._run_cancellable(delivery, held)
                except Exception as error:
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

    async def _run_cancellable(self, delivery: Delivery, held: AsyncExitStack) -> None:
        """Run a delivery where `cancel` finds it; apply a cancel record that arrived before the job."""
        job = delivery.job
        if (reason := self._cancels.reason_for(job.job_id, job.timestamp)) is not None:
            delivery.cancel(reason)
        running = self._deliveries.setdefault(job.job_id, set())
        running.add(delivery)
        try:
            await delivery.run(held)
        finally:
            running.discard(delivery)
            if not running:
                self._deliveries.pop(job.job_id, None)
