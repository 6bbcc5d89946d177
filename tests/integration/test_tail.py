"""The readers without a group: tails and scans, on Apache Kafka."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.admin import NewPartitions

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused
from streamworker.kafka.scan import LogScanner, _Isolation
from streamworker.kafka.tail import TopicTail
from streamworker.model import TopicPartition
from tests.integration.stage import eventually
from tests.integration.test_brokers import admin, create, producer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from tests.brokers.apache import ApacheKafka

    Names = Callable[[str], str]


class Followed:
    """A tail, and the records that it returned."""

    def __init__(self, broker: ApacheKafka, topic: str, *, committed_only: bool = False) -> None:
        self.seen: dict[int, list[tuple[int, bytes]]] = {}
        self.tail = TopicTail(settings(broker), topic, self._keep, committed_only=committed_only)

    def _keep(self, partition: int, records: Sequence[Any], position: int) -> None:
        seen = self.seen.setdefault(partition, [])
        seen += [(record.offset, record.value) for record in records]
        assert position > max((offset for offset, _ in seen), default=-1)

    def values(self, partition: int = 0) -> list[bytes]:
        return [value for _, value in self.seen.get(partition, [])]


def settings(broker: ApacheKafka) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=broker.bootstrap, request_timeout_s=10)


@asynccontextmanager
async def following(
    broker: ApacheKafka, topic: str, *, committed_only: bool = False
) -> AsyncIterator[Followed]:
    followed = Followed(broker, topic, committed_only=committed_only)
    await followed.tail.start()
    try:
        yield followed
    finally:
        await followed.tail.stop()


@asynccontextmanager
async def scanning(broker: ApacheKafka) -> AsyncIterator[LogScanner]:
    scanner = LogScanner(settings(broker))
    try:
        yield scanner
    finally:
        await scanner.stop()


async def scanned(
    scanner: LogScanner, topic: str, start: int, stop: int, *, committed: bool = False
) -> list[bytes]:
    batches = scanner.scan(TopicPartition(topic, 0), start, stop, committed_only=committed)
    return [record.value or b"" async for batch in batches for record in batch]


async def test_tail_returns_every_record_after_its_start_and_none_before(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """The positions are known when `start` returns."""
    topic = (await create(apache_kafka, topics("t"), partitions=2)).topic
    async with producer(apache_kafka) as client:
        await client.send_and_wait(topic, b"before", partition=0)
        async with following(apache_kafka, topic) as followed:
            assert followed.tail.positions == {0: 1, 1: 0}
            for number in range(20):
                await client.send_and_wait(topic, b"%d" % number, partition=number % 2)
            await eventually(lambda: sum(map(len, followed.seen.values())) == 20)

    assert followed.values(0) == [b"%d" % number for number in range(0, 20, 2)]
    assert followed.values(1) == [b"%d" % number for number in range(1, 20, 2)]


@pytest.mark.long
@pytest.mark.parametrize("down", ["restart", "kill"])
async def test_tail_skips_and_repeats_nothing_when_the_broker_restarts(
    apache_kafka: ApacheKafka, topics: Names, down: str
) -> None:
    """Records before and after the restart come once each."""
    topic = (await create(apache_kafka, topics("t"))).topic
    async with producer(apache_kafka) as client, following(apache_kafka, topic) as followed:
        for number in range(10):
            await client.send_and_wait(topic, b"%d" % number, partition=0)
        if down == "kill":
            apache_kafka.kill()
        await asyncio.to_thread(apache_kafka.restart)
        for number in range(10, 20):
            await client.send_and_wait(topic, b"%d" % number, partition=0)
        await eventually(lambda: len(followed.values()) >= 20)

    assert followed.seen[0] == [(number, b"%d" % number) for number in range(20)]


async def test_tail_that_loses_its_consumer_continues_at_its_positions(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """A consumer whose fetch task has died is replaced; aiokafka reports nothing."""
    topic = (await create(apache_kafka, topics("t"))).topic
    async with producer(apache_kafka) as client, following(apache_kafka, topic) as followed:
        await client.send_and_wait(topic, b"first", partition=0)
        await eventually(lambda: followed.values() == [b"first"])
        consumer: Any = followed.tail._consumer
        consumer._fetcher._fetch_task.cancel()
        await client.send_and_wait(topic, b"second", partition=0)
        await eventually(lambda: followed.values() == [b"first", b"second"])

    assert followed.tail._consumer is not consumer


async def test_tail_reads_an_added_partition_from_its_beginning(
    apache_kafka: ApacheKafka, topics: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on with the others where it was."""
    monkeypatch.setattr("streamworker.kafka.tail._METADATA_MAX_AGE_MS", 200)
    topic = (await create(apache_kafka, topics("t"))).topic
    async with following(apache_kafka, topic) as followed, admin(apache_kafka) as client:
        await client.create_partitions({topic: NewPartitions(2)})
        async with producer(apache_kafka) as writer:
            await writer.send_and_wait(topic, b"new", partition=1)
            await writer.send_and_wait(topic, b"old", partition=0)
            await eventually(lambda: (followed.values(0), followed.values(1)) == ([b"old"], [b"new"]))

    assert followed.tail.positions == {0: 1, 1: 1}


