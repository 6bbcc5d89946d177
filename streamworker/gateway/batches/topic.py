"""The state topic: read into a `Table`, written with the process's own writes read back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import KafkaUnavailable
from streamworker.gateway.batches.records import write_state
from streamworker.gateway.batches.table import Table
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.scan import LogScanner
from streamworker.kafka.sink import KafkaSink
from streamworker.kafka.tail import TopicTail
from streamworker.model import ProducerRecord, TopicPartition
from streamworker.redaction import without_message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.gateway.batches.records import StateRecord
    from streamworker.kafka.clients import FetchedRecord

__all__ = ["StateTopic"]

log = structlog.get_logger()


class StateTopic:
    """Files and batches in Kafka. `table` is complete from `start` on, and follows the topic."""

    def __init__(self, settings: KafkaSettings, topic: str, changed: Callable[[str], None]) -> None:
        """`changed` is called with the id of each file or batch that a record is about."""
        self.topic = topic
        self.table = Table()
        self.is_ready = False
        """Whether the topic was read to its end."""
        self._settings = settings
        self._changed = changed
        self._sink: KafkaSink | None = None
        self._tail: TopicTail | None = None
        self._partitions = 0
        self._advanced = asyncio.Condition()
        self._notes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Read the topic from its beginning to its present end. Raises KafkaError."""
        await self.stop()
        self.table = Table()
        scanner = LogScanner(self._settings)
        try:
            self._partitions = await scanner.partitions(self.topic)
            ends = {
                number: await scanner.end(TopicPartition(self.topic, number), committed_only=True)
                for number in range(self._partitions)
            }
        finally:
            await scanner.stop()
        self._sink = KafkaSink(self._settings, [], keeps_offsets=True)
        await self._sink.start()
        await self._sink.require(self.topic)
        self._tail = TopicTail(
            self._settings, self.topic, self._read, committed_only=True, start=dict.fromkeys(ends, 0)
        )
        self._tail.crashed.add_done_callback(self._report_crash)
        await self._tail.start()
        for partition, end in ends.items():
            await self._until_read(partition, end, self._settings.request_timeout_s)
        self.is_ready = True

    async def stop(self) -> None:
        """Close the clients. Bounded in time; never raises."""
        self.is_ready = False
        tail, self._tail = self._tail, None
        sink, self._sink = self._sink, None
        if tail is not None:
            await tail.stop()
        if sink is not None:
            await sink.stop()

    def partition(self, id_: str) -> int:
        """Return the partition of a file or a batch. Call it after `start` only."""
        return partition_of(id_.encode(), self._partitions)

    async def write(self, id_: str, key: str, record: StateRecord | None) -> None:
        """Write a record, or a tombstone, to the partition of `id_`; return when the table has it.

        Raises:
            BrokerUnavailable: Kafka did not acknowledge it in time. It may be written yet.
            KafkaError: the brokers refused it.
        """
        sink = self._sink
        if sink is None or not sink.has_room:
            raise BrokerUnavailable("Kafka does not accept the state of batches now")
        receipt = sink.receipt()
        at = TopicPartition(self.topic, self.partition(id_))
        sink.publish(
            ProducerRecord(at, key.encode(), None if record is None else write_state(record)), receipt
        )
        timeout_s = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await receipt.settled()
        except TimeoutError:
            raise BrokerUnavailable(f"Kafka did not acknowledge the record within {timeout_s:g} s") from None
        offset = receipt.offset
        if offset is not None:
            await self._until_read(at.partition, offset + 1, timeout_s)

    def _read(self, partition: int, records: Sequence[FetchedRecord], _: int) -> None:
        for record in records:
            key = (record.key or b"").decode(errors="replace")
            try:
                id_ = self.table.apply(key, record.value)
            except ValueError as error:
                log.warning(
                    "batches.record_ignored",
                    topic=self.topic,
                    partition=partition,
                    offset=record.offset,
                    reason=str(error)[:200],
                )
                continue
            if id_ is not None:
                self._changed(id_)
        task = asyncio.get_running_loop().create_task(self._note())
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    def _report_crash(self, crashed: asyncio.Future[None]) -> None:
        if not crashed.cancelled() and (error := crashed.exception()) is not None:
            self.is_ready = False  # an old state must not be served
            log.critical("batches.reader_crashed", topic=self.topic, exc_info=without_message(error))

    async def _note(self) -> None:
        async with self._advanced:
            self._advanced.notify_all()

    async def _until_read(self, partition: int, end: int, timeout_s: float) -> None:
        """Wait until the table has the records before an offset. Raises KafkaUnavailable."""
        tail = self._tail

        def has_read() -> bool:
            return tail is None or tail is not self._tail or tail.positions.get(partition, 0) >= end

        try:
            async with asyncio.timeout(timeout_s), self._advanced:
                await self._advanced.wait_for(has_read)
        except TimeoutError:
            raise KafkaUnavailable(
                f"topic {self.topic}: records were not read within {timeout_s:g} s"
            ) from None
