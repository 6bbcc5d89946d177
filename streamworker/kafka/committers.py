"""How a partition's progress becomes durable: in transactions (exactly once), or by the group's commits (at least once).

Exactly once, why a transactional producer *per job partition*: aiokafka sends `TxnOffsetCommit` v0, which carries no
group generation, so a broker cannot fence a zombie by membership (KIP-447). It can by transactional id (KIP-98):
whoever is assigned the partition next initialises the same id, and from then on the former owner is refused.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import Fenced, KafkaError, KafkaUnavailable, RecordTooLarge
from streamworker.kafka.connection import adopt, client_arguments, close_producer
from streamworker.kafka.errors import foreign_errors_as_ours
from streamworker.kafka.outage import Outage
from streamworker.kafka.rights import transactional_id
from streamworker.kafka.sink import producer_arguments
from streamworker.model import CommitPoint, Partition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import Settings
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import Outgoing
    from streamworker.ports import Committer, Observer, Sink

__all__ = ["CommittedOffsets", "GroupCommitters", "TransactionalCommitters"]

TRANSACTION_TIMEOUT_S = 10.0
"""How long a worker that dies inside a transaction can hold read_committed readers back."""

CLOSE_TIMEOUT_S = 2.0
_BACKOFF_S = 0.1

log = structlog.get_logger()


class CommittedOffsets:
    """Reads what the group has committed, metadata included, which `consumer.committed()` leaves out."""

    def __init__(self, settings: Settings, consumer: GroupConsumer) -> None:
        self._settings = settings
        self._consumer = consumer
        self._admin: Any = None

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        self._admin = AIOKafkaAdminClient(**client_arguments(self._settings.kafka))
        adopt(self._admin._client, self._settings.kafka)  # noqa: SLF001 - it has no public name
        with foreign_errors_as_ours(f"connecting to {self._settings.kafka.bootstrap_servers}"):
            await self._admin.start()

    async def stop(self) -> None:
        """Let go."""
        if self._admin is not None:
            with suppress(ForeignKafkaError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._admin.close()

    async def read(self, partition: Partition) -> CommitPoint:
        """Return what is committed for a partition; the log's beginning if nothing is. Raises KafkaError."""
        topic_partition = TopicPartition(*partition)
        with foreign_errors_as_ours(f"reading the committed offset of {partition}"):
            offsets = await self._admin.list_consumer_group_offsets(
                self._settings.worker.group_id, partitions=[topic_partition]
            )
        found = offsets.get(topic_partition)
        if found is None:
            # What was asked for is answered, with -1 if nothing is committed. aiokafka does not look at the error of the
            # whole answer (a coordinator that is still loading), and then this partition is simply not in it.
            raise KafkaUnavailable(
                f"the group's coordinator does not tell the committed offset of {partition}"
            )
        if found.offset < 0:
            return CommitPoint(await self._consumer.beginning(partition))
        return CommitPoint(found.offset, found.metadata or "")


class TransactionalCommitters:
    """Exactly once: one transactional producer per assigned partition."""

    def __init__(
        self,
        settings: Settings,
        committed: CommittedOffsets,
        consumer: GroupConsumer,
        observer: Observer | None = None,
    ) -> None:
        self._settings = settings
        self._committed = committed
        self._consumer = consumer
        self._observer = observer

    def committer(self, partition: Partition) -> Committer:
        """Return a new committer, not opened."""
        return _TransactionalCommitter(
            self._settings, self._committed, self._consumer, partition, self._observer
        )


