"""Assignments: kept partitions go on where they were, and ownership epochs tell when they were not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from structlog.testing import capture_logs

from streamworker.kafka.consumer import GroupConsumer
from streamworker.model import TopicPartition
from tests.unit.kafka.fakes import FakeConsumer, FakeMembership, settings

if TYPE_CHECKING:
    from collections.abc import Callable

ZERO, ONE = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


class Assignments:
    """Records the assignments, in one list with the consumer's calls."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls = calls

    def rebalancing(self) -> None:
        self._calls.append(("rebalancing",))

    def assigned(self, partitions: frozenset[TopicPartition], *, is_continuous: bool) -> None:
        self._calls.append(("assigned", set(partitions), is_continuous))


class Group(NamedTuple):
    """A consumer that is about to join, and the fakes behind it."""

    consumer: GroupConsumer
    fake: FakeConsumer
    membership: Callable[[], FakeMembership]

    async def join(self) -> None:
        """Start the consumer, assigned partition 0."""
        starting = asyncio.ensure_future(self.consumer.start(Assignments(self.fake.calls)))
        while self.fake.listener is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        self.assign(ZERO)
        await starting
        self.fake.calls.clear()

    def assign(self, *partitions: TopicPartition) -> None:
        """Report an assignment as aiokafka does."""
        self.fake.listener.on_partitions_assigned({KafkaTopicPartition(*one) for one in partitions})


@pytest.fixture
async def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    fake, memberships = FakeConsumer(), []

    def membership(*arguments: Any, **named: Any) -> FakeMembership:
        memberships.append(FakeMembership(*arguments, **named))
        return memberships[-1]

    monkeypatch.setattr("streamworker.kafka.consumer.new_consumer", lambda *_, **__: fake)
    monkeypatch.setattr("streamworker.kafka.consumer.Membership", membership)
    return Group(GroupConsumer(settings(topics__jobs="jobs")), fake, lambda: memberships[-1])


async def test_kept_partition_is_sought_before_the_assignment_is_reported(group: Group) -> None:
    """Each rebalance of aiokafka returns a kept partition to its committed offset; its jobs would be fetched again."""
    await group.join()
    group.consumer.seek(ZERO, 42)
    group.fake.calls.clear()
    group.membership().identity = ("member-1", 2)

    group.assign(ZERO, ONE)

    assert group.fake.calls == [("seek", ("jobs", 0), 42), ("assigned", {ZERO, ONE}, True)]


async def test_partition_that_was_lost_is_not_sought_when_it_comes_back(group: Group) -> None:
    """Its next owner may have read further."""
    await group.join()
    group.consumer.seek(ZERO, 42)
    group.assign(ONE)
    group.fake.calls.clear()

    group.assign(ZERO, ONE)

    assert group.fake.calls == [("assigned", {ZERO, ONE}, True)]


@pytest.mark.parametrize(
    ("delivery", "identity", "is_continuous"),
    [
        ("exactly_once", ("member-1", 2), True),
        ("exactly_once", ("member-1", 3), True),  # the broker refuses the writes of an owner in between
        ("exactly_once", ("member-2", 2), False),
        ("at_least_once", ("member-1", 2), True),
        (
            "at_least_once",
            ("member-1", 3),
            False,
        ),  # another worker may have owned the partition in generation 2
        ("at_least_once", ("member-2", 2), False),
    ],
)
async def test_assignment_after_another_owner_may_have_been_is_not_continuous(
    group: Group, delivery: str, identity: tuple[str, int], *, is_continuous: bool
) -> None:
    """A new ownership epoch: commits of the former one are dropped."""
    group.consumer._settings = settings(topics__jobs="jobs", worker__delivery=delivery)
    await group.join()
    epoch = group.consumer.epoch(ZERO)
    group.membership().identity = identity

    group.assign(ZERO)

    assert group.fake.calls == [("assigned", {ZERO}, is_continuous)]
    assert (group.consumer.epoch(ZERO) is epoch) == is_continuous


async def test_epoch_of_a_partition_that_is_not_owned_is_none(group: Group) -> None:
    """So that nothing is committed for it."""
    await group.join()
    group.assign(ONE)

    assert group.consumer.epoch(ZERO) is None


async def test_joining_that_takes_long_says_what_it_waits_for(group: Group) -> None:
    """After three seconds, then every ten; a member that died holds up the group until its session ends."""
    with capture_logs() as logs:
        starting = asyncio.ensure_future(group.consumer.start(Assignments([])))
        await asyncio.sleep(20)
        group.assign(ZERO)
        await starting

    assert [(line["event"], line["waited_s"]) for line in logs] == [
        ("group.joining", 3),
        ("group.joining", 13),
    ]
    assert logs[0]["reason"] == (
        "a member of the group has not rejoined; the broker waits for it for at most 45 s"
    )
