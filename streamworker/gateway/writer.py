"""Writes jobs and cancel records: one idempotent producer per process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from streamworker.errors import StreamworkerError
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.kafka.sink import KafkaSink
from streamworker.model import ProducerRecord

if TYPE_CHECKING:
    from streamworker.config import Settings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.model import Headers

__all__ = ["KafkaWriter", "NotAcknowledged", "Writer"]


class NotAcknowledged(StreamworkerError):
    """The record was passed to Kafka and not acknowledged in time: Kafka may have it, or get it yet."""


class Writer(Protocol):
    """Writes records and waits until all in-sync replicas have them."""

    @property
    def is_ready(self) -> bool:
        """Whether it is connected."""
        ...

    async def write(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> None:
        """Write one record; return when it is acknowledged.

        Raises:
            BrokerUnavailable: nothing was written.
            NotAcknowledged: the record may have been written.
            RecordTooLarge: the broker refused the record for its size.
            KafkaRefused: the topic does not exist.
        """
        ...


class KafkaWriter:
    """The writer of the process, to the job topic and the control topic."""

    def __init__(self, settings: Settings, topics: tuple[str, ...], acls: RequiredAcls | None = None) -> None:
        self._kafka = settings.kafka
        self._topics = topics
        self._acls = acls
        self._sink: KafkaSink | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it is connected."""
        return self._sink is not None

    @property
    def unacknowledged_bytes(self) -> int:
        """Bytes of records that no broker has acknowledged yet."""
        return 0 if self._sink is None else self._sink.unacknowledged_bytes

    async def start(self) -> None:
        """Connect. Raises KafkaError; KafkaRefused for a topic that does not exist."""
        sink = KafkaSink(self._kafka, [], acls=self._acls)
        try:
            await sink.start()
            for topic in self._topics:
                await sink.require(topic)
        except BaseException:
            await sink.stop()
            raise
        self._sink = sink

    async def stop(self) -> None:
        """Wait a short time for records in flight, and close. Never raises."""
        sink, self._sink = self._sink, None
        if sink is not None:
            await sink.stop()

    async def write(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> None:
        """Write one record; see `Writer`."""
        sink = self._sink
        if sink is None:
            raise BrokerUnavailable("the gateway has not connected to Kafka yet")
        if not sink.has_room:
            raise BrokerUnavailable("Kafka does not acknowledge records, and as many as may wait do")
        receipt = sink.receipt()
        sink.publish(ProducerRecord(sink.partition_for(topic, key), key, value, headers), receipt)
        timeout_s = self._kafka.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await receipt.settled()
        except TimeoutError:
            raise NotAcknowledged(f"Kafka did not acknowledge the record within {timeout_s:g} s") from None
