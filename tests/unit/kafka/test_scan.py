"""`LogScanner`: ranges of offsets, ends and times, and the consumers that its scans share."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import CorruptRecordException, KafkaConnectionError, TopicAuthorizationFailedError

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaError, KafkaRefused, KafkaUnavailable
from streamworker.kafka.acls import RequiredAcls
from streamworker.kafka.compat import positions_of
from streamworker.kafka.scan import LogScanner, is_aborted
from streamworker.model import TopicPartition
from tests.memory_kafka import ABORTED, MARKER, OPEN
from tests.turnable import quiet
from tests.unit.kafka.fakes import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.memory_kafka import MemoryKafka

AT = TopicPartition("t", 0)


@pytest.fixture
async def scanner(kafka: MemoryKafka) -> AsyncIterator[LogScanner]:
    """A scanner of the cluster, which has closed every consumer afterwards."""
    scanner = LogScanner(KafkaSettings())
    yield scanner
    await scanner.stop()
    assert all(consumer.is_stopped for consumer in kafka.consumers)


def write(kafka: MemoryKafka, *values: bytes, state: str = "committed", timestamp: int = 0) -> None:
    for value in values:
        kafka.write("t", value, partition=0, state=state, timestamp=timestamp)


async def scanned(
    scanner: LogScanner, start: int, stop: int, *, committed_only: bool = False, **over: Any
) -> list[bytes | None]:
    """Return the values of a range; no batch may be empty."""
    values: list[bytes | None] = []
    async for batch in scanner.scan(AT, start, stop, committed_only=committed_only, **over):
        assert batch
        values += [record.value for record in batch]
    return values


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [
        (0, 4, [b"a", b"b", b"c", b"d"]),
        (1, 3, [b"b", b"c"]),
        (3, 4, [b"d"]),
        (2, 2, []),
        (3, 1, []),
    ],
)
async def test_scan_yields_the_records_of_its_range(
    kafka: MemoryKafka, scanner: LogScanner, start: int, stop: int, found: list[bytes]
) -> None:
    """The record at `stop` is not part of it; an empty range connects no consumer."""
    write(kafka, b"a", b"b", b"c", b"d")

    assert await scanned(scanner, start, stop) == found
    assert len(kafka.consumers) == bool(found)


async def test_scan_of_a_range_without_records_ends(kafka: MemoryKafka, scanner: LogScanner) -> None:
    """Markers and aborted records are passed: a scan that waited for a record would never end."""
    write(kafka, b"a")
    write(kafka, b"rolled back", state=ABORTED)
    write(kafka, b"", state=MARKER)

    assert await scanned(scanner, 1, 3, committed_only=True) == []
    assert await scanned(scanner, 0, 3, committed_only=True) == [b"a"]


async def test_scan_ends_at_its_stop_though_the_log_grows(kafka: MemoryKafka, scanner: LogScanner) -> None:
    """A replay hands its reader to the tail at this offset: a record more would be returned twice."""
    write(kafka, b"a", b"b")
    batches = scanner.scan(AT, 0, 2, committed_only=False)
    async with aclosing(batches):
        write(kafka, b"c", b"d")

        assert [[record.value for record in batch] async for batch in batches] == [[b"a", b"b"]]


async def test_scan_asks_for_no_more_records_than_its_range_has(
    kafka: MemoryKafka, scanner: LogScanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one costs the time to decode it."""
    write(kafka, b"a", b"b", b"c", b"d")
    await scanned(scanner, 0, 1)
    consumer: Any = kafka.consumers[0]
    getmany, limits = consumer.getmany, []

    def counting(*, timeout_ms: int, max_records: int) -> Any:
        limits.append(max_records)
        return getmany(timeout_ms=timeout_ms, max_records=max_records)

    monkeypatch.setattr(consumer, "getmany", counting)
    assert await scanned(scanner, 1, 3) == [b"b", b"c"]
    assert limits == [2]


async def test_scan_over_deleted_records_yields_those_that_are_left(
    kafka: MemoryKafka, scanner: LogScanner
) -> None:
    """The consumer starts at the new beginning."""
    write(kafka, b"a", b"b", b"c")
    kafka.log("t").beginning = 2

    assert await scanned(scanner, 0, 3) == [b"c"]


