"""The state topic of batches, over a broker in memory: what is read before the gateway is ready, and after each write."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.gateway.batches import topic as module
from streamworker.gateway.batches.records import (
    CancellationRecord,
    FileRecord,
    cancellation_key,
    write_state,
)
from streamworker.gateway.batches.topic import StateTopic
from streamworker.gateway.feeds import BrokerUnavailable
from tests.turnable import quiet
from tests.unit.batch.logs import LogInMemory
from tests.unit.gateway.batches import BATCH, a_batch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from streamworker.model import ProducerRecord, TopicPartition

PARTITIONS = 3


def a_file(number: int) -> FileRecord:
    """Return a file."""
    return FileRecord(
        id=f"file-{number}", tenant="", bytes=1, created_at=1, expires_at=2, filename="f", purpose="batch"
    )


class Tail:
    """Takes the place of `TopicTail`: the test says when it reads."""

    def __init__(
        self, _: Any, topic: str, read: Callable[..., None], *, committed_only: bool, start: Mapping[int, int]
    ) -> None:
        assert (topic, committed_only) == ("batches", True)
        self.positions = dict(start)
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_running = False
        self.read = read

    async def start(self) -> None:
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False


class Receipt:
    """Settles when the broker acknowledges."""

    def __init__(self, broker: Broker) -> None:
        self.offset: int | None = None
        self._broker = broker

    async def settled(self) -> None:
        await self._broker.acknowledges.wait()


class Sink:
    """Takes the place of `KafkaSink`."""

    def __init__(self, broker: Broker, topics: list[str], *, keeps_offsets: bool) -> None:
        assert (topics, keeps_offsets) == ([], True)
        self.broker = broker
        self.has_room = True
        self.is_running = False

    async def start(self) -> None:
        self.is_running = True

    async def stop(self) -> None:
        self.is_running = False

    async def require(self, topic: str) -> None:
        await self.broker.log.partitions(topic)

    def receipt(self) -> Receipt:
        return Receipt(self.broker)

    def publish(self, record: ProducerRecord, receipt: Receipt) -> None:
        at: TopicPartition = record.topic_partition
        assert record.key is not None
        receipt.offset = self.broker.log.write(at.topic, at.partition, record.key.decode(), record.value)
        if self.broker.is_following:
            self.broker.deliver()


class Broker:
    """The topic, and the clients that a `StateTopic` has made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = LogInMemory({"batches": PARTITIONS})
        self.acknowledges = asyncio.Event()
        self.acknowledges.set()
        self.is_following = True
        """Whether a record is read as soon as it is written."""
        self.tails: list[Tail] = []
        self.sinks: list[Sink] = []

        def tail(*arguments: Any, **options: Any) -> Tail:
            self.tails.append(Tail(*arguments, **options))
            return self.tails[-1]

        def sink(_: Any, topics: list[str], **options: Any) -> Sink:
            self.sinks.append(Sink(self, topics, **options))
            return self.sinks[-1]

        monkeypatch.setattr(module, "TopicTail", tail)
        monkeypatch.setattr(module, "KafkaSink", sink)
        monkeypatch.setattr(module, "LogScanner", lambda _: self.log)

    def write(self, partition: int, key: str, value: bytes | None) -> None:
        """Write a record as another gateway does."""
        self.log.write("batches", partition, key, value)

    def deliver(self) -> None:
        """Have the last tail read everything that was written."""
        [*_, tail] = self.tails
        for at, records in self.log.records.items():
            if new := records[tail.positions[at.partition] :]:
                tail.positions[at.partition] = len(records)
                tail.read(at.partition, new, len(records))


@pytest.fixture
async def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Return an empty topic with three partitions."""
    return Broker(monkeypatch)


class Case:
    """A topic, and the ids that it has reported."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.changed: list[str] = []
        settings = KafkaSettings().model_copy(update={"request_timeout_s": timeout_s})
        self.topic = StateTopic(settings, "batches", self.changed.append)


