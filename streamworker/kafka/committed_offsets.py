"""Read the offsets that the consumer group has committed, with their metadata."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import GroupCoordinatorNotAvailableError
from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.kafka.acls import RequiredAcls
from streamworker.kafka.clients import Admin, new_admin
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.log import open_log
from streamworker.kafka.topics import METADATA_LIMIT, read_metadata_limit
from streamworker.model import CommitPoint

if TYPE_CHECKING:
    from aiokafka.structs import OffsetAndMetadata

    from streamworker.config import Settings
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import TopicPartition

__all__ = ["CommittedOffsets"]

_CLOSE_TIMEOUT_S = 2.0
_COORDINATOR_S = 3.0
_COORDINATOR_RETRY_S = 0.2

log = structlog.get_logger()


class CommittedOffsets:
    """Reads committed offsets with their metadata, which `AIOKafkaConsumer.committed` leaves out."""

    def __init__(self, settings: Settings, consumer: GroupConsumer) -> None:
        self._settings = settings
        self._consumer = consumer
        self._acls = RequiredAcls.of_worker(settings)
        self._from_end: frozenset[str] = frozenset()  # topics that begin at their end
        self._admin: Admin | None = None
        self.metadata_limit = METADATA_LIMIT
        """Bytes of metadata that a commit may have: the brokers' `offset.metadata.max.bytes`."""

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        self._admin = new_admin(self._settings.kafka)
        with translate_errors(f"connecting to {self._settings.kafka.bootstrap_servers}"):
            await self._admin.start()
            self.metadata_limit = await read_metadata_limit(self._admin)
        if self.metadata_limit < METADATA_LIMIT:
            log.warning(
                "commit.metadata_limited",
                limit=self.metadata_limit,
                reason="the brokers' offset.metadata.max.bytes is below Kafka's default of "
                f"{METADATA_LIMIT}: fewer jobs of a partition can end before an older one",
            )

    async def stop(self) -> None:
        """Disconnect. Bounded in time; never raises."""
        if self._admin is not None:
            with suppress(ForeignKafkaError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._admin.close()

    async def check_start(self) -> None:
        """Decide where a group without committed offsets begins, by `worker.on_no_offset`.

        Raises:
            KafkaRefused: the group has no offset on a job topic with records, and events were written before. A new or
                misspelt `worker.group_id`, or a group whose offsets expired, would run all these jobs again.
        """
        policy, group = self._settings.worker.on_no_offset, self._settings.worker.group_id
        unknown = await self._topics_without_offset()
        if policy == "latest":
            self._from_end = frozenset(unknown)
        if policy != "refuse" or not unknown:
            return
        counts = {topic: await self._records(topic) for topic in unknown}
        _, written = await self._bounds(self._settings.topics.events)
        if not written or not any(counts.values()):
            return
        # Another worker of a new group may have begun since: it commits each first offset before it writes an event.
        unknown = await self._topics_without_offset()
        if any(counts[topic] for topic in unknown):
            jobs = ", ".join(f"topic {topic}, which holds {counts[topic]} records" for topic in unknown)
            raise KafkaRefused(
                f"group {group} has no committed offset on {jobs}, although {written} events were written to "
                f"{self._settings.topics.events}: is worker.group_id right, or did the group's offsets expire? Set "
                "worker.on_no_offset to earliest to run these jobs again, or to latest to skip them"
            )

    async def _topics_without_offset(self) -> list[str]:
        """Return the job topics on which the group has no committed offset. Raises KafkaError."""
        group = self._settings.worker.group_id
        with translate_errors(f"reading the committed offsets of group {group}", self._acls):
            offsets = await self._list_offsets()
        known = {partition.topic for partition, point in offsets.items() if point.offset >= 0}
        return [topic for topic in self._settings.topics.jobs if topic not in known]

    async def read(self, partition: TopicPartition) -> CommitPoint | None:
        """Return what is committed for a partition; None if nothing is. Raises KafkaError."""
        topic_partition = KafkaTopicPartition(*partition)
        with translate_errors(f"reading the committed offset of {partition}", self._acls):
            offsets = await self._list_offsets([topic_partition])
        found = offsets.get(topic_partition)
        if found is None:
            # The broker answers every partition that was asked for, with -1 if nothing is committed. aiokafka ignores
            # the error code of the whole answer (a coordinator that is still loading); the partition is then absent.
            raise KafkaUnavailable(
                f"the group's coordinator did not return the committed offset of {partition}"
            )
        return None if found.offset < 0 else CommitPoint(found.offset, found.metadata or "")

    async def start_point(self, partition: TopicPartition, committed: CommitPoint | None) -> CommitPoint:
        """Return where to begin a partition with this committed offset. Raises KafkaError.

        A partition without a committed offset begins at its first record: it was added, or had no job yet.
        """
        if (restart := self._consumer.take_restart_offset(partition)) is not None:
            return CommitPoint(restart)
        if committed is not None:
            return committed
        if partition.topic in self._from_end:
            return CommitPoint(await self._consumer.end(partition))
        return CommitPoint(await self._consumer.beginning(partition))

    async def _list_offsets(
        self, partitions: list[KafkaTopicPartition] | None = None
    ) -> dict[KafkaTopicPartition, OffsetAndMetadata]:
        """Return the group's committed offsets, of all partitions by default. Raises aiokafka's KafkaError.

        The first request of a new cluster makes it create the topic of the offsets, which takes a second or two.
        """
        now = asyncio.get_running_loop().time
        until = now() + _COORDINATOR_S
        while True:
            try:
                return await self._connected.list_consumer_group_offsets(
                    self._settings.worker.group_id, partitions=partitions
                )
            except GroupCoordinatorNotAvailableError:
                if now() >= until:
                    raise
            await asyncio.sleep(_COORDINATOR_RETRY_S)

    @property
    def _connected(self) -> Admin:
        if self._admin is None:
            raise KafkaUnavailable("the reader of committed offsets is not connected")
        return self._admin

    async def _records(self, topic: str) -> int:
        """Return how many records a topic holds, transaction markers included."""
        begin, end = await self._bounds(topic)
        return end - begin

    async def _bounds(self, topic: str) -> tuple[int, int]:
        """Return the sums of the first offsets and of the end offsets of a topic's partitions."""
        async with open_log(self._settings.kafka, topic, acls=self._acls) as log:
            partitions = [KafkaTopicPartition(topic, number) for number in log.partitions]
            with translate_errors(f"reading the offsets of {topic}", self._acls):
                begins = await log.consumer.beginning_offsets(partitions)
                ends = await log.consumer.end_offsets(partitions)
        return sum(begins.values()), sum(ends.values())
