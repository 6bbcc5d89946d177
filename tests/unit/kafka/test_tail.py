"""`TopicTail`: no record is skipped or returned twice, whatever happens to consumers, partitions and positions."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError, StaleMetadata, TopicAuthorizationFailedError
from structlog.testing import capture_logs

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.kafka.tail import TopicTail
from tests.memory_kafka import ABORTED, MARKER, OPEN
from tests.turnable import quiet, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.memory_kafka import MemoryConsumer, MemoryKafka


class Reader:
    """Notes what a tail returns: values by partition, and all positions in order."""

    def __init__(self) -> None:
        self.values: dict[int, list[bytes | None]] = {0: [], 1: [], 2: []}
        self.positions: list[tuple[int, int, int]] = []
        self.error: Exception | None = None

    def __call__(self, partition: int, records: Sequence[Any], position: int) -> None:
        if self.error is not None:
            raise self.error
        self.values[partition] += [record.value for record in records]
        self.positions.append((partition, len(records), position))


@asynccontextmanager
async def following(reader: Reader, *, committed_only: bool = False, **over: Any) -> AsyncIterator[TopicTail]:
    """Follow the topic `t` until the block is left."""
    tail = TopicTail(KafkaSettings(), "t", reader, committed_only=committed_only, **over)
    await tail.start()
    try:
        yield tail
    finally:
        await tail.stop()


@pytest.fixture
def reader() -> Reader:
    """The function that a tail calls."""
    return Reader()


def write(kafka: MemoryKafka, *values: bytes, partition: int = 0, state: str = "committed") -> None:
    for value in values:
        kafka.write("t", value, partition=partition, state=state)


async def read(reader: Reader, *values: bytes, partition: int = 0) -> None:
    """Wait until the tail has returned these values of a partition, and no others."""
    await until(lambda: len(reader.values[partition]) >= len(values))
    await quiet()
    assert reader.values[partition] == list(values)


async def test_tail_without_start_reads_from_the_end_at_its_start(kafka: MemoryKafka, reader: Reader) -> None:
    """Records of the past belong to scans; the positions are complete when `start` returns."""
    write(kafka, b"old", b"older")
    async with following(reader) as tail:
        assert tail.positions == {0: 2, 1: 0}
        write(kafka, b"new")
        write(kafka, b"other", partition=1)

        await read(reader, b"new")
        await read(reader, b"other", partition=1)
        assert tail.positions == {0: 3, 1: 1}


async def test_tail_reports_each_read_behind_its_records(kafka: MemoryKafka, reader: Reader) -> None:
    """Of all partitions that it returned."""
    seen: list[dict[int, list[bytes | None]]] = []
    async with following(reader, on_read=lambda: seen.append({at: list(reader.values[at]) for at in (0, 1)})):
        write(kafka, b"a", b"b")
        write(kafka, b"x", partition=1)
        await until(lambda: bool(seen) and seen[-1] == {0: [b"a", b"b"], 1: [b"x"]})
        write(kafka, b"c")
        await until(lambda: seen[-1] == {0: [b"a", b"b", b"c"], 1: [b"x"]})


async def test_tail_with_start_reads_from_its_offsets(kafka: MemoryKafka, reader: Reader) -> None:
    """A partition that `start` does not name is read from its beginning."""
    write(kafka, b"a", b"b", b"c")
    write(kafka, b"x", partition=1)
    async with following(reader, start={0: 1}):
        await read(reader, b"b", b"c")
        await read(reader, b"x", partition=1)


async def test_tail_of_a_missing_topic_is_refused_and_leaves_no_consumer(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """The message names the command that creates it."""
    kafka.topics.clear()
    with pytest.raises(KafkaRefused, match="topic t does not exist: create it with `streamworker topics"):
        async with following(reader):
            pass

    assert [consumer.is_stopped for consumer in kafka.consumers] == [True]


async def test_tail_whose_first_connection_fails_raises_it_translated(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """`start` does not retry: its caller decides, and has no task to stop."""
    kafka.errors["start"].append(KafkaConnectionError("no route"))
    with pytest.raises(KafkaUnavailable, match=r"connecting to localhost:9092 to read t: .*no route"):
        async with following(reader):
            pass

    assert kafka.consumers[0].is_stopped


@pytest.mark.parametrize(
    "error",
    [
        KafkaConnectionError("the broker restarts"),
        TopicAuthorizationFailedError("t"),
        ConnectionResetError("reset"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a header's name"),
        "the fetch task ends",
    ],
    ids=lambda error: type(error).__name__,
)
async def test_tail_whose_consumer_fails_continues_at_its_positions(
    kafka: MemoryKafka, reader: Reader, error: Any
) -> None:
    """Another consumer reads on: records that were written meanwhile are returned, and none twice."""
    with capture_logs() as logs:
        async with following(reader):
            write(kafka, b"a", b"b")
            await read(reader, b"a", b"b")
            if isinstance(error, str):
                kafka.consumers[0].stop_fetching()
            else:
                kafka.errors["getmany"].append(error)
            await until(lambda: kafka.consumers[0].is_stopped)
            write(kafka, b"c")

            await read(reader, b"a", b"b", b"c")

    assert [consumer.is_stopped for consumer in kafka.consumers] == [True, True]
    assert [entry["event"] for entry in logs] == ["tail.unavailable", "tail.recovered"]
    assert logs[0]["reason"].startswith("reading t: ")


async def test_tail_waits_between_connections_that_fail(kafka: MemoryKafka, reader: Reader) -> None:
    """A broker that is away for ten seconds costs some twenty connections, not thousands, and one log line."""
    loop = asyncio.get_running_loop()
    with capture_logs() as logs:
        async with following(reader):
            write(kafka, b"a")
            await read(reader, b"a")
            kafka.errors["getmany"].append(KafkaConnectionError("away"))
            kafka.errors["start"].extend([KafkaConnectionError("away")] * 20)
            await until(lambda: kafka.consumers[0].is_stopped)
            began = loop.time()
            write(kafka, b"b")
            await read(reader, b"a", b"b")
            took_s = loop.time() - began

    assert 10 <= took_s <= 12
    assert len(kafka.consumers) == 22
    assert [entry["event"] for entry in logs].count("tail.unavailable") < 4


async def test_tail_survives_a_broker_that_does_not_know_the_topic_yet(
    kafka: MemoryKafka, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that has just started has no metadata; the topic that was followed is not declared missing."""
    monkeypatch.setattr("streamworker.kafka.tail.monotonic", asyncio.get_running_loop().time)
    with capture_logs() as logs:
        async with following(reader) as tail:
            topic = kafka.topics.pop("t")
            kafka.errors["getmany"].append(StaleMetadata("the topic is gone"))
            await asyncio.sleep(12)  # until the second line of the outage
            kafka.topics["t"] = topic
            write(kafka, b"a")

            await read(reader, b"a")
            assert tail.positions == {0: 1, 1: 0}
    reasons = [entry["reason"] for entry in logs if entry["event"] == "tail.unavailable"]
    assert reasons[1:] == ["reading t: the topic is not in the broker's metadata"]


