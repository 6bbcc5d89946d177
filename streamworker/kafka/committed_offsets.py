"""Read the offsets that the consumer group has committed, with their metadata."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.errors import KafkaUnavailable
from streamworker.kafka.connection import client_arguments, install_client
from streamworker.kafka.errors import translate_errors
from streamworker.model import CommitPoint

if TYPE_CHECKING:
    from streamworker.config import Settings
    from streamworker.kafka.consumer import GroupConsumer
    from streamworker.model import TopicPartition

__all__ = ["CommittedOffsets"]

_CLOSE_TIMEOUT_S = 2.0


class CommittedOffsets:
    """Reads what the group has committed, metadata included, which `consumer.committed()` leaves out."""

    def __init__(self, settings: Settings, consumer: GroupConsumer) -> None:
        self._settings = settings
        self._consumer = consumer
        self._admin: Any = None

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        self._admin = AIOKafkaAdminClient(**client_arguments(self._settings.kafka))
        install_client(self._admin._client, self._settings.kafka)  # noqa: SLF001 - it has no public name
        with translate_errors(f"connecting to {self._settings.kafka.bootstrap_servers}"):
            await self._admin.start()

    async def stop(self) -> None:
        """Let go."""
        if self._admin is not None:
            with suppress(ForeignKafkaError, TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._admin.close()

    async def read(self, partition: TopicPartition) -> CommitPoint:
        """Return what is committed for a partition; the log's beginning if nothing is. Raises KafkaError."""
        topic_partition = KafkaTopicPartition(*partition)
        with translate_errors(f"reading the committed offset of {partition}"):
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
