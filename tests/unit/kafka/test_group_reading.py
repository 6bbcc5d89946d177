"""What a member of the group reads and commits: no record is lost or repeated when one partition cannot be read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaConnectionError,
    RebalanceInProgressError,
)
from structlog.testing import capture_logs

from streamworker.errors import KafkaUnavailable
from streamworker.kafka.consumer import STOP_TIMEOUT_S, GroupConsumer
from streamworker.kafka.member_metadata import encode_assignment
from streamworker.model import CommitPoint, TopicPartition
from streamworker.progress.moves import Assignment
from tests.memory_kafka import OPEN, MemoryConsumer
from tests.unit.kafka.fakes import FakeMembership, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.memory_kafka import MemoryKafka

ZERO, ONE = TopicPartition("t", 0), TopicPartition("t", 1)
BOTH = (ZERO, ONE)


class Assignments:
    """Knows nothing of jobs."""

    def __init__(self) -> None:
        self.reset: list[TopicPartition] = []

    def rebalancing(self) -> None: ...

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        self.reset.append(partition)

    def busy_partitions(self) -> frozenset[TopicPartition]:
        return frozenset()

    def assigned(self, *_: Any, **__: Any) -> None: ...


class Member:
    """A group of one member, which owns both partitions from offset 0 on."""

    def __init__(self, kafka: MemoryKafka, **over: str) -> None:
        self.kafka = kafka
        self.memberships: list[FakeMembership] = []
        self.assignments = Assignments()
        self.consumer = GroupConsumer(settings(topics__jobs="t", **over))

    @property
    def joined(self) -> MemoryConsumer:
        """The consumer that joined last."""
        return self.kafka.consumers[-1]

    def membership(self, *arguments: Any, **named: Any) -> FakeMembership:
        """Stand in for `Membership`."""
        self.memberships.append(FakeMembership(*arguments, **named))
        return self.memberships[-1]

    def assign(self, consumer: MemoryConsumer) -> None:
        """Assign both partitions, as aiokafka does when the member subscribes."""
        [assignor] = consumer.arguments["partition_assignment_strategy"]
        assignor.metadata(["t"])
        assignor.on_assignment(
            encode_assignment(Assignment(owned=frozenset(BOTH), promised=frozenset()), 0, is_moving=False)
        )
        partitions = [KafkaTopicPartition(*one) for one in BOTH]
        consumer.assign(partitions)
        consumer.listener.on_partitions_assigned(partitions)

    async def read(self, *, limit: int = 100, partitions: tuple[TopicPartition, ...] = BOTH) -> list[str]:
        """Return `partition:value` of the records of one `receive`; `!` for an unreadable one."""
        records = await self.consumer.receive(partitions, limit)
        return [
            f"{record.at.partition}:{'!' if record.unreadable else (record.value or b'').decode()}"
            for record in records
        ]

    async def read_all(self, count: int) -> list[str]:
        """Read until this number of records came, and once more."""
        found: list[str] = []
        async with asyncio.timeout(60):
            while len(found) < count:
                found += await self.read()
        return sorted(found + await self.read())


@pytest.fixture
async def member(kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Member]:
    """The member, which has joined; every consumer is closed afterwards."""
    member = Member(kafka)
    subscribe = MemoryConsumer.subscribe

    def subscribe_as_member(consumer: MemoryConsumer, topics: Any, *, listener: Any) -> None:
        subscribe(consumer, topics, listener=listener)
        member.assign(consumer)

    async def topic_ids(*_: object) -> dict[str, bytes]:
        return {"t": b"1"}

    monkeypatch.setattr(MemoryConsumer, "subscribe", subscribe_as_member)
    monkeypatch.setattr("streamworker.kafka.consumer.Membership", member.membership)
    monkeypatch.setattr("streamworker.kafka.log_watch.read_topic_ids", topic_ids)
    await member.consumer.start(member.assignments)
    for partition in BOTH:
        member.consumer.seek(partition, 0)
    yield member
    await member.consumer.stop()
    assert all(consumer.is_stopped for consumer in kafka.consumers)


def write(kafka: MemoryKafka, partition: int, *values: str) -> None:
    for value in values:
        kafka.write("t", value.encode(), partition=partition)


async def test_receive_returns_the_records_of_the_wanted_partitions(
    kafka: MemoryKafka, member: Member
) -> None:
    """Those of the others stay where they are: their jobs have no room now."""
    write(kafka, 0, "a", "b")
    write(kafka, 1, "x")

    assert await member.read(partitions=(ONE,)) == ["1:x"]
    assert await member.read(partitions=()) == []
    assert await member.read(limit=1) == ["0:a"]
    assert await member.read() == ["0:b"]
    assert await member.read() == []


async def test_receive_without_partitions_does_not_wait(member: Member) -> None:
    """It polls for errors only; with partitions it waits a quarter of a second for a record."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await member.read(partitions=())
    assert loop.time() - began < 0.01
    await member.read()
    assert 0.2 <= loop.time() - began <= 0.3


