"""Commit a partition's progress in transactions (`delivery = "exactly_once"`).

There is one transactional producer *per job partition*: aiokafka sends `TxnOffsetCommit` v0, which carries no group
generation, so a broker cannot fence a zombie by membership (KIP-447). It can by transactional id (KIP-98): the next
owner of the partition initialises the same id, and from then on the broker refuses the former owner.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import Fenced, KafkaError, KafkaUnavailable, MetadataTooLarge, RecordTooLarge
from streamworker.kafka.acls import RequiredAcls, transactional_id
from streamworker.kafka.clients import close_producer, new_transactional_producer, start_producer
from streamworker.kafka.errors import translate_errors
from streamworker.log_throttle import OutageLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import Settings
    from streamworker.kafka.clients import Producer
    from streamworker.kafka.committed_offsets import CommittedOffsets
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStore

__all__ = ["TransactionalCommitStores"]

TRANSACTION_TIMEOUT_S = 10.0
"""How long the open transaction of a dead worker can hold back read_committed readers."""

_CLOSE_TIMEOUT_S = 2.0
_BACKOFF_S = 0.1


class TransactionalCommitStores:
    """Creates one transactional store per assigned partition."""

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
        self._acls = RequiredAcls.of_worker(settings)

    @property
    def metadata_limit(self) -> int:
        """Bytes of metadata that a commit may have."""
        return self._committed.metadata_limit

    def store(self, partition: TopicPartition) -> CommitStore:
        """Return a new store, not opened."""
        return _TransactionalCommitStore(
            self._settings, self._committed, self._consumer, partition, self._observer, self._acls
        )


class _TransactionalCommitStore:
    def __init__(
        self,
        settings: Settings,
        committed: CommittedOffsets,
        consumer: GroupConsumer,
        partition: TopicPartition,
        observer: Observer | None,
        acls: RequiredAcls,
    ) -> None:
        self._settings = settings
        self._committed = committed
        self._consumer = consumer
        self._partition = partition
        self._observer = observer
        self._acls = acls
        self._outage_log = OutageLog("commit.recovered", partition=str(partition))
        self._id = transactional_id(settings.worker.group_id, partition.topic, partition.partition)
        self._producer: Producer | None = None
        self._last: CommitPoint | None = None
        self._offsets: Sequence[int | None] = ()
        """The offsets of the records of the latest transaction."""

    async def open(self) -> CommitPoint:
        """Fence the former owner, read the committed offset, and commit the first offset if none was. Raises KafkaError.

        An offset that was read before the fence may be older than the former owner's last commit. The membership is
        confirmed before and after: a worker that was suspended past its session must not fence the new owner when it
        resumes, and must not begin any job.
        """
        await self._confirm_membership()
        await self.close()  # a producer that an earlier call may have left
        await self._fence()
        self._last = await self._committed.read(self._partition)
        start = await self._committed.start_point(self._partition, self._last)
        await self._confirm_membership()
        if start != self._last:  # so that a partition without jobs differs from one whose offset expired
            await self.commit([], start)
        return start

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> Sequence[int | None]:
        """Write the records and the offset in one transaction; retry until it is committed. Return the records' offsets.

        Raises:
            Fenced: another worker owns the partition.
            RecordTooLarge: the broker refuses one of the records, or all of them at once; nothing was committed.
            MetadataTooLarge: the broker refuses the point's metadata; nothing was committed.
        """
        while True:
            try:
                await self._transaction(records, point)
                break
            except KafkaError as error:
                # Fenced too: a broker that was away for too long aborts our transaction, and then refuses its producer.
                self._failed("commit.transaction_failed", error)
                if await self._recover(point):
                    break
                if isinstance(error, RecordTooLarge | MetadataTooLarge):
                    raise
        self._last = point
        self._outage_log.worked()
        return self._offsets

    async def close(self) -> None:
        """Close the producer. Bounded in time; never raises."""
        producer, self._producer = self._producer, None
        await close_producer(producer, _CLOSE_TIMEOUT_S)

    async def _transaction(self, records: Sequence[ProducerRecord], point: CommitPoint) -> None:
        producer = self._producer
        if producer is None:
            raise KafkaUnavailable(f"the producer of {self._partition} is not open")
        written: list[asyncio.Future[Any]] = []
        with translate_errors(f"committing {self._partition}", self._acls):
            try:
                await _begin(producer)
                for record in records:
                    written.append(await _send(producer, record))  # noqa: PERF401 - a failure keeps the earlier ones
                offsets = {KafkaTopicPartition(*self._partition): OffsetAndMetadata(*point)}
                await producer.send_offsets_to_transaction(offsets, self._settings.worker.group_id)
                metadata = await asyncio.gather(*written)
                # Kept also if the commit below fails: it may turn out to have succeeded.
                self._offsets = [one.offset if one.offset >= 0 else None for one in metadata]
                await producer.commit_transaction()
            finally:  # after a failure they are not awaited; the next producer's InitProducerId aborts the transaction
                for future in written:
                    future.add_done_callback(_retrieve_exception)

    async def _recover(self, point: CommitPoint) -> bool:
        """Open a new producer after a failure; return whether the failed transaction turns out to be committed.

        The failed producer cannot be used again (aiokafka #1017). The new one fences every other producer of the
        transactional id, so only a member of the group may create it. Afterwards the committed offset must be our last one or
        `point`. If it is another one, another worker owned the partition in between, and this worker is the zombie.
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
        raise Fenced(f"{self._partition}: this worker is not a member of the group any more")

    def _failed(self, event: str, error: KafkaError) -> None:
        self._outage_log.failed(event, asyncio.get_running_loop().time(), reason=str(error))
        if self._observer is not None:
            self._observer.kafka_failed("commit")

    async def _confirm_membership(self) -> None:
        if not await self._consumer.confirm_membership():
            raise KafkaUnavailable("this worker is not a member of the group now")

    async def _fence(self) -> None:
        """Open a producer. Its InitProducerId aborts the former owner's open transaction and fences its producer."""
        producer = new_transactional_producer(self._settings.kafka, self._id, TRANSACTION_TIMEOUT_S)
        try:
            with translate_errors(f"fencing {self._partition} (transactional id {self._id})", self._acls):
                await start_producer(producer, self._settings.kafka.request_timeout_s)
        except BaseException:
            await close_producer(producer, _CLOSE_TIMEOUT_S)
            raise
        self._producer = producer


async def _begin(producer: Producer) -> None:
    try:
        await producer.begin_transaction()
    except AssertionError as error:  # aiokafka checks the producer's state by assert
        raise ForeignKafkaError(f"the producer cannot begin a transaction: {error}") from error


def _retrieve_exception(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


async def _send(producer: Producer, record: ProducerRecord) -> asyncio.Future[Any]:
    return await producer.send(
        record.topic_partition.topic,
        record.value,
        key=record.key,
        partition=record.topic_partition.partition,
        headers=list(record.headers),
    )
