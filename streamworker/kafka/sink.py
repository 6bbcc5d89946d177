"""Where deltas go: one idempotent producer per process, a queue and a pump per events partition.

A pump has one batch on the way; what comes meanwhile makes the next one. No future per record. What comes after a quiet
while leaves at once, and so does the first delta of a job; else the pumps leave together, at most once per linger.

A failed batch poisons aiokafka's producer for its partition: the sequence number has moved on without the broker
(aiokafka #1017). The batch is still in our hands, so a new producer is made and the same records are sent again, in
order; no job has to pay its upstream twice for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError

from streamworker.errors import KafkaRefused, RecordTooLarge
from streamworker.kafka.connection import client_arguments, close_producer, compression_type, install_client
from streamworker.kafka.errors import describe_error, translate_errors
from streamworker.kafka.partitioner import partition_of
from streamworker.limits.watermarks import Watermarks
from streamworker.log_throttle import LogThrottle, OutageLog
from streamworker.model import ProducerRecord, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.config import KafkaSettings
    from streamworker.observe import Observer
    from streamworker.ports import Receipt

__all__ = ["KafkaSink", "producer_arguments", "publish"]

BATCH_BYTES = 256 << 10
"""Payload of one batch. Large enough that 16 KB's queueing (aiokafka #528) is far, small enough for any topic."""

STOP_TIMEOUT_S = (
    2.0  # after a drain there is nothing on the way; else only deltas of attempts that nobody will follow
)
_BACKOFF_S = 0.2
_NO_LOCAL_LIMIT = 1 << 30  # the broker knows the topic's limit; ours is checked where the event is made

log = structlog.get_logger()


def producer_arguments(settings: KafkaSettings) -> dict[str, Any]:
    """Return the arguments that all our producers share."""
    return {
        **client_arguments(settings),
        "enable_idempotence": True,  # implies acks=all
        "compression_type": compression_type(settings),
        "max_batch_size": 2 * BATCH_BYTES,  # ours are counted without framing
        "max_request_size": _NO_LOCAL_LIMIT,
    }


class SinkReceipt:
    """One job's account with the sink."""

    __slots__ = ("_waiter", "error", "is_new", "pending")

    def __init__(self) -> None:
        self.pending = 0
        self.is_new = True
        """Whether nothing was published yet: the first record of a job waits for no others."""
        self.error: RecordTooLarge | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def settled(self) -> None:
        """Wait until every record is acknowledged. Raises RecordTooLarge if the broker refused one."""
        if self.pending:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error

    def acknowledge(self) -> None:
        """One record less on the way."""
        self.pending -= 1
        if not self.pending and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_Entry = tuple[ProducerRecord, SinkReceipt, int]
"""A record, the account it is on, its size. A bare tuple: a named one takes thrice as long to make."""