@pytest.mark.parametrize(
    ("over", "found"),
    [
        ({"committed_only": True}, [b"a", b"d"]),
        ({"committed_only": False}, [b"a", b"rolled back", b"d"]),
        ({"committed_only": True, "with_aborted": True}, [b"a", b"rolled back", b"d"]),
    ],
)
async def test_scan_returns_aborted_records_as_its_isolation_says(
    kafka: MemoryKafka, scanner: LogScanner, over: Any, found: list[bytes]
) -> None:
    """Only a scan `with_aborted` can recognize them."""
    write(kafka, b"a")
    write(kafka, b"rolled back", state=ABORTED)
    write(kafka, b"", state=MARKER)
    write(kafka, b"d")

    assert await scanned(scanner, 0, 4, **over) == found
    async for batch in scanner.scan(AT, 0, 4, **over):
        marked = [record.value for record in batch if is_aborted(record)]
        assert marked == ([b"rolled back"] if over.get("with_aborted") else [])


async def test_consumers_are_kept_for_scans_of_the_same_isolation(
    kafka: MemoryKafka, scanner: LogScanner
) -> None:
    """A consumer that returns aborted records must not be lent to a scan that must not return them."""
    write(kafka, b"a")
    for _ in range(3):
        await scanned(scanner, 0, 1)
        await scanned(scanner, 0, 1, committed_only=True)
        await scanned(scanner, 0, 1, committed_only=True, with_aborted=True)

    assert [consumer.arguments["isolation_level"] for consumer in kafka.consumers] == [
        "read_uncommitted",
        "read_committed",
        "read_committed",
    ]
    assert [positions_of(consumer) for consumer in kafka.consumers] == [
        {},
        {},
        {},
    ]  # an idle one fetches nothing


async def test_consumer_of_a_scan_that_was_closed_early_is_kept(
    kafka: MemoryKafka, scanner: LogScanner
) -> None:
    """A reader that found its record needs no more; the next scan starts where it must."""
    write(kafka, b"a", b"b")
    async with aclosing(scanner.scan(AT, 0, 2, committed_only=False)) as batches:
        await anext(batches)

    assert await scanned(scanner, 0, 2) == [b"a", b"b"]
    assert len(kafka.consumers) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KafkaConnectionError("away"), KafkaUnavailable),
        (CorruptRecordException("crc"), KafkaError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a header's name"), KafkaUnavailable),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_consumer_of_a_failed_scan_is_closed(
    kafka: MemoryKafka, scanner: LogScanner, error: Exception, expected: type[KafkaError]
) -> None:
    """The error is translated and names the partition; the next scan has a consumer of its own."""
    write(kafka, b"a")
    kafka.errors["getmany"].append(error)
    with pytest.raises(expected, match=r"reading t-0: "):
        await scanned(scanner, 0, 1)
    assert kafka.consumers[0].is_stopped

    assert await scanned(scanner, 0, 1) == [b"a"]
    assert len(kafka.consumers) == 2


async def test_cancelled_scan_closes_its_consumer_and_frees_its_slot(
    kafka: MemoryKafka, scanner: LogScanner
) -> None:
    """Otherwise four clients that disconnect would end all reading of this process."""
    write(kafka, b"a")
    for _ in range(5):
        scan = asyncio.create_task(scanned(scanner, 0, 2))  # waits for the second record
        await quiet()
        scan.cancel()
        await asyncio.wait([scan])

    assert [consumer.is_stopped for consumer in kafka.consumers] == [True] * 5
    assert await scanned(scanner, 0, 1) == [b"a"]


async def test_at_most_four_scans_run_at_once(kafka: MemoryKafka, scanner: LogScanner) -> None:
    """The fifth one waits for a slot, and then uses the consumer that was returned."""
    write(kafka, b"a")
    scans = [asyncio.create_task(scanned(scanner, 0, 2)) for _ in range(6)]
    await quiet()
    assert len(kafka.consumers) == 4

    write(kafka, b"b")
    assert await asyncio.gather(*scans) == [[b"a", b"b"]] * 6
    assert len(kafka.consumers) == 4


async def test_consumer_that_cannot_connect_is_closed(kafka: MemoryKafka, scanner: LogScanner) -> None:
    """And its slot is free again."""
    kafka.errors["start"].extend([KafkaConnectionError("away")] * 5)
    for _ in range(5):
        with pytest.raises(KafkaUnavailable, match="connecting to localhost:9092"):
            await scanned(scanner, 0, 1)
    write(kafka, b"a")

    assert await scanned(scanner, 0, 1) == [b"a"]


