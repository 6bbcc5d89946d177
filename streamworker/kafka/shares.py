"""A share of a topic's partitions, given by a consumer group: the members divide work by key, and read nothing."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from aiokafka import ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaTopicPartition

from streamworker.kafka.clients import close_consumer, new_consumer
from streamworker.kafka.errors import translate_errors
from streamworker.log_throttle import OutageLog

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from streamworker.config import KafkaSettings
    from streamworker.kafka.clients import Consumer

__all__ = ["PartitionShare"]

_POLL_MS = 1000
_BACKOFF_S = 1.0
_STOP_TIMEOUT_S = 5.0


class PartitionShare(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """A member of a group that owns partitions of one topic until they are revoked."""

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        group_id: str,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called after the owned partitions have changed."""
        self.owned: frozenset[int] = frozenset()
        self._settings = settings
        self._topic = topic
        self._group_id = group_id
        self._changed = changed
        self._consumer: Consumer | None = None
        self._task: asyncio.Task[None] | None = None
        self._outages = OutageLog("share.recovered", topic=topic, group=group_id)

    async def start(self) -> None:
        """Join the group. Raises KafkaError."""
        await self._join()
        self._task = asyncio.create_task(self._run(), name=f"share of {self._topic}")

    async def stop(self) -> None:
        """Leave the group. Bounded in time; never raises."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._leave()
        self._own(())

    def on_partitions_revoked(self, revoked: Collection[KafkaTopicPartition]) -> None:
        """Give the partitions up. A rebalance revokes all."""
        self._own(self.owned - {partition.partition for partition in revoked})

    def on_partitions_assigned(self, assigned: Collection[KafkaTopicPartition]) -> None:
        """Take the partitions over, and fetch none of their records."""
        if self._consumer is not None and assigned:
            self._consumer.pause(*assigned)
        self._own(partition.partition for partition in assigned)

    def _own(self, partitions: Iterable[int]) -> None:
        owned = frozenset(partitions)
        if owned != self.owned:
            self.owned = owned
            self._changed()

    async def _run(self) -> None:
        """Poll, as a member must (`max.poll.interval.ms`), and join again after a failure."""
        while True:
            try:
                consumer = self._consumer or await self._join()
                await consumer.getmany(timeout_ms=_POLL_MS, max_records=1)
                self._outages.worked()
            except Exception as error:  # noqa: BLE001 - whatever fails, the group's other members go on
                self._outages.failed("share.failed", monotonic(), reason=str(error)[:300])
                self._own(())
                await self._leave()
                await asyncio.sleep(_BACKOFF_S)

    async def _join(self) -> Consumer:
        consumer = new_consumer(self._settings, group_id=self._group_id, auto_offset_reset="latest")
        consumer.subscribe([self._topic], listener=self)
        self._consumer = consumer  # `on_partitions_assigned` is called before `start` returns
        with translate_errors(f"joining the group {self._group_id}"):
            try:
                await consumer.start()
            except BaseException:
                await self._leave()
                raise
        return consumer

    async def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await close_consumer(consumer, _STOP_TIMEOUT_S)
