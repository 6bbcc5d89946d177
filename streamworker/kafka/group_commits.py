"""Commit a partition's progress by the consumer group's offset commits (`delivery = "at_least_once"`)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import structlog

from streamworker.errors import KafkaError, MetadataTooLarge, RecordTooLarge
from streamworker.redaction import without_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import Settings
    from streamworker.kafka.committed_offsets import CommittedOffsets
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStore, Sink

__all__ = ["GroupCommitStores"]

_REBALANCE_TIMEOUT_S = 2.0
"""How long a rebalance waits for the last commit of its generation."""

_STOP_TIMEOUT_S = 10.0
_STOP_RETRY_S = 0.1

log = structlog.get_logger()


class GroupCommitStores:
    """Creates stores that publish through the sink; commits their offsets on a timer, before rebalances and at the end."""

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
        self._points: dict[TopicPartition, _Uncommitted] = {}
        self._refused: set[TopicPartition] = set()  # their metadata may be what a commit was refused for
        self._committing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Commit every `commit_interval_s`, and before each rebalance."""
        self._task = asyncio.create_task(self._commit_regularly())
        self._consumer.before_rebalance = self._commit_soon
        self._consumer.uncommitted = lambda: self._points

    async def stop(self) -> None:
        """Commit the remaining offsets. Bounded in time.

        A commit is refused while the group rebalances; what is not committed here is run again by the next owner.
        """
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._commit()
                while self._points:
                    await asyncio.sleep(_STOP_RETRY_S)
                    await self._commit()
        self._consumer.before_rebalance = None

    @property
    def metadata_limit(self) -> int:
        """Bytes of metadata that a commit may have."""
        return self._committed.metadata_limit

    def store(self, partition: TopicPartition) -> CommitStore:
        """Return a new store, not opened."""
        return _GroupCommitStore(self, partition, self._consumer)

    async def open(self, partition: TopicPartition, epoch: object) -> CommitPoint:
        """Return where to begin a partition; commit it with the next timer if it is not committed. Raises KafkaError."""
        committed = await self._committed.read(partition)
        start = await self._committed.start_point(partition, committed)
        if start != committed:
            self._points[partition] = _Uncommitted(epoch, start)
        return start

    async def write(
        self,
        partition: TopicPartition,
        epoch: object,
        records: Sequence[ProducerRecord],
        point: CommitPoint,
        written: dict[int, tuple[ProducerRecord, int | None]],
    ) -> list[int | None]:
        """Publish the records that are not in `written`, wait for them, then mark the point as ready to commit.

        `written` maps `id(record)` to the records of an earlier call that were acknowledged and their offsets, and is
        updated: a commit that is refused is repeated in parts. Returns the offsets of the records. Raises RecordTooLarge
        if the broker refused a record, and MetadataTooLarge if it refused the metadata of an earlier point.
        """
        if partition in self._refused:
            self._refused.remove(partition)
            raise MetadataTooLarge(f"{partition}: the broker refused the metadata of an earlier commit")
        unwritten = [(record, self._sink.receipt()) for record in records if id(record) not in written]
        for record, receipt in unwritten:
            self._sink.publish(record, receipt)
        refusal: RecordTooLarge | None = None
        for record, receipt in unwritten:
            try:
                await receipt.settled()
            except RecordTooLarge as error:
                refusal = error
            else:
                written[id(record)] = record, receipt.offset
        if refusal is not None:
            raise refusal
        offsets = [written.pop(id(record))[1] for record in records]
        self._points[partition] = _Uncommitted(epoch, point)
        return offsets

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._commit()

    async def _commit_soon(self) -> None:
        with suppress(TimeoutError):
            # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(_REBALANCE_TIMEOUT_S):
                await self._commit()

    async def _commit(self) -> None:
        """Commit the points of the current ownership epochs.

        A point of an earlier epoch is dropped: another worker may have owned the partition and committed in between.
        """
        async with self._committing:
            self._points = {
                partition: uncommitted
                for partition, uncommitted in self._points.items()
                if uncommitted.epoch is self._consumer.epoch(partition)
            }
            points = dict(self._points)
            if not points:
                return
            try:
                is_committed = await self._consumer.commit(
                    {partition: point for partition, (_, point) in points.items()}
                )
            except KafkaError as error:
                if isinstance(error, MetadataTooLarge):  # the error does not name the partition
                    self._refused |= {partition for partition, (_, point) in points.items() if point.metadata}
                log.warning("offsets.commit_failed", reason=str(error))
                self._count_failure()
                return
            except Exception as error:  # a bug, which must not end the commits of the process
                log.error("offsets.commit_crashed", exc_info=without_message(error))  # noqa: TRY400 - without the exception's text
                self._count_failure()
                return
            if is_committed:
                self._points = {
                    partition: later
                    for partition, later in self._points.items()
                    if later is not points.get(partition)
                }

    def _count_failure(self) -> None:
        if self._observer is not None:
            self._observer.kafka_failed("commit")


class _Uncommitted(NamedTuple):
    """A point that may be committed, and the ownership epoch of its partition."""

    epoch: object
    point: CommitPoint


class _GroupCommitStore:
    def __init__(self, stores: GroupCommitStores, partition: TopicPartition, consumer: GroupConsumer) -> None:
        self._stores = stores
        self._partition = partition
        self._epoch = consumer.epoch(partition)
        self._written: dict[int, tuple[ProducerRecord, int | None]] = {}  # see GroupCommitStores.write

    async def open(self) -> CommitPoint:
        """Read the committed offset. Without transactions a former owner cannot be fenced. Raises KafkaError."""
        return await self._stores.open(self._partition, self._epoch)

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> Sequence[int | None]:
        """Publish the records; the offset is committed by the timer. Return their offsets. Raises RecordTooLarge."""
        return await self._stores.write(self._partition, self._epoch, records, point, self._written)

    async def close(self) -> None:
        """Release nothing: the offset is committed as long as the ownership epoch lasts, and not after it."""