async def test_limit_of_zero_still_reads_a_record(kafka: MemoryKafka, member: Member) -> None:
    """aiokafka takes 0 for an error."""
    write(kafka, 0, "a")

    assert await member.read(limit=0) == ["0:a"]


@pytest.mark.parametrize("partition", [0, 1])
@pytest.mark.parametrize("bad", [{0}, {1}, {3}, {0, 1}, {1, 3}, {0, 1, 2, 3}], ids=str)
async def test_record_that_cannot_be_decoded_is_returned_as_unreadable(
    kafka: MemoryKafka, member: Member, bad: set[int], partition: int
) -> None:
    """In its place: it gets a dead letter, and the records around it and in the other partition are read once."""
    other = 1 - partition
    write(kafka, partition, "a", "b", "c", "d")
    write(kafka, other, "x", "y")
    kafka.log("t", partition).undecodable = bad
    with capture_logs() as logs:
        found = await member.read_all(6)

    values = [*("!" if offset in bad else value for offset, value in enumerate("abcd"))]
    assert found == sorted([*(f"{partition}:{value}" for value in values), f"{other}:x", f"{other}:y"])
    unreadable = [entry["at"] for entry in logs if entry["event"] == "jobs.record_unreadable"]
    assert unreadable == [f"t-{partition}-{offset}" for offset in sorted(bad)]


async def test_unreadable_record_does_not_exceed_the_limit(kafka: MemoryKafka, member: Member) -> None:
    """The worker has room for this number of jobs and no more."""
    write(kafka, 0, "a", "b", "c", "d")
    kafka.log("t").undecodable = {3}

    assert await member.read(limit=2) == ["0:a", "0:b"]
    assert await member.read(limit=2) == ["0:c"]
    assert await member.read(limit=2) == ["0:!"]


@pytest.mark.parametrize("stale", [None, 0])
async def test_record_that_cannot_be_decoded_and_not_be_found_is_an_error(
    kafka: MemoryKafka, member: Member, stale: int | None
) -> None:
    """What the fetcher remembers of an earlier failure is before the position: nothing may be skipped for it."""
    write(kafka, 0, "a", "b")
    assert await member.read(limit=1) == ["0:a"]
    if stale is not None:
        records = SimpleNamespace(_partition_records=SimpleNamespace(next_fetch_offset=stale))
        member.joined._fetcher._records[KafkaTopicPartition(*ZERO)] = records
    undecodable = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a header's name")
    kafka.errors["getmany"].extend([undecodable] * 2)
    with pytest.raises(KafkaUnavailable, match="t-0: a record after 1 cannot be decoded"):
        await member.read(partitions=(ZERO,))

    assert await member.read() == ["0:b"]


@pytest.mark.parametrize(
    ("limit", "found"), [(1, ["0:a"]), (3, ["0:a", "0:b", "1:x"]), (9, ["0:a", "0:b", "1:x", "1:y"])]
)
async def test_reading_one_by_one_keeps_the_limit_over_all_partitions(
    kafka: MemoryKafka, member: Member, limit: int, found: list[str]
) -> None:
    """The worker has room for this number of jobs, however they are read; the rest is read later."""
    write(kafka, 0, "a", "b")
    write(kafka, 1, "x", "y")
    kafka.errors["getmany"].append(KafkaConnectionError("away"))

    assert await member.read(limit=limit) == found
    assert len(await member.read()) == 4 - len(found)


