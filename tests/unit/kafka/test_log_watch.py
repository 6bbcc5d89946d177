"""`LogWatch`: deleted records are skipped and counted, a log that means other records now is taken over anew."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import IncompatibleBrokerVersion, KafkaConnectionError
from structlog.testing import capture_logs

from streamworker.errors import KafkaUnavailable
from streamworker.kafka import log_watch as module
from streamworker.kafka.clients import new_consumer
from streamworker.kafka.log_watch import LogWatch, Positions
from streamworker.kafka.read_records import ReadRecords
from streamworker.kafka.topic_ids import read_topic_ids
from streamworker.model import TopicPartition
from tests.memory_kafka import OPEN
from tests.turnable import until
from tests.unit.kafka.fakes import settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.memory_kafka import MemoryKafka

AT, OTHER = TopicPartition("t", 0), TopicPartition("t", 1)


class Losses:
    """Notes lost records."""

    def __init__(self) -> None:
        self.lost: list[tuple[str, int]] = []

    def records_lost(self, reason: str, records: int) -> None:
        self.lost.append((reason, records))


class Owner:
    """The group consumer, and the watch over its logs. `ids` are the topic ids that the broker returns."""

    def __init__(self, kafka: MemoryKafka) -> None:
        config = settings(topics__jobs="t")
        self.kafka = kafka
        self.consumer: Any = new_consumer(config.kafka, group_id="g")
        self.consumer.assign([KafkaTopicPartition(*AT), KafkaTopicPartition(*OTHER)])
        self.is_joined = True
        self.ids = {"t": b"1"}
        self.resets: list[TopicPartition] = []
        self.seeks: list[tuple[TopicPartition, int]] = []
        self.observer = Losses()
        self.positions = Positions()
        self.watch = LogWatch(config, self, self.positions, cast("Any", self.observer))

    @property
    def joined(self) -> Any:
        if not self.is_joined:
            raise KafkaUnavailable("not a member")
        return self.consumer

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.positions.next[partition] = offset
        self.seeks.append((partition, offset))

    def position(self, partition: TopicPartition) -> int | None:
        return self.positions.next.get(partition)

    async def beginning(self, partition: TopicPartition) -> int:
        return self.kafka.log(*partition).beginning

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        self.resets.append(partition)

    def own(self, partition: TopicPartition, position: int) -> None:
        """Own a partition, whose epoch is `before`."""
        self.positions.next[partition] = position
        self.positions.epochs[partition] = "before"


@pytest.fixture
async def owner(kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Owner]:
    """A member of the group that owns nothing yet."""
    owner = Owner(kafka)

    async def ids_of(_: Any, topics: Any) -> dict[str, bytes]:
        kafka.fail("topic_ids")
        return {topic: owner.ids[topic] for topic in topics if topic in owner.ids}

    monkeypatch.setattr(module, "read_topic_ids", ids_of)
    yield owner
    await owner.watch.stop()


def fill(kafka: MemoryKafka, records: int, *, beginning: int = 0) -> None:
    for number in range(records):
        kafka.write("t", b"x", partition=0, timestamp=number)
    kafka.log("t").beginning = beginning


# A position that the log does not have


async def test_records_that_retention_deleted_are_skipped_and_counted(
    kafka: MemoryKafka, owner: Owner
) -> None:
    """The operator reads how many, and why; the partition is read on from its first record."""
    fill(kafka, 9, beginning=7)
    owner.own(AT, 2)
    with capture_logs() as logs:
        await owner.watch.locate(AT)
    [entry] = logs

    assert owner.seeks == [(AT, 7)]
    assert owner.observer.lost == [("retention", 5)]
    assert (entry["event"], entry["records"], entry["from_offset"], entry["to_offset"]) == (
        "jobs.deleted_unread",
        5,
        2,
        7,
    )
    assert (owner.resets, owner.positions.epochs[AT]) == ([], "before")


async def test_log_that_lost_its_end_is_taken_over_anew(kafka: MemoryKafka, owner: Owner) -> None:
    """Its offsets mean other records now: a new epoch begins, and nothing is fetched before it is taken over."""
    fill(kafka, 4)
    owner.own(AT, 9)
    with capture_logs() as logs:
        await owner.watch.locate(AT)

    assert [entry["event"] for entry in logs] == ["jobs.log_reset"]
    assert (logs[0]["position"], logs[0]["read_from"]) == (9, 0)
    assert owner.observer.lost == [("reset", 9)]
    assert owner.resets == [AT]
    assert owner.positions.restart_at == {AT: 0}
    assert owner.positions.epochs[AT] != "before"
    assert AT not in owner.positions.next
    assert KafkaTopicPartition(*AT) in owner.consumer.paused
    assert owner.seeks == []


async def test_records_of_a_shortened_log_that_were_read_before_are_not_read_again(
    kafka: MemoryKafka, owner: Owner
) -> None:
    """Offsets and timestamps of the last records are compared with the log."""
    fill(kafka, 6)
    read = ReadRecords()
    read.add(kafka.log("t").records)
    owner.own(AT, 6)
    owner.positions.read[AT] = read
    kafka.log("t").truncate(4)
    kafka.write("t", b"new", partition=0, timestamp=99)
    await owner.watch.locate(AT)

    assert owner.positions.restart_at == {AT: 4}
    assert owner.observer.lost == [("reset", 2)]
    assert AT not in owner.positions.read


async def test_reset_of_a_member_that_left_the_group_is_noted_all_the_same(
    kafka: MemoryKafka, owner: Owner
) -> None:
    """Its consumer cannot be paused; the next one begins where the log says."""
    fill(kafka, 1)
    owner.own(AT, 1)
    await owner.watch.compare_topic_ids()
    owner.ids["t"] = b"2"
    owner.consumer.assign([])
    await owner.watch.compare_topic_ids()

    assert owner.resets == [AT]


# Topics that were deleted and created again


async def test_topic_that_was_created_again_is_read_from_its_beginning(
    kafka: MemoryKafka, owner: Owner
) -> None:
    """Every owned partition of it; partitions of other topics are left alone. Once, not at each comparison."""
    fill(kafka, 3, beginning=1)
    foreign = TopicPartition("another", 0)
    for partition in (AT, OTHER, foreign):
        owner.own(partition, 5)
    await owner.watch.compare_topic_ids()
    assert owner.resets == []

    owner.ids["t"] = b"2"
    await owner.watch.compare_topic_ids()
    assert owner.resets == [AT, OTHER]
    assert owner.positions.restart_at == {AT: 1, OTHER: 0}
    assert owner.positions.next == {foreign: 5}
    owner.own(AT, 1)
    await owner.watch.compare_topic_ids()
    assert owner.resets == [AT, OTHER]
    assert owner.observer.lost == [("reset", 4), ("reset", 5)]


async def test_broker_without_topic_ids_resets_nothing(owner: Owner) -> None:
    """It is older than Kafka 3.0; nor is an id forgotten while a topic is away for a moment."""
    owner.own(AT, 5)
    await owner.watch.compare_topic_ids()
    known = owner.ids
    owner.ids = {}
    await owner.watch.compare_topic_ids()
    owner.ids = known
    await owner.watch.compare_topic_ids()

    assert owner.resets == []


@pytest.mark.parametrize(("paused_s", "compares"), [(0.9, False), (1.1, True)])
async def test_ids_are_compared_after_the_process_was_suspended(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, paused_s: float, compares: bool
) -> None:
    """A laptop that slept may find the topic replaced: no record is returned before that is known."""
    now = 100.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    owner.own(AT, 5)
    await owner.watch.check_after_pause()
    await owner.watch.compare_topic_ids()
    owner.ids["t"] = b"2"
    now += paused_s
    await owner.watch.check_after_pause()

    assert owner.resets == ([AT] if compares else [])


async def test_comparison_that_fails_after_a_pause_is_raised(
    kafka: MemoryKafka, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of a topic that may be another one are not returned."""
    monkeypatch.setattr(module, "monotonic", lambda: 1e9)
    kafka.errors["topic_ids"].append(KafkaConnectionError("away"))
    with pytest.raises(KafkaUnavailable, match="reading topic ids: away"):
        await owner.watch.check_after_pause()


