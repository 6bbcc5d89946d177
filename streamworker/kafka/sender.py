"""Send the events of one partition in batches: one batch in flight, the next one filling meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import structlog
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError

from streamworker.errors import RecordTooLarge
from streamworker.kafka.clients import BATCH_BYTES
from streamworker.kafka.errors import describe_error
from streamworker.kafka.record_batch import RecordBatch
from streamworker.log_throttle import OutageLog

if TYPE_CHECKING:
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import Producer
    from streamworker.kafka.envelope import Entry
    from streamworker.model import TopicPartition

__all__ = ["LingerScheduler", "PartitionSender"]

_BACKOFF_S = 0.2

log = structlog.get_logger()


class BatchOwner(Protocol):
    """What a sender needs of the sink."""

    keeps_offsets: bool
    """Whether receipts get the offsets of their records."""

    compression: str
    """The codec of batches, as the setting names it."""

    @property
    def producer(self) -> Producer:
        """The producer to use for the next batch."""
        ...

    async def replace(self, failed: Producer) -> None:
        """Replace a failed producer. Raises KafkaError."""
        ...

    def failed(self) -> None:
        """Count a request that Kafka did not accept and that is repeated."""
        ...

    def acknowledged(self, batch: list[Entry], size: int, seconds: float) -> None:
        """Settle the records of a batch of `size` bytes that took `seconds` to be acknowledged."""
        ...

    def sender_ended(self, task: asyncio.Task[None]) -> None:
        """Report the exception of a sender that crashed."""
        ...


class LingerScheduler:
    """Decides when batches leave: at once after a pause of `linger_s`, else all together once per `linger_s`.

    aiokafka puts the batches that are ready for one broker into one request, and a request costs as much as dozens of
    records. If each partition had a linger of its own, the batches would be spread over many requests.
    """

    def __init__(self, linger_s: float) -> None:
        self._linger_s = linger_s
        self._loop = asyncio.get_running_loop()
        self._last = -linger_s
        self._timer: asyncio.Handle | None = None
        self._is_hurried = False
        self._waiting: list[PartitionSender] = []

    def ask(self, sender: PartitionSender, *, at_once: bool) -> None:
        """Have `sender.leave` called together with the other senders that wait."""
        self._waiting.append(sender)
        if at_once:
            self.hurry()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._last + self._linger_s, self._leave)

    def hurry(self) -> None:
        """Let all waiting senders leave in the next iteration of the loop. Repeated calls do not postpone it."""
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
    """The queue of one partition, and the task that sends it batch by batch."""

    def __init__(
        self,
        owner: BatchOwner,
        partition: TopicPartition,
        linger: LingerScheduler,
        acls: RequiredAcls | None = None,
    ) -> None:
        self._owner = owner
        self._partition = partition
        self._linger = linger
        self._acls = acls
        self._outage_log = OutageLog("sink.recovered", to=str(partition))
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Entry] = deque()
        self._may_leave = False
        self._waiter: asyncio.Future[None] | None = None  # of the task, until the queue may leave
        self._empty = asyncio.Event()
        self._empty.set()
        self._is_idle = True  # the queue is empty and no batch is in flight
        self._is_waiting = False  # for the linger scheduler
        self._is_urgent = False
        self._task = asyncio.create_task(self._run(), name=f"sender {partition}")
        self._task.add_done_callback(owner.sender_ended)

    def put(self, entry: Entry) -> None:
        """Append a record to the queue."""
        self._queue.append(entry)
        if self._is_idle:
            self._is_idle = False
            self._empty.clear()
            self._ask()

    def hurry(self) -> None:
        """Send the queue without linger: now, or directly after the batch that is in flight."""
        self._is_urgent = True
        if self._is_waiting:
            self._linger.hurry()

    def leave(self) -> None:
        """Send the queue. Called by the linger scheduler."""
        self._is_waiting = self._is_urgent = False
        self._may_leave = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def idle(self) -> None:
        """Wait until every record is acknowledged or refused."""
        await self._empty.wait()

    async def stop(self) -> None:
        """End the task. Never raises, also if the task crashed."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def _ask(self) -> None:
        self._is_waiting = True
        self._linger.ask(self, at_once=self._is_urgent)

    async def _run(self) -> None:
        while True:
            while not self._may_leave:
                self._waiter = self._loop.create_future()
                await self._waiter
            self._may_leave = False
            (batch, size), began = self._next_batch(), monotonic()
            await self._deliver(batch)
            self._owner.acknowledged(batch, size, monotonic() - began)
            if self._queue:
                self._ask()
            else:
                self._is_idle = True
                self._empty.set()

    def _next_batch(self) -> tuple[list[Entry], int]:
        """Take the records of the next batch from the queue; return them and their size in bytes."""
        queue = self._queue
        batch = [queue.popleft()]
        _, _, total = batch[0]
        while queue and total + (size := queue[0][2]) <= BATCH_BYTES:
            total += size
            batch.append(queue.popleft())
        return batch, total

    async def _deliver(self, batch: list[Entry]) -> None:
        """Send a batch until the broker has acknowledged it.

        A batch that the broker refuses for its size is sent in halves, down to single records. A single record that is
        refused sets its receipt's `error`.
        """
        while True:
            producer = self._owner.producer
            try:
                first = await self._send(producer, batch)
            except (MessageSizeTooLargeError, RecordListTooLargeError):
                await self._replace(producer)
                await self._deliver_in_halves(batch)
            except ForeignKafkaError as error:
                self._failed("sink.batch_failed", error, records=len(batch))
                await self._replace(producer)
                continue
            else:
                if first is not None:
                    for offset, (envelope, _, _) in enumerate(batch, first):
                        envelope.receipt.offset = offset
            self._outage_log.worked()
            return

    async def _send(self, producer: Producer, batch: list[Entry]) -> int | None:
        """Send a batch and wait for its acknowledgement; return the first record's offset if it is kept and known."""
        acknowledged = await producer.send_batch(
            RecordBatch(batch, compression=self._owner.compression),
            self._partition.topic,
            partition=self._partition.partition,
        )
        metadata = await acknowledged
        return metadata.offset if self._owner.keeps_offsets and metadata.offset >= 0 else None

    async def _deliver_in_halves(self, batch: list[Entry]) -> None:
        if len(batch) == 1:
            envelope, _, size = batch[0]
            envelope.receipt.error = RecordTooLarge(
                f"the broker refused a record of {size} bytes for {self._partition}"
            )
            log.error("sink.record_refused", to=str(self._partition), bytes=size)
            return
        middle = len(batch) // 2
        await self._deliver(batch[:middle])
        await self._deliver(batch[middle:])

    async def _replace(self, producer: Producer) -> None:
        while True:
            try:
                return await self._owner.replace(producer)
            except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept and sent again
                self._failed("sink.unavailable", error)
                await asyncio.sleep(_BACKOFF_S)

    def _failed(self, event: str, error: Exception, **facts: object) -> None:
        self._outage_log.failed(event, monotonic(), **facts, reason=describe_error(error, self._acls))
        self._owner.failed()