async def test_records_that_retention_deleted_are_skipped(kafka: MemoryKafka, member: Member) -> None:
    """The records behind them are read, and those of the other partition once."""
    write(kafka, 0, "a", "b", "c")
    write(kafka, 1, "x")
    kafka.log("t").beginning = 2
    with capture_logs() as logs:
        assert await member.read_all(2) == ["0:c", "1:x"]

    assert [entry["event"] for entry in logs] == ["jobs.deleted_unread"]
    assert member.assignments.reset == []


async def test_log_that_lost_its_end_is_not_read_before_it_is_taken_over(
    kafka: MemoryKafka, member: Member
) -> None:
    """Its new records have offsets of old jobs. The partition is open again after a seek."""
    write(kafka, 0, "a", "b", "c")
    assert len(await member.read()) == 3
    kafka.log("t").truncate(1)
    assert await member.read() == []
    assert member.assignments.reset == [ZERO]
    write(kafka, 0, "new")
    assert await member.read() == []

    start = member.consumer.take_restart_offset(ZERO)
    assert start == 1
    assert member.consumer.take_restart_offset(ZERO) is None
    member.consumer.seek(ZERO, start)
    assert await member.read() == ["0:new"]


async def test_partition_that_cannot_be_read_does_not_hold_up_the_other_one(
    kafka: MemoryKafka, member: Member
) -> None:
    """Its records are read when it can be: the failed read had drained some of them."""
    write(kafka, 0, "a")
    write(kafka, 1, "x")
    kafka.errors["getmany"].extend([KafkaConnectionError("away")] * 2)  # of all, and of the first partition
    with capture_logs() as logs:
        assert await member.read() == ["1:x"]

    assert [entry["event"] for entry in logs] == ["jobs.partition_unreadable"]
    assert await member.read() == ["0:a"]


async def test_failure_of_every_partition_is_raised(kafka: MemoryKafka, member: Member) -> None:
    """And nothing is lost by it."""
    write(kafka, 0, "a")
    kafka.errors["getmany"].extend([KafkaConnectionError("away")] * 3)
    with pytest.raises(KafkaUnavailable, match="reading jobs: away"):
        await member.read()

    assert await member.read() == ["0:a"]


async def test_record_of_a_partition_that_was_reset_meanwhile_is_dropped(
    kafka: MemoryKafka, member: Member
) -> None:
    """Its offset means another record now."""
    write(kafka, 0, "a")
    write(kafka, 1, "x")
    member.consumer._positions.next.pop(ZERO)

    assert await member.read() == ["1:x"]


async def test_records_behind_counts_those_that_were_not_returned(kafka: MemoryKafka, member: Member) -> None:
    """Over the owned partitions; 0 for a worker that left the group."""
    write(kafka, 0, "a", "b", "c")
    write(kafka, 1, "x")
    assert member.consumer.records_behind == 4
    await member.read(limit=2)
    assert member.consumer.records_behind == 2
    assert (member.consumer.position(ZERO), member.consumer.position(TopicPartition("t", 5))) == (2, None)

    await member.consumer.stop()
    assert member.consumer.records_behind == 0
    assert member.consumer.position(ZERO) is None


async def test_read_back_yields_committed_records_and_leaves_the_position(
    kafka: MemoryKafka, member: Member
) -> None:
    """Up to the log's end at most: it may have lost records."""
    write(kafka, 0, "a", "b", "c")
    kafka.write("t", b"open", partition=0, state=OPEN)
    await member.read(limit=2)
    found = [record.value async for batch in member.consumer.read_back(ZERO, 1, 99) for record in batch]

    assert found == [b"b", b"c"]
    assert await member.read() == ["0:c"]


# Commits


async def test_commit_writes_offset_and_metadata(member: Member) -> None:
    """Of each partition that is given, and of no other."""
    assert await member.consumer.commit({ZERO: CommitPoint(7, "map")})

    [committed] = member.joined.committed
    assert {tuple(at): tuple(point) for at, point in committed.items()} == {("t", 0): (7, "map")}


@pytest.mark.parametrize(
    "error", [CommitFailedError(), IllegalStateError("not assigned")], ids=["failed", "lost"]
)
async def test_commit_that_a_rebalance_prevents_is_false(
    kafka: MemoryKafka, member: Member, error: Exception
) -> None:
    """It is tried again when the assignment is known."""
    kafka.errors["commit"].append(error)

    assert not await member.consumer.commit({ZERO: CommitPoint(7, "")})