@pytest.fixture
async def case(broker: Broker) -> AsyncIterator[Case]:
    """Return a topic that has started."""
    del broker
    made = Case()
    await made.topic.start()
    yield made
    await made.topic.stop()


async def test_state_is_ready_when_it_was_read_to_its_end(broker: Broker) -> None:
    """A gateway that serves a part of it would answer 404 for files that exist."""
    for number in range(3):
        broker.write(number, f"file-{number}", write_state(a_file(number)))
    case = Case()
    starting = asyncio.create_task(case.topic.start())
    await quiet()
    assert not case.topic.is_ready
    assert not starting.done()
    broker.deliver()
    await starting

    assert case.topic.is_ready
    assert [case.topic.table.file(f"file-{number}") for number in range(3)] == [a_file(n) for n in range(3)]
    assert sorted(case.changed) == ["file-0", "file-1", "file-2"]
    assert broker.log.is_stopped
    await case.topic.stop()


async def test_state_that_is_not_read_in_time_is_unavailable(broker: Broker) -> None:
    """The gateway tries again, and is not ready meanwhile."""
    broker.write(0, "file-0", write_state(a_file(0)))
    case = Case(0.01)
    with pytest.raises(KafkaUnavailable, match=r"topic batches: records were not read within 0\.01 s"):
        await case.topic.start()

    assert not case.topic.is_ready
    await case.topic.stop()
    assert [tail.is_running for tail in broker.tails] == [False]


async def test_topic_that_does_not_exist_is_refused(broker: Broker) -> None:
    """The scanner is closed all the same."""
    del broker.log.numbers["batches"]
    with pytest.raises(KafkaRefused, match="topic batches does not exist"):
        await Case().topic.start()

    assert broker.log.is_stopped
    assert (broker.tails, broker.sinks) == ([], [])


async def test_start_after_a_failure_begins_with_an_empty_table(case: Case, broker: Broker) -> None:
    """What was deleted meanwhile must not be served; the former clients are closed."""
    await case.topic.write("file-1", "file-1", a_file(1))
    broker.log.records.clear()
    await case.topic.start()

    assert case.topic.table.file("file-1") is None
    assert [tail.is_running for tail in broker.tails] == [False, True]
    assert [sink.is_running for sink in broker.sinks] == [False, True]


async def test_write_returns_when_the_table_has_the_record(case: Case, broker: Broker) -> None:
    """A client that reads after its write finds it, at the same gateway."""
    broker.is_following = False
    writing = asyncio.create_task(case.topic.write("file-1", "file-1", a_file(1)))
    await quiet()
    assert not writing.done()
    broker.write((case.topic.partition("file-1") + 1) % PARTITIONS, "other", None)
    broker.deliver()
    await writing

    assert case.topic.table.file("file-1") == a_file(1)


async def test_records_of_a_batch_are_in_one_partition(case: Case, broker: Broker) -> None:
    """That of the batch's own id: its owner has all of them."""
    cancellation = CancellationRecord(batch_id=BATCH, requested_at=1)
    await case.topic.write(BATCH, BATCH, a_batch())
    await case.topic.write(BATCH, cancellation_key(BATCH), cancellation)
    [(at, records)] = [(at, records) for at, records in broker.log.records.items() if records]

    assert at.partition == case.topic.partition(BATCH)
    assert [record.key.decode() for record in records] == [BATCH, cancellation_key(BATCH)]
    assert case.changed == [BATCH, BATCH]


async def test_tombstone_removes_the_record(case: Case) -> None:
    """It is a record without a value."""
    await case.topic.write(BATCH, BATCH, a_batch())
    await case.topic.write(BATCH, BATCH, None)

    assert case.topic.table.batch(BATCH) is None


