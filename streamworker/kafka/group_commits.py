"""Commit a partition's progress by the consumer group's offset commits (`delivery = "at_least_once"`)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import structlog

from streamworker.errors import KafkaError, RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import Settings
    from streamworker.kafka.committed_offsets import CommittedOffsets
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStore, Sink

__all__ = ["GroupCommitStores"]

_LAST_COMMIT_TIMEOUT_S = 2.0

log = structlog.get_logger()


class GroupCommitStores:
    """At least once: events through the sink, offsets by the group's commits, on a timer and at the end."""

    def __init__(
        self,
        settings: Settings,
        committed: CommittedOffsets,
        consumer: GroupConsumer,
        sink: Sink,
        observer: Observer | None = None,
    ) -> None:
        self._interval_s = settings.worker.commit_interval_s
        self._observer = observer
        self._committed = committed
        self._consumer = consumer
        self._sink = sink
        self._points: dict[TopicPartition, _Owed] = {}
        self._committing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to commit on the timer, and whenever partitions may be lost."""
        self._task = asyncio.create_task(self._commit_regularly())
        self._consumer.before_rebalance = self._commit_soon

    async def stop(self) -> None:
        """Commit what is left."""
        self._consumer.before_rebalance = None
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._commit_soon()

    def store(self, partition: TopicPartition) -> CommitStore:
        """Return a new committer, not opened."""
        return _GroupCommitStore(self, partition, self._consumer)

    async def read(self, partition: TopicPartition) -> CommitPoint:
        """Return what is committed for a partition."""
        return await self._committed.read(partition)

    async def write(
        self,
        partition: TopicPartition,
        epoch: object,
        records: Sequence[ProducerRecord],
        point: CommitPoint,
        written: dict[int, ProducerRecord],
    ) -> None:
        """Publish the records that are not `written` yet and wait for them; then the point may be committed."""
        owed = [(record, self._sink.receipt()) for record in records if id(record) not in written]
        for record, receipt in owed:
            self._sink.publish(record, receipt)
        refusal: RecordTooLarge | None = None
        for record, receipt in owed:
            try:
                await receipt.settled()
            except RecordTooLarge as error:
                refusal = error
            else:
                written[id(record)] = record
        if refusal is not None:
            raise refusal
        written.clear()
        self._points[partition] = _Owed(epoch, point)

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._commit()

    async def _commit_soon(self) -> None:
        with suppress(TimeoutError):
            # Not wait_for, here and elsewhere: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(_LAST_COMMIT_TIMEOUT_S):
                await self._commit()

    async def _commit(self) -> None:
        """Commit what is owed. Never for what is not ours any more, or was not in between: another may be further."""
        async with self._committing:
            self._points = {
                partition: owed
                for partition, owed in self._points.items()
                if owed.epoch is self._consumer.epoch(partition)
            }
            owed = dict(self._points)
            if not owed:
                return
            try:
                is_committed = await self._consumer.commit(
                    {partition: point for partition, (_, point) in owed.items()}
                )
            except KafkaError as error:
                log.warning("offsets.commit_failed", reason=str(error))
                if self._observer is not None:
                    self._observer.kafka_failed("commit")
                return
            if is_committed:
                self._points = {
                    partition: later
                    for partition, later in self._points.items()
                    if later is not owed.get(partition)
                }


class _Owed(NamedTuple):
    """What may be committed, and the tenure in which it came about."""

    epoch: object
    point: CommitPoint


class _GroupCommitStore:
    def __init__(
        self, committers: GroupCommitStores, partition: TopicPartition, consumer: GroupConsumer
    ) -> None:
        self._committers = committers
        self._partition = partition
        self._epoch = consumer.epoch(partition)
        self._written: dict[
            int, ProducerRecord
        ] = {}  # of a commit of which one record was refused: it comes again

    async def open(self) -> CommitPoint:
        """Read what is committed; nobody can be shut out without transactions."""
        return await self._committers.read(self._partition)

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> None:
        """Publish; the offset follows on the timer. Raises RecordTooLarge."""
        await self._committers.write(self._partition, self._epoch, records, point, self._written)

    async def close(self) -> None:
        """Nothing: what is owed is committed as long as the partition is ours, and no longer."""
