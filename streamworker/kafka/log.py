"""Read a topic from its beginning, without a consumer group: for `tail`, `audit`, `dlq`, and the control topic."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import CorruptRecordException

from streamworker.errors import KafkaRefused
from streamworker.kafka.clients import Consumer, close_consumer, new_consumer, record_of
from streamworker.kafka.compat import fetch_all_metadata
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.partitioner import partition_of
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.model import ConsumerRecord

__all__ = ["LogReader", "open_log"]

_POLL_MS = 500
_POLL_RECORDS = 2000
_STOP_TIMEOUT_S = 2.0
_SEEK_DISTANCE = 1000
"""A wanted record that is further away than this is reached by a seek, a nearer one by reading."""


class LogReader:
    """Reads partitions of one topic in order."""

    def __init__(
        self, consumer: Consumer, topic: str, partitions: Sequence[int], acls: RequiredAcls | None = None
    ) -> None:
        self.consumer = consumer
        self._topic = topic
        self._acls = acls
        self.partitions = tuple(partitions)

    def partition_for(self, key: bytes) -> TopicPartition:
        """Return the partition that holds a key."""
        return TopicPartition(self._topic, partition_of(key, len(self.partitions)))

    async def follow(
        self, partitions: Sequence[TopicPartition], *, from_end: bool = False
    ) -> AsyncIterator[ConsumerRecord]:
        """Yield the records of these partitions, and wait for new ones without end. Raises KafkaError."""
        await self._assign(partitions, from_end=from_end)
        while True:
            for record in await self._fetch():
                yield record

    async def snapshot(self, partitions: Sequence[TopicPartition]) -> AsyncIterator[ConsumerRecord]:
        """Yield the records that these partitions hold now, then stop. Raises KafkaError."""
        await self._assign(partitions, from_end=False)
        assigned = [KafkaTopicPartition(*partition) for partition in partitions]
        with translate_errors(f"reading the end offsets of {self._topic}", self._acls):
            ends = await self.consumer.end_offsets(assigned)
        while any([await self.consumer.position(at) < end for at, end in ends.items()]):
            for record in await self._fetch():
                if record.at.offset < ends[KafkaTopicPartition(*record.topic_partition)]:
                    yield record

    async def at(self, partition: TopicPartition, offsets: Iterable[int]) -> AsyncIterator[ConsumerRecord]:
        """Yield those of the records at `offsets` that the partition still holds, in order. Raises KafkaError."""
        at = KafkaTopicPartition(*partition)
        self.consumer.assign([at])
        with translate_errors(f"reading the offsets of {self._topic}", self._acls):
            begin = (await self.consumer.beginning_offsets([at]))[at]
            end = (await self.consumer.end_offsets([at]))[at]
        buffer: deque[ConsumerRecord] = deque()
        position = -1 - _SEEK_DISTANCE  # of the first record behind the buffer; the first read needs a seek
        for offset in sorted(offset for offset in set(offsets) if begin <= offset < end):
            while buffer and buffer[0].at.offset < offset:
                buffer.popleft()
            if not buffer and offset > position + _SEEK_DISTANCE:
                self.consumer.seek(at, offset)
                position = offset
            while position <= offset and not buffer:
                buffer.extend(record for record in await self._fetch() if record.at.offset >= offset)
                position = await self.consumer.position(at)
            if buffer and buffer[0].at.offset == offset:
                yield buffer.popleft()

    async def _assign(self, partitions: Sequence[TopicPartition], *, from_end: bool) -> None:
        assigned = [KafkaTopicPartition(*partition) for partition in partitions]
        self.consumer.assign(assigned)
        with translate_errors(f"reading {self._topic}", self._acls):
            await (self.consumer.seek_to_end if from_end else self.consumer.seek_to_beginning)(*assigned)

    async def _fetch(self) -> list[ConsumerRecord]:
        with translate_errors(f"reading {self._topic}", self._acls):
            try:
                fetched = await self.consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
            except (
                UnicodeDecodeError
            ) as error:  # raised by aiokafka's C code for a header name that is not UTF-8
                raise CorruptRecordException(str(error)) from error
        await asyncio.sleep(0)  # reading a long log from the consumer's buffer must not block other tasks
        return [record_of(record) for batch in fetched.values() for record in batch]


@asynccontextmanager
async def open_log(
    settings: KafkaSettings, topic: str, *, committed_only: bool = True, acls: RequiredAcls | None = None
) -> AsyncIterator[LogReader]:
    """Connect a reader; `committed_only` chooses `read_committed`. Raises KafkaError, ConfigurationError."""
    isolation = "read_committed" if committed_only else "read_uncommitted"
    consumer = new_consumer(settings, group_id=None, isolation_level=isolation)
    try:
        with translate_errors(f"connecting to {settings.bootstrap_servers}", acls):
            await consumer.start()
            cluster = await fetch_all_metadata(consumer)
            partitions = cluster.partitions_for_topic(topic)
            if not partitions:
                raise KafkaRefused(
                    f"topic {topic} does not exist: create it with `streamworker topics create`"
                )
        yield LogReader(consumer, topic, sorted(partitions), acls)
    finally:
        await close_consumer(consumer, _STOP_TIMEOUT_S)