class _TransactionalCommitter:
    def __init__(
        self,
        settings: Settings,
        committed: CommittedOffsets,
        consumer: GroupConsumer,
        partition: Partition,
        observer: Observer | None,
    ) -> None:
        self._settings = settings
        self._committed = committed
        self._consumer = consumer
        self._partition = partition
        self._observer = observer
        self._outage = Outage("lane.recovered", partition=str(partition))
        self._id = transactional_id(settings.worker.group_id, partition.topic, partition.partition)
        self._producer: Any = None
        self._last: CommitPoint | None = None

    async def open(self) -> CommitPoint:
        """Fence, then read: an offset read before the fence may be older than the former owner's last commit.

        Asked for our membership before and after: who sleeps in here past its session must not shut out the new owner
        when it wakes, and if it did, must not begin anything.
        """
        await self._confirm_membership()
        await self.close()  # an earlier try may have come as far as the fence
        await self._fence()
        self._last = await self._committed.read(self._partition)
        await self._confirm_membership()
        return self._last

    async def commit(self, records: Sequence[Outgoing], point: CommitPoint) -> None:
        """Write all or nothing. Raises Fenced, RecordTooLarge; what may pass by itself is retried here."""
        while True:
            try:
                await self._transaction(records, point)
                break
            except KafkaError as error:
                # Even Fenced asks first: a broker that was away too long has ended our transaction by itself.
                self._failed("lane.transaction_failed", error)
                if await self._recover(point):
                    break
                if isinstance(error, RecordTooLarge):
                    raise
        self._last = point
        self._outage.worked()

    async def close(self) -> None:
        """Let go. Bounded in time; never raises."""
        producer, self._producer = self._producer, None
        await close_producer(producer, CLOSE_TIMEOUT_S)

    async def _transaction(self, records: Sequence[Outgoing], point: CommitPoint) -> None:
        producer = self._producer
        assert producer is not None, "the committer is not open"
        written: list[asyncio.Future[Any]] = []
        with foreign_errors_as_ours(f"committing {self._partition}"):
            try:
                await _begin(producer)
                for record in records:
                    written.append(await _send(producer, record))  # noqa: PERF401 - those before a failure count too
                offsets = {TopicPartition(*self._partition): OffsetAndMetadata(*point)}
                await producer.send_offsets_to_transaction(offsets, self._settings.worker.group_id)
                await asyncio.gather(*written)
                await producer.commit_transaction()
            finally:  # after a failure nobody else asks them; the next producer's InitProducerId aborts what is open
                for future in written:
                    future.add_done_callback(_forget)

    async def _recover(self, point: CommitPoint) -> bool:
        """Get a new producer after a failure; True if the failed transaction turns out to be committed.

        A failed batch leaves aiokafka's producer without its place in the sequence, so the producer is done for. A new
        one fences whoever holds the id. Only a member of the group may do that, and only what we ourselves committed
        last may lie in the log afterwards; else another worker was here in between and this one is the zombie.
        """
        while True:
            await self.close()
            await asyncio.sleep(_BACKOFF_S)
            try:
                if not await self._consumer.confirm_membership():
                    break
                await self._fence()
                found = await self._committed.read(self._partition)
            except KafkaError as error:
                self._failed("lane.unavailable", error)
                continue
            if found not in {self._last, point}:
                raise Fenced(f"{self._partition}: another worker has committed")
            return found == point
        raise Fenced(f"{self._partition}: no member of the group any more")

    def _failed(self, event: str, error: KafkaError) -> None:
        self._outage.failed(event, asyncio.get_running_loop().time(), reason=str(error))
        if self._observer is not None:
            self._observer.kafka_failed("lane")

    async def _confirm_membership(self) -> None:
        if not await self._consumer.confirm_membership():
            raise KafkaUnavailable("no member of the group now")

    async def _fence(self) -> None:
        producer = AIOKafkaProducer(
            **producer_arguments(self._settings.kafka),
            transactional_id=self._id,
            transaction_timeout_ms=round(TRANSACTION_TIMEOUT_S * 1000),
        )
        adopt(producer.client, self._settings.kafka)
        try:
            with foreign_errors_as_ours(f"taking over {self._partition} (transactional id {self._id})"):
                await producer.start()  # InitProducerId: it also ends the former owner's open transaction
        except BaseException:
            await close_producer(producer, CLOSE_TIMEOUT_S)
            raise
        self._producer = producer


async def _begin(producer: Any) -> None:
    try:
        await producer.begin_transaction()
    except AssertionError as error:  # aiokafka guards its states with assert
        raise ForeignKafkaError(f"the producer cannot begin a transaction: {error}") from error


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


async def _send(producer: Any, record: Outgoing) -> Any:
    return await producer.send(
        record.to.topic,
        record.value,
        key=record.key,
        partition=record.to.partition,
        headers=list(record.headers),
    )


class GroupCommitters:
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
        self._points: dict[Partition, _Owed] = {}
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

    def committer(self, partition: Partition) -> Committer:
        """Return a new committer, not opened."""
        return _GroupCommitter(self, partition, self._consumer)

    async def read(self, partition: Partition) -> CommitPoint:
        """Return what is committed for a partition."""
        return await self._committed.read(partition)

    async def write(
        self,
        partition: Partition,
        tenure: object,
        records: Sequence[Outgoing],
        point: CommitPoint,
        written: dict[int, Outgoing],
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
        self._points[partition] = _Owed(tenure, point)

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._commit()

    async def _commit_soon(self) -> None:
        with suppress(TimeoutError):
            # Not wait_for, here and elsewhere: before Python 3.12 it can swallow a cancellation.
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._commit()

    async def _commit(self) -> None:
        """Commit what is owed. Never for what is not ours any more, or was not in between: another may be further."""
        async with self._committing:
            self._points = {
                partition: owed
                for partition, owed in self._points.items()
                if owed.tenure is self._consumer.tenure(partition)
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
                    self._observer.kafka_failed("lane")
                return
            if is_committed:
                self._points = {
                    partition: later
                    for partition, later in self._points.items()
                    if later is not owed.get(partition)
                }


class _Owed(NamedTuple):
    """What may be committed, and the tenure in which it came about."""

    tenure: object
    point: CommitPoint


class _GroupCommitter:
    def __init__(self, committers: GroupCommitters, partition: Partition, consumer: GroupConsumer) -> None:
        self._committers = committers
        self._partition = partition
        self._tenure = consumer.tenure(partition)
        self._written: dict[int, Outgoing] = {}  # of a commit of which one record was refused: it comes again

    async def open(self) -> CommitPoint:
        """Read what is committed; nobody can be shut out without transactions."""
        return await self._committers.read(self._partition)

    async def commit(self, records: Sequence[Outgoing], point: CommitPoint) -> None:
        """Publish; the offset follows on the timer. Raises RecordTooLarge."""
        await self._committers.write(self._partition, self._tenure, records, point, self._written)

    async def close(self) -> None:
        """Nothing: what is owed is committed as long as the partition is ours, and no longer."""