async def test_write_that_kafka_does_not_take_writes_nothing(case: Case, broker: Broker) -> None:
    """Before the start, after the stop, and while too many records wait."""
    with pytest.raises(BrokerUnavailable):
        await Case().topic.write("file-1", "file-1", a_file(1))
    broker.sinks[-1].has_room = False
    with pytest.raises(BrokerUnavailable, match="does not accept the state of batches"):
        await case.topic.write("file-1", "file-1", a_file(1))
    await case.topic.stop()
    with pytest.raises(BrokerUnavailable):
        await case.topic.write("file-1", "file-1", a_file(1))

    assert broker.log.records == {}


@pytest.mark.parametrize(
    ("acknowledges", "error", "message"),
    [
        (False, BrokerUnavailable, r"did not acknowledge the record within 0\.01 s"),
        (True, KafkaUnavailable, r"records were not read within 0\.01 s"),
    ],
)
async def test_write_that_is_not_confirmed_in_time_is_an_error(
    broker: Broker, *, acknowledges: bool, error: type[Exception], message: str
) -> None:
    """Whether it is the acknowledgement or the reading that is late: the record may be there."""
    case = Case(0.01)
    await case.topic.start()
    broker.is_following = False
    if not acknowledges:
        broker.acknowledges.clear()
    with pytest.raises(error, match=message):
        await case.topic.write("file-1", "file-1", a_file(1))
    broker.deliver()

    assert case.topic.table.file("file-1") == a_file(1)
    await case.topic.stop()


async def test_write_does_not_wait_for_a_tail_that_was_replaced(case: Case, broker: Broker) -> None:
    """The new one reads the whole topic before anything is served."""
    broker.is_following = False
    writing = asyncio.create_task(case.topic.write("file-1", "file-1", a_file(1)))
    await quiet()
    await case.topic.stop()
    broker.tails[-1].read(0, [], 0)

    await asyncio.wait_for(writing, 1)


async def test_write_that_is_acknowledged_after_the_stop_returns(case: Case, broker: Broker) -> None:
    """The record is in Kafka, and no table of this process will have it."""
    broker.acknowledges.clear()
    broker.is_following = False
    writing = asyncio.create_task(case.topic.write("file-1", "file-1", a_file(1)))
    await quiet()
    await case.topic.stop()
    broker.acknowledges.set()

    await asyncio.wait_for(writing, 1)


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b'{"type":"other"}', b'{"type":"file"}'])
async def test_record_that_cannot_be_read_is_logged_and_skipped(
    case: Case, broker: Broker, value: bytes
) -> None:
    """With its place; those behind it are read. A newer gateway may write other types."""
    broker.write(0, "file-9", value)
    broker.write(0, "file-1", write_state(a_file(1)))
    with capture_logs() as logs:
        broker.deliver()

    assert [(entry["event"], entry["partition"], entry["offset"]) for entry in logs] == [
        ("batches.record_ignored", 0, 0)
    ]
    assert case.changed == ["file-1"]


@pytest.mark.parametrize("key", [b"\xff\xfe", None])
async def test_record_with_an_odd_key_is_harmless(case: Case, broker: Broker, key: bytes | None) -> None:
    """The value says what it is about."""
    broker.tails[-1].read(0, [SimpleNamespace(key=key, value=write_state(a_file(1)), offset=0)], 1)
    broker.tails[-1].read(0, [SimpleNamespace(key=key, value=None, offset=1)], 2)

    assert case.topic.table.file("file-1") == a_file(1)


async def test_reader_that_crashes_makes_the_state_unready(case: Case, broker: Broker) -> None:
    """An old state must not be served. The exception's text, which may have contents, is not logged."""
    with capture_logs() as logs:
        broker.tails[-1].crashed.set_exception(RuntimeError("a secret"))
        await quiet()

    assert not case.topic.is_ready
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("batches.reader_crashed", "critical")
    ]
    assert "a secret" not in str(logs)


async def test_reader_that_is_cancelled_is_not_a_crash(case: Case, broker: Broker) -> None:
    """It is how a stop ends it."""
    with capture_logs() as logs:
        broker.tails[-1].crashed.cancel()
        await quiet()

    assert (case.topic.is_ready, logs) == (True, [])
