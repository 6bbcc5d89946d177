"""Publish deltas: one idempotent producer per process, and one queue per events partition.

Each partition has one batch in flight. Records that arrive meanwhile make the next batch; no record has a future of its
own. A batch is kept until the broker has acknowledged it, so that it can be sent again by another producer and no job
has to repeat its upstream call.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from streamworker.errors import KafkaRefused
from streamworker.kafka.envelope import Envelope, SinkReceipt
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.producer import ReplaceableProducer
from streamworker.kafka.sender import LingerScheduler, PartitionSender
from streamworker.limits.watermarks import Watermarks
from streamworker.model import ProducerRecord, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.config import KafkaSettings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import Producer
    from streamworker.kafka.envelope import Entry
    from streamworker.model import Headers
    from streamworker.observe import Observer
    from streamworker.ports import Receipt

__all__ = ["KafkaSink", "publish"]

STOP_TIMEOUT_S = 2.0
"""How long `stop` waits for records in flight. After a drain there are none; after a hard stop their attempts are
superseded by the next owner's."""


class KafkaSeries:
    """Publishes a job's records that have one partition, one key and one set of headers."""

    __slots__ = ("_envelope", "_sender", "_sink", "_watermarks")

    def __init__(
        self, sink: KafkaSink, watermarks: Watermarks, sender: PartitionSender, envelope: Envelope
    ) -> None:
        self._sink = sink
        self._watermarks = watermarks
        self._sender = sender
        self._envelope = envelope

    def publish(self, value: bytes | None) -> int:
        """Append a record to its partition's queue; return its size. Never waits."""
        envelope, sender = self._envelope, self._sender
        receipt = envelope.receipt
        size = envelope.size if value is None else envelope.size + len(value)
        receipt.pending += 1
        if self._watermarks.add(size):
            self._sink.hold()
        sender.put((envelope, value, size))
        if receipt.is_new:
            receipt.is_new = False
            sender.hurry()
        return size


class KafkaSink:
    """The sink of the process."""

    def __init__(
        self,
        settings: KafkaSettings,
        topics: Iterable[str],
        observer: Observer | None = None,
        *,
        linger_s: float = 0.0,
        keeps_offsets: bool = False,
        acls: RequiredAcls | None = None,
    ) -> None:
        """Prepare to write to `topics`. At most one request leaves per `linger_s`, except for a job's first record.

        With `keeps_offsets`, receipts have the offset of the record that was acknowledged last.
        """
        self.keeps_offsets = keeps_offsets
        self.compression: str = settings.compression
        self._observer = observer
        self._acls = acls
        self._producer = ReplaceableProducer(settings, topics, acls)
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._senders: dict[TopicPartition, PartitionSender] = {}
        self._linger = LingerScheduler(linger_s)
        self._watermarks = Watermarks(settings.max_unacknowledged_bytes)
        self.has_room = True
        """Whether the unacknowledged bytes are below the high watermark."""
        self._room = asyncio.Event()
        self._room.set()

    async def start(self) -> None:
        """Connect, and read how many partitions each topic has. Raises KafkaError."""
        await self._producer.start()

    async def require(self, topic: str) -> None:
        """Read how many partitions a topic has, without waiting for a missing one. Raises KafkaError."""
        await self._producer.require(topic)

    async def stop(self) -> None:
        """Wait for records in flight, at most STOP_TIMEOUT_S, then close. Never raises."""
        senders = [sender.idle() for sender in self._senders.values()]
        if senders:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.gather(*senders)
        for sender in self._senders.values():
            await sender.stop()
        await self._producer.stop()

    def receipt(self) -> SinkReceipt:
        """Return a receipt for a job that is about to publish."""
        return SinkReceipt()

    def publish(self, record: ProducerRecord, receipt: Receipt) -> None:
        """Append a record to its partition's queue. Never waits."""
        self.series(record.topic_partition, record.key, record.headers, receipt).publish(record.value)

    def series(
        self, to: TopicPartition, key: bytes | None, headers: Headers, receipt: Receipt
    ) -> KafkaSeries:
        """Return the publisher of a job's records that differ in their value alone."""
        assert isinstance(receipt, SinkReceipt), "the receipt is from another sink"
        sender = self._senders.get(to)
        if sender is None:
            sender = self._senders[to] = PartitionSender(self, to, self._linger, self._acls)
        return KafkaSeries(self, self._watermarks, sender, Envelope(receipt, key, headers))

    @property
    def unacknowledged_bytes(self) -> int:
        """Payload that the broker has not acknowledged."""
        return self._watermarks.level

    async def room(self) -> None:
        """Wait until `has_room`."""
        await self._room.wait()

    def partition_for(self, topic: str, key: bytes) -> TopicPartition:
        """Return the partition of a key. Raises KafkaRefused for an unknown topic."""
        if (partitions := self._producer.partitions(topic)) is None:
            raise KafkaRefused(f"topic {topic} does not exist: create it with `streamworker topics create`")
        return TopicPartition(topic, partition_of(key, partitions))

    # Called by the series and the senders

    @property
    def producer(self) -> Producer:
        """The producer to use for the next batch."""
        return self._producer.current

    async def replace(self, failed: Producer) -> None:
        """Replace a failed producer. Raises KafkaError."""
        await self._producer.replace(failed)

    def failed(self) -> None:
        """Count a request that Kafka did not accept and that is repeated."""
        if self._observer is not None:
            self._observer.kafka_failed("sink")

    def hold(self) -> None:
        """Have no room until the broker has acknowledged enough."""
        self.has_room = False
        self._room.clear()

    def acknowledged(self, batch: list[Entry], size: int, seconds: float) -> None:
        """Settle the records of a batch of `size` bytes that took `seconds` to be acknowledged."""
        if self._observer is not None:
            self._observer.batch_acknowledged(len(batch), seconds)
        self._watermarks.remove(size)
        for envelope, _, _ in batch:
            receipt = envelope.receipt
            receipt.pending -= 1
            if not receipt.pending:
                receipt.settle()
        if not self._watermarks.is_above_high:
            self.has_room = True
            self._room.set()

    def sender_ended(self, task: asyncio.Task[None]) -> None:
        """Fail `crashed` if a sender raised: nothing would be sent to its partition any more."""
        if not task.cancelled() and (error := task.exception()) is not None and not self.crashed.done():
            self.crashed.set_exception(error)


async def publish(settings: KafkaSettings, topic: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Write keys and values to a topic and wait until they are acknowledged. For commands. Raises KafkaError."""
    sink = KafkaSink(settings, [])
    await sink.start()
    try:
        await sink.require(topic)
        receipt = sink.receipt()
        for key, value in entries:
            if not sink.has_room:
                await sink.room()
            sink.publish(ProducerRecord(sink.partition_for(topic, key), key, value), receipt)
        await receipt.settled()
    finally:
        await sink.stop()
