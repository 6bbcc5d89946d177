"""`PartitionShare`: which partitions a member owns, and that it fetches none of their records."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import GroupAuthorizationFailedError, KafkaConnectionError
from structlog.testing import capture_logs

from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused
from streamworker.kafka.shares import PartitionShare
from tests.memory_kafka import MemoryConsumer
from tests.turnable import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.memory_kafka import MemoryKafka


def partitions(*numbers: int) -> set[Any]:
    return {KafkaTopicPartition("t", number) for number in numbers}


class Group:
    """A group of one member: it is assigned both partitions before `start` returns, as aiokafka does it."""

    def __init__(self, kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kafka = kafka
        self.changes: list[frozenset[int]] = []
        self.share = PartitionShare(KafkaSettings(), "t", "g", lambda: self.changes.append(self.share.owned))
        start = MemoryConsumer.start

        async def start_as_member(consumer: MemoryConsumer) -> None:
            await start(consumer)
            consumer.assign(partitions(0, 1))
            consumer.listener.on_partitions_assigned(partitions(0, 1))

        monkeypatch.setattr(MemoryConsumer, "start", start_as_member)

    @property
    def consumer(self) -> MemoryConsumer:
        """The consumer that joined last."""
        return self.kafka.consumers[-1]

    def rebalance(self, *numbers: int) -> None:
        """Revoke every partition, and assign these."""
        self.share.on_partitions_revoked(partitions(*self.share.owned))
        self.consumer.assign(partitions(*numbers))
        self.share.on_partitions_assigned(partitions(*numbers))


@pytest.fixture
async def group(kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Group]:
    """The group. Its member has left it afterwards."""
    group = Group(kafka, monkeypatch)
    yield group
    await group.share.stop()
    assert all(consumer.is_stopped for consumer in kafka.consumers)


async def test_share_owns_what_the_group_assigns(group: Group) -> None:
    """Each change is notified after it happened; an assignment that changes nothing is not."""
    await group.share.start()
    assert group.share.owned == {0, 1}
    group.rebalance(1)
    group.share.on_partitions_assigned(partitions(1))
    await group.share.stop()

    assert group.changes == [{0, 1}, frozenset(), {1}, frozenset()]


async def test_share_fetches_no_record_from_its_first_assignment_on(group: Group) -> None:
    """The first assignment comes while the consumer is started; the topic's records are read by a tail."""
    await group.share.start()
    assert group.consumer.paused == partitions(0, 1)
    group.rebalance(0)
    assert group.consumer.paused == partitions(0)
    for value in (b"a", b"b"):
        group.kafka.write("t", value, partition=0)
    await asyncio.sleep(5)

    assert await group.consumer.position(KafkaTopicPartition("t", 0)) == 0


async def test_share_that_fails_gives_its_partitions_up_and_joins_again(group: Group) -> None:
    """Another member may own them meanwhile: the work on them ends before the member joins anew."""
    await group.share.start()
    group.kafka.errors["getmany"].append(KafkaConnectionError("away"))
    group.kafka.changed()
    with capture_logs() as logs:
        await until(lambda: len(group.kafka.consumers) == 2 and group.share.owned)
        await asyncio.sleep(2)

    assert group.changes == [{0, 1}, frozenset(), {0, 1}]
    assert [consumer.is_stopped for consumer in group.kafka.consumers] == [True, False]
    assert group.consumer.paused == partitions(0, 1)
    assert [(entry["event"], entry["group"]) for entry in logs] == [
        ("share.failed", "g"),
        ("share.recovered", "g"),
    ]


async def test_share_of_a_group_that_is_away_tries_once_a_second_and_logs_rarely(group: Group) -> None:
    """An outage of a minute is not sixty log lines."""
    await group.share.start()
    loop = asyncio.get_running_loop()
    group.kafka.errors["getmany"].append(KafkaConnectionError("away"))
    group.kafka.errors["start"].extend([KafkaConnectionError("away")] * 60)
    group.kafka.changed()
    began = loop.time()
    with capture_logs() as logs:
        await until(lambda: len(group.kafka.consumers) == 62)

    assert 60 <= loop.time() - began <= 63
    assert [entry["event"] for entry in logs].count("share.failed") == 1


async def test_share_that_may_not_join_raises_at_its_start(group: Group) -> None:
    """The consumer is closed; there is no task that would join later."""
    group.kafka.errors["start"].append(GroupAuthorizationFailedError("g"))
    with pytest.raises(KafkaRefused, match="joining the group g: "):
        await group.share.start()

    assert group.consumer.is_stopped
    await asyncio.sleep(5)
    assert len(group.kafka.consumers) == 1


async def test_share_reads_nothing_of_the_past_and_commits_nothing(group: Group) -> None:
    """The group only divides the partitions; its offsets mean nothing."""
    await group.share.start()

    arguments = group.consumer.arguments
    assert (arguments["group_id"], arguments["auto_offset_reset"]) == ("g", "latest")
    assert arguments["enable_auto_commit"] is False


async def test_stop_is_bounded_if_the_group_does_not_answer(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partitions are given up all the same."""
    await group.share.start()
    loop = asyncio.get_running_loop()

    async def hang() -> None:
        await loop.create_future()

    with monkeypatch.context() as patch:
        patch.setattr(group.consumer, "stop", hang)
        began = loop.time()
        await group.share.stop()
    assert 5 <= loop.time() - began < 6
    assert group.share.owned == frozenset()
    await group.consumer.stop()