async def test_watch_compares_every_five_seconds_and_survives_failures(
    kafka: MemoryKafka, owner: Owner
) -> None:
    """An outage is not logged here, where the consumer logs it; a bug is, and does not end the watch."""
    owner.own(AT, 5)
    owner.watch.start()
    await asyncio.sleep(5.1)
    kafka.errors["topic_ids"].extend([KafkaConnectionError("away"), ZeroDivisionError("secret")])
    owner.ids["t"] = b"2"
    loop = asyncio.get_running_loop()
    began = loop.time()
    with capture_logs() as logs:
        await until(lambda: owner.resets)

    assert 14 <= loop.time() - began <= 16
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("watch.failed", "debug"),
        ("watch.crashed", "error"),
        ("jobs.log_reset", "warning"),
    ]
    assert "secret" not in repr(logs)


# Transactions of other producers


async def watched(owner: Owner, monkeypatch: pytest.MonkeyPatch, *moments: float) -> list[dict[str, Any]]:
    """Look for open transactions at these moments; return the log."""
    with capture_logs() as logs:
        for moment in moments:
            monkeypatch.setattr(module, "monotonic", lambda moment=moment: moment)
            owner.watch._report_open_transactions()
    return [dict(entry) for entry in logs]


async def test_job_behind_an_open_transaction_is_reported_once(
    kafka: MemoryKafka, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten seconds, with the place and the command that finds the producer."""
    fill(kafka, 2)
    kafka.write("t", b"open", partition=0, state=OPEN)
    kafka.write("t", b"behind", partition=0)
    owner.own(AT, 2)
    assert await watched(owner, monkeypatch, 0, 9.9) == []
    [entry] = await watched(owner, monkeypatch, 10)
    assert await watched(owner, monkeypatch, 15, 1000) == []

    assert (entry["event"], entry["partition"], entry["offset"], entry["records"]) == (
        "jobs.behind_open_transaction",
        "t-0",
        2,
        2,
    )
    assert "--find-hanging" in entry["reason"]


@pytest.mark.parametrize("position", [0, 1, 3, None], ids=["start", "before", "end", "unknown"])
async def test_transaction_that_holds_nothing_up_is_not_reported(
    kafka: MemoryKafka, owner: Owner, monkeypatch: pytest.MonkeyPatch, position: int | None
) -> None:
    """Only a position at the last stable offset waits for it."""
    fill(kafka, 2)
    kafka.write("t", b"open", partition=0, state=OPEN)
    owner.own(AT, position)  # type: ignore[arg-type]

    assert await watched(owner, monkeypatch, 0, 100) == []


async def test_transactions_one_after_another_are_not_taken_for_one(
    kafka: MemoryKafka, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time begins anew when the position has moved, or when nothing was open in between."""
    kafka.write("t", b"open", partition=0, state=OPEN)
    owner.own(AT, 0)
    assert await watched(owner, monkeypatch, 0, 9) == []
    kafka.log("t").states[0] = "committed"
    kafka.write("t", b"open", partition=0, state=OPEN)
    owner.own(AT, 1)
    assert await watched(owner, monkeypatch, 10, 19) == []
    kafka.log("t").states[1] = "committed"
    assert await watched(owner, monkeypatch, 19.5) == []
    kafka.log("t").states[1] = OPEN

    assert await watched(owner, monkeypatch, 20, 29) == []
    assert len(await watched(owner, monkeypatch, 30)) == 1


async def test_member_that_left_the_group_reports_no_transaction(
    kafka: MemoryKafka, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing that could be held up."""
    kafka.write("t", b"open", partition=0, state=OPEN)
    owner.own(AT, 0)
    owner.is_joined = False

    assert await watched(owner, monkeypatch, 0, 100) == []


# What is known of the partitions


def test_partition_that_is_kept_keeps_its_epoch() -> None:
    """One that is assigned anew, or came back, begins another one; what is not owned is forgotten."""
    positions = Positions()
    gone = TopicPartition("t", 2)
    positions.assigned(frozenset({AT, OTHER, gone}), frozenset())
    before = dict(positions.epochs)
    positions.next = {AT: 1, OTHER: 2, gone: 3}
    positions.read = {AT: ReadRecords(), gone: ReadRecords()}
    positions.assigned(frozenset({AT, OTHER}), frozenset({AT}))

    assert len(set(before.values())) == 3
    assert positions.epochs[AT] is before[AT]
    assert positions.epochs[OTHER] not in before.values()
    assert positions.next == {AT: 1, OTHER: 2}
    assert set(positions.read) == {AT}


async def test_topic_ids_are_read_of_brokers_that_have_them() -> None:
    """Errors of single topics and the id of zeros are left out; an old broker refuses the request."""

    class Client:
        error: Exception | None = None

        def get_random_node(self) -> int:
            return 0

        async def send(self, _: int, request: Any) -> Any:
            if self.error is not None:
                raise self.error
            rows = [(0, "a", b"1" * 16), (3, "b", b"2" * 16), (0, "c", bytes(16))]
            return SimpleNamespace(topics=[(*row, False, []) for row in rows])

    client = Client()
    assert await read_topic_ids(client, ["a", "b", "c"]) == {"a": b"1" * 16}
    for error in (IncompatibleBrokerVersion("v12"), NotImplementedError()):
        client.error = error
        assert await read_topic_ids(client, ["a"]) == {}


async def test_partition_whose_log_was_reset_is_not_located_again(kafka: MemoryKafka, owner: Owner) -> None:
    """A read of it was under way; it is about to be taken over anew."""
    fill(kafka, 6)
    owner.own(AT, 6)
    kafka.log("t").truncate(4)
    await owner.watch.locate(AT)
    lost = list(owner.observer.lost)
    await owner.watch.locate(AT)

    assert owner.observer.lost == lost
    assert AT not in owner.positions.next
