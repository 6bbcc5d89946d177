"""Small stand-ins for aiokafka's producer and consumer, and for a broker behind them."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiokafka.errors import MessageSizeTooLargeError, ProducerClosed
from aiokafka.record.memory_records import MemoryRecords

from streamworker.config import Settings, load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.kafka.record_batch import RecordBatch
    from streamworker.model import CommitPoint, TopicPartition

__all__ = ["FakeBroker", "FakeConsumer", "FakeMembership", "FakeProducer", "records_of", "settings"]


def settings(**over: str) -> Settings:
    """Return settings that connect to nothing."""
    variables = {"STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": "http://127.0.0.1/v1"}
    return load(
        None,
        variables | {f"STREAMWORKER_{name.upper()}": value for name, value in over.items()},
        needs_keys=False,
    )


def records_of(batch: RecordBatch) -> list[Any]:
    """Decode a batch as a consumer does. Raises CorruptRecordException where its checksum is wrong."""
    decoded = MemoryRecords(bytes(batch._build())).next_batch()
    assert decoded.validate_crc()
    return list(decoded)


class FakeBroker:
    """Keeps what producers wrote. `errors` are raised by the next batches, one each."""

    def __init__(self, partitions: int = 2) -> None:
        self.partitions = partitions
        self.batches: list[list[bytes]] = []
        self.compressions: list[str] = []
        self.max_batch_bytes = 1 << 20
        self.errors: deque[Exception] = deque()
        self.is_answering = asyncio.Event()
        self.is_answering.set()
        self.producers: list[FakeProducer] = []
        self.committed: CommitPoint | None = None

    def new_producer(self, *_: object, **__: object) -> FakeProducer:
        """Stand in for `streamworker.kafka.clients.new_producer`."""
        producer = FakeProducer(self)
        self.producers.append(producer)
        return producer

    @property
    def values(self) -> list[bytes]:
        """The values of all records, in the order in which they were written."""
        return [value for batch in self.batches for value in batch]

    async def write(self, values: list[bytes]) -> None:
        """Append a batch, once the broker answers."""
        await self.is_answering.wait()
        if self.errors:
            raise self.errors.popleft()
        if sum(len(value or b"") for value in values) > self.max_batch_bytes:
            raise MessageSizeTooLargeError
        self.batches.append(values)


class FakeProducer:
    """A producer with the part of aiokafka's interface that the package uses."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.is_started = self.is_closed = False
        self.stop_error: Exception | None = None
        self.lost_answers = 0
        """How many commits are written whose response is lost."""
        self._batch: list[bytes] = []
        self._offsets: CommitPoint | None = None
        partitions = set(range(broker.partitions))
        cluster = SimpleNamespace(partitions_for_topic=lambda _: partitions)
        self._client = SimpleNamespace(cluster=cluster, close=self._close)

    async def start(self) -> None:
        self.is_started = True

    async def stop(self) -> None:
        if self.stop_error is not None:
            raise self.stop_error
        self.is_closed = True

    async def flush(self) -> None: ...

    async def partitions_for(self, topic: str) -> set[int]:
        return set(range(self.broker.partitions))

    async def send_batch(self, batch: RecordBatch, topic: str, *, partition: int) -> asyncio.Future[None]:
        if self.is_closed:
            raise ProducerClosed
        self.broker.compressions.append(batch.compression)
        return asyncio.ensure_future(self.broker.write([record.value for record in records_of(batch)]))

    async def begin_transaction(self) -> None:
        self._batch, self._offsets = [], None

    async def send(self, topic: str, value: bytes, **_: object) -> asyncio.Future[Any]:
        self._batch.append(value)
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(SimpleNamespace(offset=len(self.broker.values) + len(self._batch) - 1))
        return done

    async def send_offsets_to_transaction(self, offsets: Mapping[Any, Any], group_id: str) -> None:
        [self._offsets] = offsets.values()

    async def commit_transaction(self) -> None:
        from aiokafka.errors import KafkaConnectionError

        from streamworker.model import CommitPoint

        await self.broker.write(self._batch)
        assert self._offsets is not None
        self.broker.committed = CommitPoint(self._offsets.offset, self._offsets.metadata)
        if self.lost_answers:
            self.lost_answers -= 1
            raise KafkaConnectionError("the connection broke")

    async def _close(self) -> None:
        self.is_closed = True


class FakeConsumer:
    """A consumer that records its seeks; the test calls the listener that subscribed."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.listener: Any = None
        self.assignor: Any = None
        self.calls: list[tuple[Any, ...]] = []
        self.is_stopped = False
        self.topic_id = b"first"
        self.error: Exception | None = None
        """Raised by `getmany`."""
        self._client = None

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.is_stopped = True

    async def getmany(self, *_: object, **__: object) -> dict[Any, list[Any]]:
        if self.error is not None:
            raise self.error
        return {}

    def subscribe(self, topics: list[str], *, listener: Any) -> None:
        self.listener = listener

    def seek(self, partition: Any, offset: int) -> None:
        self.calls.append(("seek", tuple(partition), offset))

    def pause(self, partition: Any) -> None:
        self.calls.append(("pause", tuple(partition)))

    def resume(self, partition: Any) -> None:
        self.calls.append(("resume", tuple(partition)))


class FakeMembership:
    """A membership whose identity the test sets."""

    def __init__(self, consumer: FakeConsumer, *, on_heartbeat: Any) -> None:
        self.identity = ("member-1", 1)
        self.is_rejoining = self.is_joining = self.has_died = False
        self.refusal = 0
        self.knows_coordinator = True

        self.rejoins = 0
        """How often a rebalance was asked for."""
        self.heartbeats = 0
        self.is_given_up = False
        """Whether a static member leaves the group when the consumer stops."""

    def give_up_instance(self) -> None:
        self.is_given_up = True

    def check_errors(self) -> None: ...

    def request_rejoin(self) -> None:
        self.rejoins += 1

    async def heartbeat(self) -> bool:
        self.heartbeats += 1
        return True


class FakeCommittedOffsets:
    """The committed offset of the broker, for every partition."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker

    async def read(self, _: TopicPartition) -> CommitPoint | None:
        return self._broker.committed

    async def start_point(self, _: TopicPartition, committed: CommitPoint) -> CommitPoint:
        return committed


class Member:
    """A consumer whose membership the test sets."""

    is_member = True

    async def confirm_membership(self) -> bool:
        return self.is_member
