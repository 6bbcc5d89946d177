"""Commit a partition's progress in transactions (`delivery = "exactly_once"`).

There is one transactional producer *per job partition*: aiokafka sends `TxnOffsetCommit` v0, which carries no group
generation, so a broker cannot fence a zombie by membership (KIP-447). It can by transactional id (KIP-98): the next
owner of the partition initialises the same id, and from then on the broker refuses the former owner.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaProducer
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import Fenced, KafkaError, KafkaUnavailable, RecordTooLarge
from streamworker.kafka.acls import transactional_id
from streamworker.kafka.connection import close_producer, install_client
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.sink import producer_arguments
from streamworker.log_throttle import OutageLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import Settings
    from streamworker.kafka.committed_offsets import CommittedOffsets
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStore

__all__ = ["TransactionalCommitStores"]

TRANSACTION_TIMEOUT_S = 10.0
"""How long a worker that dies inside a transaction can hold read_committed readers back."""

_CLOSE_TIMEOUT_S = 2.0
_BACKOFF_S = 0.1


class TransactionalCommitStores:
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

    def store(self, partition: TopicPartition) -> CommitStore:
        """Return a new committer, not opened."""
        return _TransactionalCommitStore(
            self._settings, self._committed, self._consumer, partition, self._observer
        )


class _TransactionalCommitStore:
    def __init__(
        self,
        settings: Settings,
        committed: CommittedOffsets,
        consumer: GroupConsumer,
        partition: TopicPartition,
        observer: Observer | None,
    ) -> None:
        self._settings = settings
        self._committed = committed
        self._consumer = consumer
        self._partition = partition
        self._observer = observer
        self._outage_log = OutageLog("commit.recovered", partition=str(partition))
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

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> None:
        """Write all or nothing. Raises Fenced, RecordTooLarge; what may pass by itself is retried here."""
        while True:
            try:
                await self._transaction(records, point)
                break
            except KafkaError as error:
                # Even Fenced asks first: a broker that was away too long has ended our transaction by itself.
                self._failed("commit.transaction_failed", error)
                if await self._recover(point):
                    break
                if isinstance(error, RecordTooLarge):
                    raise
        self._last = point
        self._outage_log.worked()

    async def close(self) -> None:
        """Let go. Bounded in time; never raises."""
        producer, self._producer = self._producer, None
        await close_producer(producer, _CLOSE_TIMEOUT_S)

    async def _transaction(self, records: Sequence[ProducerRecord], point: CommitPoint) -> None:
        producer = self._producer
        assert producer is not None, "the committer is not open"
        written: list[asyncio.Future[Any]] = []
        with translate_errors(f"committing {self._partition}"):
            try:
                await _begin(producer)
                for record in records:
                    written.append(await _send(producer, record))  # noqa: PERF401 - those before a failure count too
                offsets = {KafkaTopicPartition(*self._partition): OffsetAndMetadata(*point)}
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
                self._failed("commit.unavailable", error)
                continue
            if found not in {self._last, point}:
                raise Fenced(f"{self._partition}: another worker has committed")
            return found == point
        raise Fenced(f"{self._partition}: no member of the group any more")

    def _failed(self, event: str, error: KafkaError) -> None:
        self._outage_log.failed(event, asyncio.get_running_loop().time(), reason=str(error))
        if self._observer is not None:
            self._observer.kafka_failed("commit")

    async def _confirm_membership(self) -> None:
        if not await self._consumer.confirm_membership():
            raise KafkaUnavailable("no member of the group now")

    async def _fence(self) -> None:
        producer = AIOKafkaProducer(
            **producer_arguments(self._settings.kafka),
            transactional_id=self._id,
            transaction_timeout_ms=round(TRANSACTION_TIMEOUT_S * 1000),
        )
        install_client(producer.client, self._settings.kafka)
        try:
            with translate_errors(f"taking over {self._partition} (transactional id {self._id})"):
                await producer.start()  # InitProducerId: it also ends the former owner's open transaction
        except BaseException:
            await close_producer(producer, _CLOSE_TIMEOUT_S)
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


async def _send(producer: Any, record: ProducerRecord) -> Any:
    return await producer.send(
        record.topic_partition.topic,
        record.value,
        key=record.key,
        partition=record.topic_partition.partition,
        headers=list(record.headers),
    )