class KafkaSink:
    """The sink of the whole process."""

    def __init__(
        self,
        settings: KafkaSettings,
        topics: Iterable[str],
        observer: Observer | None = None,
        *,
        linger_s: float = 0.0,
    ) -> None:
        """Prepare to write to `topics`. No two requests leave within `linger_s`, but for a job's first record."""
        self._settings = settings
        self._observer = observer
        self._topics = tuple(topics)
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._producer: Any = None
        self._partitions: dict[str, int] = {}  # how many each topic had when we last knew
        self._renewal = asyncio.Lock()
        self._replacements = LogThrottle()
        self._retired: set[asyncio.Task[None]] = set()
        self._senders: dict[TopicPartition, PartitionSender] = {}
        self._linger = LingerScheduler(linger_s)
        self._watermarks = Watermarks(settings.max_unacknowledged_bytes)
        self.has_room = True
        """Whether the broker keeps up."""
        self._room = asyncio.Event()
        self._room.set()

    async def start(self) -> None:
        """Connect, and learn how many partitions each topic has. Raises KafkaError."""
        self._producer = await self._new_producer()

    async def stop(self) -> None:
        """Wait a bounded while for what is on the way, then let go."""
        senders = [sender.idle() for sender in self._senders.values()]
        if senders:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.gather(*senders)
        for sender in self._senders.values():
            await sender.stop()
        for task in self._retired:
            task.cancel()
        await asyncio.gather(
            close_producer(self._producer, STOP_TIMEOUT_S), *self._retired, return_exceptions=True
        )

    def receipt(self) -> SinkReceipt:
        """Open an account for a job."""
        return SinkReceipt()

    def publish(self, record: ProducerRecord, receipt: Receipt) -> None:
        """Take a record. Never waits."""
        assert isinstance(receipt, SinkReceipt), "a receipt of another sink"
        receipt.pending += 1
        size = record.size
        self._watermarks.add(size)
        if self._watermarks.is_above_high:
            self.has_room = False
            self._room.clear()
        sender = self._senders.get(record.topic_partition)
        if sender is None:
            sender = self._senders[record.topic_partition] = PartitionSender(
                self, record.topic_partition, self._linger
            )
        sender.put((record, receipt, size))
        if receipt.is_new:
            receipt.is_new = False
            sender.hurry()

    @property
    def unacknowledged_bytes(self) -> int:
        """Payload on the way to the broker."""
        return self._watermarks.level

    async def room(self) -> None:
        """Wait until there is room."""
        await self._room.wait()

    def partition_for(self, topic: str, key: bytes) -> TopicPartition:
        """Choose the partition of a key. Raises KafkaRefused for a topic that is not known."""
        if found := self._producer.client.cluster.partitions_for_topic(topic):
            self._partitions[topic] = len(
                found
            )  # kept, because a broker that just came up may not know its topics yet
        if topic not in self._partitions:
            raise KafkaRefused(f"topic {topic} does not exist: create it with `streamworker topics create`")
        return TopicPartition(topic, partition_of(key, self._partitions[topic]))

    # For the pumps

    @property
    def producer(self) -> Any:
        """The producer to use for the next batch."""
        return self._producer

    async def renew(self, poisoned: Any) -> None:
        """Replace a producer that lost its place in a sequence. Others may go on with the old one until it is idle."""
        async with self._renewal:
            if self._producer is not poisoned:
                return
            await asyncio.sleep(_BACKOFF_S)
            self._producer = await self._new_producer()
            task = asyncio.create_task(self._retire(poisoned))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)
            if (fields := self._replacements.failed(monotonic())) is not None:
                log.warning("sink.producer_replaced", **fields)

    def failed(self) -> None:
        """Tell that Kafka did not take something and is asked again."""
        if self._observer is not None:
            self._observer.kafka_failed("sink")

    def acknowledged(self, batch: list[_Entry], seconds: float) -> None:
        """Settle the accounts of a batch that took so long."""
        if self._observer is not None:
            self._observer.batch_acknowledged(len(batch), seconds)
        self._watermarks.remove(sum(size for _, _, size in batch))
        for _, receipt, _ in batch:
            receipt.acknowledge()
        if not self._watermarks.is_above_high:
            self.has_room = True
            self._room.set()

    def sender_ended(self, task: asyncio.Task[None]) -> None:
        """Tell of a pump that died: a bug of ours, after which its partition would be silent for ever."""
        if not task.cancelled() and (error := task.exception()) is not None and not self.crashed.done():
            self.crashed.set_exception(error)

    async def _new_producer(self) -> Any:
        producer = AIOKafkaProducer(**producer_arguments(self._settings))
        install_client(producer.client, self._settings)
        try:
            with translate_errors(f"connecting a producer to {self._settings.bootstrap_servers}"):
                await producer.start()
            for topic in self._topics:
                with translate_errors(f"asking for the partitions of topic {topic}"):
                    self._partitions[topic] = len(await producer.partitions_for(topic))
        except BaseException:
            await close_producer(producer, STOP_TIMEOUT_S)
            raise
        return producer

    async def _retire(self, poisoned: Any) -> None:
        """Close a producer when the batches of its other partitions are through, however long that takes."""
        try:
            await poisoned.flush()
        finally:
            await close_producer(poisoned, STOP_TIMEOUT_S)


async def publish(settings: KafkaSettings, topic: str, entries: Iterable[tuple[bytes, bytes]]) -> None:
    """Write keys and values to a topic and wait until they are acknowledged. For commands. Raises KafkaError."""
    sink = KafkaSink(settings, [topic])
    await sink.start()
    try:
        receipt = sink.receipt()
        for key, value in entries:
            if not sink.has_room:
                await sink.room()
            sink.publish(ProducerRecord(sink.partition_for(topic, key), key, value), receipt)
        await receipt.settled()
    finally:
        await sink.stop()


