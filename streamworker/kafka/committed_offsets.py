"""Read the offsets that the consumer group has committed, with their metadata."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.errors import KafkaUnavailable
from streamworker.kafka.clients import Admin, new_admin
from streamworker.kafka.errors import translate_errors
from streamworker.model import CommitPoint

if TYPE_CHECKING:
    from streamworker.config import Settings
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import TopicPartition

__all__ = ["CommittedOffsets"]

_CLOSE_TIMEOUT_S = 2.0


class CommittedOffsets:
    """Reads committed offsets with their metadata, which `AIOKafkaConsumer.committed` leaves out."""

    def __init__(self, settings: Settings, consumer: GroupConsumer) -> None:
        self._settings = settings
        self._consumer = consumer
        self._admin: Admin | None = None

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        self._admin = new_admin(self._settings.kafka)
        with translate_errors(f"connecting to {self._settings.kafka.bootstrap_servers}"):
            await self._admin.start()

    async def stop(self) -> None:
        """Disconnect. Bounded in time; never raises."""
        if self._admin is not None:
            with suppress(ForeignKafkaError, OSError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._admin.close()

    async def read(self, partition: TopicPartition) -> CommitPoint:
        """Return what is committed for a partition; the partition's first offset if nothing is. Raises KafkaError."""
        if self._admin is None:
            raise KafkaUnavailable("the reader of committed offsets is not connected")
        topic_partition = KafkaTopicPartition(*partition)
        with translate_errors(f"reading the committed offset of {partition}"):
            offsets = await self._admin.list_consumer_group_offsets(
                self._settings.worker.group_id, partitions=[topic_partition]
            )
        found = offsets.get(topic_partition)
        if found is None:
            # The broker answers every partition that was asked for, with -1 if nothing is committed. aiokafka ignores
            # the error code of the whole answer (a coordinator that is still loading); the partition is then absent.
            raise KafkaUnavailable(
                f"the group's coordinator did not return the committed offset of {partition}"
            )
        if found.offset < 0:
            return CommitPoint(await self._consumer.beginning(partition))
        return CommitPoint(found.offset, found.metadata or "")