async def test_tail_passes_what_a_committed_reader_does_not_return(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """Markers and aborted records move the position, once, so that subscribers do not wait for them."""
    async with following(reader, committed_only=True) as tail:
        write(kafka, b"rolled back", state=ABORTED)
        write(kafka, b"", state=MARKER)
        await until(lambda: tail.positions[0] == 2)
        write(kafka, b"a")
        await read(reader, b"a")
        await asyncio.sleep(60)

    assert reader.positions == [(0, 0, 2), (0, 1, 3)]


async def test_tail_of_committed_records_waits_for_the_end_of_a_transaction(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """An uncommitted tail of the same topic returns the record at once."""
    uncommitted = Reader()
    async with following(reader, committed_only=True) as tail, following(uncommitted):
        write(kafka, b"a", state=OPEN)
        await read(uncommitted, b"a")
        assert (tail.positions[0], reader.values[0]) == (0, [])

        kafka.log("t").states[0] = "committed"
        kafka.changed()
        await read(reader, b"a")


async def test_tail_where_retention_deleted_the_position_reads_from_the_new_beginning(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """What is still there is returned; nothing later is skipped."""
    write(kafka, b"a", b"b", b"c", b"d")
    kafka.log("t").beginning = 2
    async with following(reader, start={0: 0}):
        await read(reader, b"c", b"d")


async def test_tail_of_a_log_that_lost_its_end_returns_the_new_records(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """Its position then decreases, which the reader is notified of with the records."""
    async with following(reader) as tail:
        write(kafka, b"a", b"b", b"c")
        await read(reader, b"a", b"b", b"c")
        kafka.log("t").truncate(1)
        write(kafka, b"d")
        await until(lambda: reader.values[0][-1] == b"d")

        assert tail.positions[0] == 2
        assert reader.positions[-1][2] == 2


def replace_topic(kafka: MemoryKafka, partitions: int) -> None:
    """Delete the topic `t` and create it again."""
    del kafka.topics["t"]
    kafka.create("t", partitions)


async def test_tail_of_a_topic_that_was_replaced_reads_it_from_its_beginning(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """Also where the new log is longer than the old one was, and its positions look right."""
    async with following(reader) as tail:
        write(kafka, b"a", b"b")
        await read(reader, b"a", b"b")
        replace_topic(kafka, 2)
        write(kafka, b"c", b"d", b"e", b"f")
        reader.values[0].clear()
        tail.restart(2)

        await read(reader, b"c", b"d", b"e", b"f")
        assert tail.positions == {0: 4, 1: 0}


async def test_paused_partition_of_a_topic_that_was_replaced_stays_paused(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """It is read from its beginning when it is resumed."""
    async with following(reader, starts_paused=True) as tail:
        replace_topic(kafka, 2)
        write(kafka, b"a")
        tail.restart(2)
        await quiet()
        assert reader.values[0] == []
        tail.resume(0)

        await read(reader, b"a")


async def test_tail_of_a_topic_that_was_replaced_by_one_with_fewer_partitions_forgets_the_others(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """Another consumer, with fresh metadata, reads those that there are; partitions that are added later are read too."""
    kafka.create("t", 3)
    async with following(reader) as tail:
        for partition in range(3):
            write(kafka, b"old", partition=partition)
        await read(reader, b"old", partition=2)
        replace_topic(kafka, 1)
        reader.values[0].clear()
        tail.restart(1)
        assert tail.positions == {0: 0}
        write(kafka, b"a")
        await read(reader, b"a")
        await until(lambda: len(kafka.consumers) == 2)
        assert tail.positions == {0: 1}
        kafka.create("t", 2)
        write(kafka, b"x", partition=1)

        await until(lambda: reader.values[1] == [b"old", b"x"])


async def test_tail_reads_added_partitions_from_their_beginning(kafka: MemoryKafka, reader: Reader) -> None:
    """Records that were written before the new metadata arrived are returned; the other partitions go on."""
    async with following(reader) as tail:
        write(kafka, b"a")
        await read(reader, b"a")
        kafka.create("t", 3)
        write(kafka, b"x", b"y", partition=2)
        write(kafka, b"b")

        await read(reader, b"x", b"y", partition=2)
        await read(reader, b"a", b"b")
        assert tail.positions == {0: 2, 1: 0, 2: 2}
    assert len(kafka.consumers[0].seeks) == 2 + 3  # not for each fetch


async def test_paused_partition_is_not_read_until_it_is_resumed(kafka: MemoryKafka, reader: Reader) -> None:
    """The other one is read meanwhile, and no record is skipped."""
    async with following(reader) as tail:
        tail.pause(0)
        write(kafka, b"a")
        write(kafka, b"x", partition=1)
        await read(reader, b"x", partition=1)
        await asyncio.sleep(10)
        assert reader.values[0] == []

        tail.resume(0)
        await read(reader, b"a")


@pytest.mark.parametrize("starts_paused", [True, False])
async def test_paused_partition_stays_paused_in_the_next_consumer(
    kafka: MemoryKafka, reader: Reader, starts_paused: bool
) -> None:
    """And one that was resumed before the failure is read again, also in a tail that starts paused."""
    async with following(reader, start={0: 0, 1: 0}, starts_paused=starts_paused) as tail:
        tail.pause(0)
        tail.resume(1)
        kafka.errors["getmany"].append(KafkaConnectionError("the broker restarts"))
        kafka.changed()
        await until(lambda: len(kafka.consumers) == 2 and kafka.consumers[1].is_started)
        write(kafka, b"a")
        write(kafka, b"x", partition=1)

        await read(reader, b"x", partition=1)
        await asyncio.sleep(10)
        assert reader.values[0] == []
        tail.resume(0)
        await read(reader, b"a")


async def test_tail_that_starts_paused_reads_from_where_it_was_moved(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """The records before the offset are not returned."""
    write(kafka, b"a", b"b", b"c")
    async with following(reader, start={0: 0}, starts_paused=True) as tail:
        tail.move(0, 2)
        tail.resume(0)

        await read(reader, b"c")


async def test_move_holds_for_the_next_consumer(kafka: MemoryKafka, reader: Reader) -> None:
    """Also if there is no consumer at the moment."""
    write(kafka, b"a", b"b", b"c")
    async with following(reader, start={0: 0}, starts_paused=True) as tail:
        tail.move(0, 2)
        kafka.errors["getmany"].append(KafkaConnectionError("the broker restarts"))
        kafka.changed()
        await until(lambda: kafka.consumers[0].is_stopped)
        tail.move(0, 1)  # there is no consumer now
        tail.resume(0)

        await read(reader, b"b", b"c")


async def test_added_partition_of_a_tail_that_starts_paused_is_paused(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """Its owner moves it first, as it does the others."""
    async with following(reader, start={0: 0, 1: 0}, starts_paused=True) as tail:
        kafka.create("t", 3)
        write(kafka, b"x", partition=2)
        await until(lambda: 2 in tail.positions)
        await asyncio.sleep(10)
        assert reader.values[2] == []

        tail.resume(2)
        await read(reader, b"x", partition=2)


async def test_reader_that_raises_ends_the_tail_and_fails_crashed(kafka: MemoryKafka, reader: Reader) -> None:
    """A bug in the reader is not an outage: the tail does not reconnect and does not repeat the record."""
    async with following(reader) as tail:
        reader.error = ZeroDivisionError("a bug")
        write(kafka, b"a")
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(tail.crashed, 10)

        assert len(kafka.consumers) == 1
    assert kafka.consumers[0].is_stopped


async def test_stop_is_bounded_and_does_not_raise(
    kafka: MemoryKafka, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer that hangs in `stop`, or that fails there, is left behind after two seconds."""
    loop = asyncio.get_running_loop()
    async with following(reader) as tail:

        async def hang(_: MemoryConsumer) -> None:
            await loop.create_future()

        monkeypatch.setattr(type(kafka.consumers[0]), "stop", hang)
        began = loop.time()
        await tail.stop()
        assert 2 <= loop.time() - began < 3
        assert not tail.crashed.done()


async def test_tail_asks_brokers_for_what_its_reader_needs(kafka: MemoryKafka, reader: Reader) -> None:
    """No group, no automatic commit, the isolation of its reader, and partitions that are noticed within 30 s."""
    async with following(reader, committed_only=True, fetch_wait_ms=50), following(reader):
        committed, uncommitted = (consumer.arguments for consumer in kafka.consumers)

    assert (committed["isolation_level"], uncommitted["isolation_level"]) == (
        "read_committed",
        "read_uncommitted",
    )
    assert (committed["fetch_max_wait_ms"], uncommitted["fetch_max_wait_ms"]) == (50, 500)
    for arguments in (committed, uncommitted):
        assert arguments["group_id"] is None
        assert arguments["enable_auto_commit"] is False
        assert arguments["auto_offset_reset"] == "earliest"
        assert arguments["metadata_max_age_ms"] <= 30_000


async def test_tail_with_a_pace_reads_at_once_what_gathers_behind_many_records(
    kafka: MemoryKafka, reader: Reader
) -> None:
    """The first ones are not delayed; those that follow them share a read."""
    loop = asyncio.get_running_loop()
    many = [b"%d" % number for number in range(40)]
    async with following(reader, pace_s=5.0):
        began = loop.time()
        write(kafka, *many)
        await read(reader, *many)
        assert loop.time() - began < 0.1
        for value in (b"b", b"c", b"d"):
            write(kafka, value)
            await asyncio.sleep(1)
        assert reader.values[0] == many
        await asyncio.sleep(2.1)
        assert reader.values[0] == [*many, b"b", b"c", b"d"]
        assert [count for _, count, _ in reader.positions] == [40, 3]


async def test_tail_with_a_pace_reads_few_records_without_pauses(kafka: MemoryKafka, reader: Reader) -> None:
    """A record of a quiet topic does not wait for others."""
    loop = asyncio.get_running_loop()
    async with following(reader, pace_s=5.0):
        began = loop.time()
        for number in range(1, 11):
            write(kafka, b"x")
            await read(reader, *[b"x"] * number)
        assert loop.time() - began < 1


async def test_tail_with_a_pace_reads_a_backlog_without_pauses(kafka: MemoryKafka, reader: Reader) -> None:
    """A pause would limit its rate; other tasks run between two reads."""
    loop = asyncio.get_running_loop()
    write(kafka, *[b"%d" % number for number in range(10_001)])
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    began = loop.time()
    async with following(reader, start={0: 0, 1: 0}, pace_s=5.0):
        await until(lambda: len(reader.values[0]) >= 10_001, every_s=0)
        took = loop.time() - began
    counting.cancel()

    assert took < 1
    assert turns > 5