class LingerScheduler:
    """When batches leave: at once after a quiet while, else all together, at most once per `linger_s`.

    A request costs as much as dozens of records, whatever is in it, and aiokafka puts what is ready for a broker into
    one. A linger in each partition's own time would spread them again.
    """

    def __init__(self, linger_s: float) -> None:
        self._linger_s = linger_s
        self._loop = asyncio.get_running_loop()
        self._last = -linger_s
        self._timer: asyncio.Handle | None = None
        self._is_hurried = False
        self._waiting: list[PartitionSender] = []

    def ask(self, sender: PartitionSender, *, at_once: bool) -> None:
        """Have `pump.leave` called, together with the others that wait."""
        self._waiting.append(sender)
        if at_once:
            self.hurry()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._last + self._linger_s, self._leave)

    def hurry(self) -> None:
        """Let those that wait leave in the loop's next turn, however many hurry until then."""
        if self._is_hurried:
            return
        self._is_hurried = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_soon(self._leave)

    def _leave(self) -> None:
        self._timer = None
        self._is_hurried = False
        self._last = self._loop.time()
        waiting, self._waiting = self._waiting, []
        for sender in waiting:
            sender.leave()


class PartitionSender:
    """The queue of one partition and the task that empties it, batch after batch."""

    def __init__(self, sink: KafkaSink, to: TopicPartition, linger: LingerScheduler) -> None:
        self._sink = sink
        self._to = to
        self._linger = linger
        self._outage_log = OutageLog("sink.recovered", to=str(to))
        self._queue: deque[_Entry] = deque()
        self._leaves = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._is_idle = True  # nothing is queued, nothing is on the way
        self._is_waiting = False  # for its departure
        self._is_urgent = False
        self._task = asyncio.create_task(self._run(), name=f"pump {to}")
        self._task.add_done_callback(sink.sender_ended)

    def put(self, entry: _Entry) -> None:
        self._queue.append(entry)
        if self._is_idle:
            self._is_idle = False
            self._empty.clear()
            self._ask()

    def hurry(self) -> None:
        """Do not keep waiting what is queued; if a batch is on the way, it goes right after that."""
        self._is_urgent = True
        if self._is_waiting:
            self._linger.hurry()

    def leave(self) -> None:
        """Send what is queued."""
        self._is_waiting = self._is_urgent = False
        self._leaves.set()

    async def idle(self) -> None:
        await self._empty.wait()

    async def stop(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _ask(self) -> None:
        self._is_waiting = True
        self._linger.ask(self, at_once=self._is_urgent)

    async def _run(self) -> None:
        while True:
            await self._leaves.wait()
            self._leaves.clear()
            batch, began = self._next_batch(), monotonic()
            await self._deliver(batch)
            self._sink.acknowledged(batch, monotonic() - began)
            if self._queue:
                self._ask()
            else:
                self._is_idle = True
                self._empty.set()

    def _next_batch(self) -> list[_Entry]:
        queue = self._queue
        batch = [queue.popleft()]
        _, _, total = batch[0]
        while queue and (total := total + queue[0][2]) <= BATCH_BYTES:
            batch.append(queue.popleft())
        return batch

    async def _deliver(self, batch: list[_Entry]) -> None:
        """Send until the broker has it. Only a record that it will never take ends otherwise, and is told."""
        while True:
            producer = self._sink.producer
            try:
                await self._send(producer, batch)
            except (MessageSizeTooLargeError, RecordListTooLargeError):
                await self._replace(producer)
                await self._deliver_in_parts(batch)
            except ForeignKafkaError as error:
                self._failed("sink.batch_failed", error, records=len(batch))
                await self._replace(producer)
                continue
            self._outage_log.worked()
            return

    async def _send(self, producer: Any, batch: list[_Entry]) -> None:
        builder = producer.create_batch()
        append = builder.append
        for record, _, _ in batch:
            fits = append(timestamp=None, key=record.key, value=record.value, headers=list(record.headers))
            assert fits is not None, "a builder holds twice what we put into a batch"
        acknowledged = await producer.send_batch(builder, self._to.topic, partition=self._to.partition)
        await acknowledged

    async def _deliver_in_parts(self, batch: list[_Entry]) -> None:
        if len(batch) == 1:
            _, receipt, size = batch[0]
            receipt.error = RecordTooLarge(f"the broker refused a record of {size} bytes for {self._to}")
            log.error("sink.record_refused", to=str(self._to), bytes=size)
            return
        middle = len(batch) // 2
        await self._deliver(batch[:middle])
        await self._deliver(batch[middle:])

    async def _replace(self, producer: Any) -> None:
        while True:
            try:
                return await self._sink.renew(producer)
            except Exception as error:  # noqa: BLE001 - whatever it is, the records must not be lost
                self._failed("sink.unavailable", error)
                await asyncio.sleep(_BACKOFF_S)

    def _failed(self, event: str, error: Exception, **facts: object) -> None:
        self._outage_log.failed(event, monotonic(), **facts, reason=describe_error(error))
        self._sink.failed()