# Ends and times


async def test_end_is_the_committed_one_on_request(kafka: MemoryKafka, scanner: LogScanner) -> None:
    """An open transaction hides its records, and those after it, from committed readers."""
    write(kafka, b"a")
    write(kafka, b"b", state=OPEN)
    write(kafka, b"c")

    assert await scanner.end(AT, committed_only=False) == 3
    assert await scanner.end(AT, committed_only=True) == 1
    assert await scanner.beginning(AT) == 0
    kafka.log("t").beginning = 1
    assert await scanner.beginning(AT) == 1


@pytest.mark.parametrize(
    ("time_ms", "offset"),
    [(-60_000, 0), (0, 0), (100, 0), (101, 2), (200, 2), (201, 3)],
    ids=["before the epoch", "epoch", "first", "later", "last", "future"],
)
async def test_offset_at_a_time_is_that_of_the_first_record_since(
    kafka: MemoryKafka, scanner: LogScanner, time_ms: int, offset: int
) -> None:
    """Without such a record it is the end; a broker refuses a negative time."""
    write(kafka, b"a", b"b", timestamp=100)
    write(kafka, b"c", timestamp=200)

    assert await scanner.offset_at(AT, time_ms) == offset


async def test_scouts_are_connected_once_and_never_fetch(kafka: MemoryKafka, scanner: LogScanner) -> None:
    """A request behind a pending fetch would wait for it, so scans have consumers of their own."""
    write(kafka, b"a")
    await asyncio.gather(*(scanner.end(AT, committed_only=flag) for flag in (True, False) * 5))
    await scanner.beginning(AT)
    await scanner.offset_at(AT, 5)
    assert len(kafka.consumers) == 2

    await scanned(scanner, 0, 1)
    assert [consumer.seeks for consumer in kafka.consumers] == [[], [], [(0, 0)]]


async def test_partitions_of_a_topic_are_counted_and_a_missing_one_is_refused(
    kafka: MemoryKafka, scanner: LogScanner
) -> None:
    """The metadata of all topics is read: a request for one topic by its name may create it."""
    assert await scanner.partitions("t") == 2
    with pytest.raises(KafkaRefused, match="topic absent does not exist"):
        await scanner.partitions("absent")
    assert set(kafka.topics) == {"t"}


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("end_offsets", lambda scanner: scanner.end(AT, committed_only=True)),
        ("beginning_offsets", lambda scanner: scanner.beginning(AT)),
        ("offsets_for_times", lambda scanner: scanner.offset_at(AT, 5)),
        ("fetch_all_metadata", lambda scanner: scanner.partitions("t")),
    ],
    ids=["end", "beginning", "offset_at", "partitions"],
)
async def test_refusal_of_a_lookup_names_the_missing_acl(kafka: MemoryKafka, method: str, call: Any) -> None:
    """With the command that adds it, as everywhere; the scout is still good for the next request."""
    made = settings(topics__events="t")
    scanner = LogScanner(made.kafka, RequiredAcls.of_gateway(made))
    kafka.errors[method].append(TopicAuthorizationFailedError("t"))
    with pytest.raises(KafkaRefused, match=r"lacks READ on topic t, to read events: kafka-acls.sh --add"):
        await call(scanner)

    await call(scanner)
    assert len(kafka.consumers) == 1
    await scanner.stop()


async def test_stop_closes_all_consumers_though_some_fail_or_hang(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds are the limit for all of them together, not for each."""
    scanner = LogScanner(KafkaSettings())
    write(kafka, b"a")
    await scanned(scanner, 0, 1)
    await scanned(scanner, 0, 1, committed_only=True)
    await scanner.end(AT, committed_only=False)
    loop = asyncio.get_running_loop()

    async def hang() -> None:
        await loop.create_future()

    monkeypatch.setattr(kafka.consumers[0], "stop", hang)
    monkeypatch.setattr(kafka.consumers[1], "stop", hang)
    kafka.errors["stop"].append(KafkaConnectionError("away"))
    began = loop.time()
    await scanner.stop()

    assert 2 <= loop.time() - began < 3
    assert kafka.consumers[2].is_stopped