@pytest.mark.parametrize("error", [KafkaConnectionError("away"), RebalanceInProgressError()])
async def test_commit_that_fails_otherwise_is_raised(
    kafka: MemoryKafka, member: Member, error: Exception
) -> None:
    """As an error of Kafka that names the action."""
    kafka.errors["commit"].append(error)
    with pytest.raises(KafkaUnavailable, match="committing offsets: "):
        await member.consumer.commit({ZERO: CommitPoint(7, "")})


async def test_commit_is_bounded_in_time(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiokafka repeats a retriable error for ever."""
    loop = asyncio.get_running_loop()

    async def hang(_: Any) -> None:
        await loop.create_future()

    monkeypatch.setattr(member.joined, "commit", hang)
    began = loop.time()
    with pytest.raises(KafkaUnavailable):
        await member.consumer.commit({ZERO: CommitPoint(7, "")})
    limit_s = member.consumer._settings.kafka.request_timeout_s
    assert limit_s <= loop.time() - began < limit_s + 1


# Joining and leaving


async def test_dead_membership_is_replaced_at_the_next_read(kafka: MemoryKafka, member: Member) -> None:
    """aiokafka does not restart its tasks; the positions are kept."""
    write(kafka, 0, "a", "b")
    await member.read(limit=1)
    member.memberships[-1].has_died = True

    assert await member.read() == ["0:b"]
    assert len(member.memberships) == 2
    assert [consumer.is_stopped for consumer in kafka.consumers] == [True, False]


async def test_member_that_has_left_commits_and_reads_nothing(member: Member) -> None:
    """And says that it will join again."""
    await member.consumer.stop()
    for call in (member.consumer.commit({}), member.consumer.beginning(ZERO), member.consumer.end(ZERO)):
        with pytest.raises(KafkaUnavailable, match="has not joined it again yet"):
            await call
    member.consumer.seek(ZERO, 5)  # does nothing


async def test_bounds_of_a_partition_are_those_of_committed_records(
    kafka: MemoryKafka, member: Member
) -> None:
    """Errors name the partition."""
    write(kafka, 0, "a", "b")
    kafka.write("t", b"open", partition=0, state=OPEN)
    kafka.log("t").beginning = 1

    assert (await member.consumer.beginning(ZERO), await member.consumer.end(ZERO)) == (1, 2)
    kafka.errors["end_offsets"].append(KafkaConnectionError("away"))
    with pytest.raises(KafkaUnavailable, match="reading the end offset of t-0: away"):
        await member.consumer.end(ZERO)


@pytest.mark.parametrize("error", [None, KafkaConnectionError("away")], ids=["hangs", "fails"])
async def test_stop_that_does_not_work_closes_the_connections(
    kafka: MemoryKafka, member: Member, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Bounded in time; a broker that is away must not keep a pod from ending."""
    loop = asyncio.get_running_loop()
    joined = member.joined

    async def stop() -> None:
        joined.is_stopped = True
        if error is not None:
            raise error
        await loop.create_future()

    monkeypatch.setattr(joined, "stop", stop)
    began = loop.time()
    with capture_logs() as logs:
        await member.consumer.stop()

    assert loop.time() - began <= STOP_TIMEOUT_S + 0.1
    assert [entry["event"] for entry in logs] == ["consumer.stopped_uncleanly"]
    assert joined._client.is_closed


async def test_consumer_is_configured_for_jobs_that_take_long(member: Member) -> None:
    """No automatic commit or reset, no poll interval, and a request timeout above the session."""
    arguments = member.joined.arguments
    session_ms = arguments["session_timeout_ms"]

    assert arguments["enable_auto_commit"] is False
    assert (arguments["auto_offset_reset"], arguments["isolation_level"]) == ("none", "read_committed")
    assert arguments["request_timeout_ms"] >= session_ms + 15_000
    assert arguments["heartbeat_interval_ms"] <= min(1000, session_ms / 10)
    assert arguments["max_poll_interval_ms"] >= 24 * 3_600_000
    assert arguments["rebalance_timeout_ms"] == session_ms