async def test_tail_paused_partition_returns_its_records_after_resume(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """Its position stays, and other partitions continue."""
    topic = (await create(apache_kafka, topics("t"), partitions=2)).topic
    async with producer(apache_kafka) as client, following(apache_kafka, topic) as followed:
        followed.tail.pause(0)
        for partition in (0, 1):
            await client.send_and_wait(topic, b"x", partition=partition)
        await eventually(lambda: followed.values(1) == [b"x"])
        assert followed.tail.positions[0] == 0
        followed.tail.resume(0)
        await eventually(lambda: followed.values(0) == [b"x"])


async def test_tail_open_transaction_delays_the_committed_reader_only(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """The uncommitted tail passes it; the committed one reports that it has passed an aborted record."""
    topic = (await create(apache_kafka, topics("t"))).topic
    async with (
        producer(apache_kafka) as client,
        producer(apache_kafka, transactional_id=topics("tx")) as writer,
        following(apache_kafka, topic) as live,
        following(apache_kafka, topic, committed_only=True) as committed,
    ):
        await writer.begin_transaction()
        await writer.send_and_wait(topic, b"provisional", partition=0)
        await client.send_and_wait(topic, b"delta", partition=0)
        await eventually(lambda: live.values() == [b"provisional", b"delta"])
        assert committed.values() == []
        await writer.abort_transaction()
        await eventually(lambda: committed.tail.positions[0] == 3)

    assert committed.values() == [b"delta"]


async def test_tail_of_an_unknown_topic_is_refused(apache_kafka: ApacheKafka, topics: Names) -> None:
    """The error says how to create it."""
    with pytest.raises(KafkaRefused, match="topics create"):
        async with following(apache_kafka, topics("never")):
            pass


async def test_tail_whose_callback_raises_reports_the_crash(apache_kafka: ApacheKafka, topics: Names) -> None:
    """A bug in a reader must not look like a topic without records."""
    topic = (await create(apache_kafka, topics("t"))).topic

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    tail = TopicTail(settings(apache_kafka), topic, fail, committed_only=False)
    await tail.start()
    async with producer(apache_kafka) as client:
        await client.send_and_wait(topic, b"x", partition=0)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(tail.crashed, 10)
    await tail.stop()


@pytest.mark.parametrize("committed_only", [True, False])
async def test_tail_without_places_returns_the_same_records(
    apache_kafka: ApacheKafka, topics: Names, committed_only: bool
) -> None:
    """With offset, key, value, headers and times; what a rolled back transaction wrote is hidden as before."""
    topic = (await create(apache_kafka, topics("t"))).topic
    returned: list[list[Any]] = [[], []]

    def keeping(into: list[Any]) -> Callable[[int, Sequence[Any], int], None]:
        return lambda _, records, __: into.extend(records)

    tails = [
        TopicTail(
            settings(apache_kafka),
            topic,
            keeping(into),
            committed_only=committed_only,
            with_place=with_place,
        )
        for into, with_place in zip(returned, (True, False), strict=True)
    ]
    for tail in tails:
        await tail.start()
    async with producer(apache_kafka) as client, producer(apache_kafka, transactional_id=topic) as other:
        for number in range(5):
            await client.send_and_wait(
                topic, b"%d" % number, key=b"k", partition=0, headers=[("h", b"v"), ("none", None)]
            )
        await other.begin_transaction()
        await other.send_and_wait(topic, b"rolled back", partition=0)
        await other.abort_transaction()
        await client.send_and_wait(topic, None, key=b"k", partition=0)
        await eventually(lambda: all(into and into[-1].value is None for into in returned))
    for tail in tails:
        await tail.stop()

    shown = [
        [
            (one.offset, one.key, one.value, one.timestamp, one.timestamp_type, list(one.headers))
            for one in into
        ]
        for into in returned
    ]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 6 + (not committed_only)
    assert not hasattr(returned[1][0], "topic")


async def test_scan_returns_exactly_the_records_of_its_range(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """The consumer is used again for the next scan, also at an earlier offset."""
    topic = (await create(apache_kafka, topics("t"))).topic
    async with producer(apache_kafka) as client, scanning(apache_kafka) as scanner:
        for number in range(50):
            await client.send_and_wait(topic, b"%d" % number, partition=0)
        for start, stop in ((10, 20), (0, 50), (49, 50), (7, 7)):
            assert await scanned(scanner, topic, start, stop) == [
                b"%d" % number for number in range(start, stop)
            ]
        assert len(scanner._idle[_Isolation.UNCOMMITTED]) == 1


async def test_scan_committed_leaves_out_aborted_records_and_ends_at_markers(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """A range that ends with records which are not returned still ends."""
    topic = (await create(apache_kafka, topics("t"))).topic
    async with (
        producer(apache_kafka, transactional_id=topics("tx")) as client,
        scanning(apache_kafka) as scanner,
    ):
        for value in (b"kept", b"dropped"):
            await client.begin_transaction()
            await client.send_and_wait(topic, value, partition=0)
            await (client.commit_transaction() if value == b"kept" else client.abort_transaction())
        while (end := await scanner.end(TopicPartition(topic, 0), committed_only=True)) < 4:
            pass
        assert await scanned(scanner, topic, 0, end, committed=True) == [b"kept"]
        assert await scanned(scanner, topic, 0, end) == [b"kept", b"dropped"]


@pytest.mark.parametrize("committed", [True, False])
async def test_scan_of_a_range_without_records_yields_no_batch(
    apache_kafka: ApacheKafka, topics: Names, committed: bool
) -> None:
    """The range is the marker of a transaction, and the records of another one follow it."""
    topic = (await create(apache_kafka, topics("t"))).topic
    at = TopicPartition(topic, 0)
    async with (
        producer(apache_kafka, transactional_id=topics("tx")) as client,
        scanning(apache_kafka) as scanner,
    ):
        for value in (b"first", b"second"):
            async with client.transaction():
                await client.send_and_wait(topic, value, partition=0)
        while await scanner.end(at, committed_only=True) < 4:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        batches = [batch async for batch in scanner.scan(at, 1, 2, committed_only=committed)]
        assert batches == []
        batches = [batch async for batch in scanner.scan(at, 1, 3, committed_only=committed)]
        assert [record.offset for batch in batches for record in batch] == [2]


async def test_scan_offset_at_a_time_is_the_first_record_from_then_on(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    """A time after the last record gives the end."""
    topic = (await create(apache_kafka, topics("t"))).topic
    async with producer(apache_kafka) as client, scanning(apache_kafka) as scanner:
        for second in range(10):
            await client.send_and_wait(
                topic, b"x", partition=0, timestamp_ms=1_700_000_000_000 + 1000 * second
            )
        partition = TopicPartition(topic, 0)
        assert await scanner.offset_at(partition, 1_700_000_004_500) == 5
        assert await scanner.offset_at(partition, 1_800_000_000_000) == 10
        assert await scanner.offset_at(partition, -1) == 0
        assert await scanner.partitions(topic) == 1
