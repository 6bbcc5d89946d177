"""Reading a topic as a log, without a group: for `tail`, `audit` and the demo."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import CorruptRecordException

from streamworker.errors import KafkaRefused
from streamworker.kafka.connection import client_arguments, install_client
from streamworker.kafka.consumer import record_of
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.partitioner import partition_of
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.model import ConsumerRecord

__all__ = ["LogReader", "open_log"]

_POLL_MS = 500


class LogReader:
    """Reads partitions of one topic from their beginning, in order."""

    def __init__(self, consumer: Any, topic: str, partitions: Sequence[int]) -> None:
        self._consumer = consumer
        self._topic = topic
        self.partitions = tuple(partitions)

    def partition_for(self, key: bytes) -> TopicPartition:
        """Return the partition that holds a key."""
        return TopicPartition(self._topic, partition_of(key, len(self.partitions)))

    async def follow(
        self, partitions: Sequence[TopicPartition], *, from_end: bool = False
    ) -> AsyncIterator[ConsumerRecord]:
        """Go through the records of these partitions, from the beginning, and wait for more, for ever."""
        await self._assign(partitions, from_end=from_end)
        while True:
            for record in await self._some():
                yield record

    async def snapshot(self, partitions: Sequence[TopicPartition]) -> AsyncIterator[ConsumerRecord]:
        """Go through the records that are there now, then stop."""
        await self._assign(partitions, from_end=False)
        assigned = [KafkaTopicPartition(*partition) for partition in partitions]
        with translate_errors(f"asking where {self._topic} ends"):
            ends = await self._consumer.end_offsets(assigned)
        while any([await self._consumer.position(at) < end for at, end in ends.items()]):
            for record in await self._some():
                if record.at.offset < ends[KafkaTopicPartition(*record.topic_partition)]:
                    yield record

    async def _assign(self, partitions: Sequence[TopicPartition], *, from_end: bool) -> None:
        assigned = [KafkaTopicPartition(*partition) for partition in partitions]
        self._consumer.assign(assigned)
        with translate_errors(f"reading {self._topic}"):
            await (self._consumer.seek_to_end if from_end else self._consumer.seek_to_beginning)(*assigned)

    async def _some(self) -> list[ConsumerRecord]:
        with translate_errors(f"reading {self._topic}"):
            try:
                fetched = await self._consumer.getmany(timeout_ms=_POLL_MS, max_records=2000)
            except UnicodeDecodeError as error:  # a header's name; aiokafka's C code lets it through
                raise CorruptRecordException(str(error)) from error
        await asyncio.sleep(0)  # a long log must not keep everything else waiting
        return [record_of(record) for batch in fetched.values() for record in batch]


@asynccontextmanager
async def open_log(
    settings: KafkaSettings, topic: str, *, committed_only: bool = True
) -> AsyncIterator[LogReader]:
    """Connect a reader. `committed_only` reads as `read_committed` does. Raises KafkaError."""
    consumer = AIOKafkaConsumer(
        **client_arguments(settings),
        group_id=None,
        enable_auto_commit=False,
        isolation_level="read_committed" if committed_only else "read_uncommitted",
    )
    install_client(consumer._client, settings)  # noqa: SLF001 - it has no public name
    try:
        with translate_errors(f"connecting to {settings.bootstrap_servers}"):
            await consumer.start()
            # All topics are listed: asking for one by name would create it on a broker with auto-creation.
            cluster = await consumer._client.fetch_all_metadata()  # noqa: SLF001 - as consumer.topics() does
            partitions = cluster.partitions_for_topic(topic)
            if not partitions:
                raise KafkaRefused(
                    f"topic {topic} does not exist: create it with `streamworker topics create`"
                )
        yield LogReader(consumer, topic, sorted(partitions))
    finally:
        await consumer.stop()
