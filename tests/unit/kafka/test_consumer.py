"""Assignments: kept partitions go on where they were, and ownership epochs tell when they were not."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from streamworker.errors import InstanceFenced, KafkaError, KafkaRefused
from streamworker.kafka.compat import FENCED_INSTANCE_ID, GROUP_MAX_SIZE_REACHED
from streamworker.kafka.consumer import GroupConsumer
from streamworker.kafka.member_metadata import decode_claim, encode_assignment
from streamworker.model import TopicPartition
from streamworker.progress.moves import Assignment, MoveSchedule
from tests.unit.kafka.fakes import FakeConsumer, FakeMembership, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

ZERO, ONE = TopicPartition("jobs", 0), TopicPartition("jobs", 1)


class Assignments:
    """Records the assignments, in one list with the consumer's calls."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self._calls = calls
        self.busy: frozenset[TopicPartition] = frozenset()

    def rebalancing(self) -> None:
        self._calls.append(("rebalancing",))

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        self._calls.append(("log_reset", partition, reason))

    def busy_partitions(self) -> frozenset[TopicPartition]:
        return self.busy

    def assigned(
        self,
        partitions: frozenset[TopicPartition],
        *,
        kept: frozenset[TopicPartition],
        promised: frozenset[TopicPartition],
    ) -> None:
        self._calls.append(("assigned", set(partitions), set(kept), set(promised)))


class Group(NamedTuple):
    """A consumer that is about to join, and the fakes behind it."""

    consumer: GroupConsumer
    fake: FakeConsumer
    membership: Callable[[], FakeMembership]
    assignments: Assignments

    def configure(self, **over: str) -> None:
        """Change settings of a consumer that has not joined."""
        self.consumer._settings = settings(topics__jobs="jobs", **over)

    async def join(self) -> None:
        """Start the consumer, assigned partition 0."""
        starting = asyncio.ensure_future(self.consumer.start(self.assignments))
        while self.fake.listener is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        self.assign(ZERO)
        await starting
        self.fake.calls.clear()

    def assign(
        self,
        *partitions: TopicPartition,
        promised: Collection[TopicPartition] = (),
        last: int | None = None,
        is_moving: bool = False,
    ) -> None:
        """Report a rebalance as aiokafka does: the member joins, and is assigned these partitions.

        `last` is the highest generation that a member claimed; by default, the one before this one.
        """
        self.fake.assignor.metadata(["jobs"])
        assignment = Assignment(owned=frozenset(partitions), promised=frozenset(promised))
        generation = self.membership().identity[1] - 1 if last is None else last
        self.fake.assignor.on_assignment(encode_assignment(assignment, generation, is_moving=is_moving))
        self.fake.listener.on_partitions_assigned({KafkaTopicPartition(*one) for one in partitions})


@pytest.fixture
async def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    fake = FakeConsumer()
    memberships: list[FakeMembership] = []

    def new_consumer(*_: object, partition_assignment_strategy: list[Any], **named: object) -> FakeConsumer:
        [fake.assignor] = partition_assignment_strategy
        fake.arguments = named
        return fake

    def membership(*arguments: Any, **named: Any) -> FakeMembership:
        memberships.append(FakeMembership(*arguments, **named))
        return memberships[-1]

    async def topic_ids(*_: object) -> dict[str, bytes]:
        return {"jobs": fake.topic_id}

    monkeypatch.setattr("streamworker.kafka.log_watch.read_topic_ids", topic_ids)
    monkeypatch.setattr("streamworker.kafka.consumer.new_consumer", new_consumer)
    monkeypatch.setattr("streamworker.kafka.consumer.Membership", membership)
    consumer = GroupConsumer(settings(topics__jobs="jobs"))
    return Group(consumer, fake, lambda: memberships[-1], Assignments(fake.calls))


async def test_kept_partition_is_sought_before_the_assignment_is_reported(group: Group) -> None:
    """Each rebalance of aiokafka returns a kept partition to its committed offset; its jobs would be fetched again."""
    await group.join()
    group.consumer.seek(ZERO, 42)
    group.fake.calls.clear()
    group.membership().identity = ("member-1", 2)

    group.assign(ZERO, ONE)

    new = [("seek", ("jobs", 1), 0), ("pause", ("jobs", 1))]  # nothing of it is fetched until it is open
    end: tuple[Any, ...] = ("assigned", {ZERO, ONE}, {ZERO}, set())
    assert group.fake.calls in (
        [("seek", ("jobs", 0), 42), *new, end],
        [*new, ("seek", ("jobs", 0), 42), end],
    )


async def test_partition_that_was_lost_is_not_sought_when_it_comes_back(group: Group) -> None:
    """Its next owner may have read further."""
    await group.join()
    group.consumer.seek(ZERO, 42)
    group.assign(ONE)
    group.fake.calls.clear()

    group.assign(ZERO, ONE)

    assert ("seek", ("jobs", 0), 42) not in group.fake.calls
    assert group.fake.calls[-1] == ("assigned", {ZERO, ONE}, {ONE}, set())


@pytest.mark.parametrize(
    ("delivery", "identity", "is_kept"),
    [
        ("exactly_once", ("member-1", 2), True),
        ("exactly_once", ("member-1", 3), True),  # the broker refuses the writes of an owner in between
        ("exactly_once", ("member-2", 2), False),
        ("at_least_once", ("member-1", 2), True),
        # Another worker may have owned the partition in generation 2.
        ("at_least_once", ("member-1", 3), False),
        ("at_least_once", ("member-2", 2), False),
    ],
)
async def test_partition_that_another_member_may_have_owned_in_between_is_not_kept(
    group: Group, delivery: str, identity: tuple[str, int], *, is_kept: bool
) -> None:
    """A new ownership epoch: commits of the former one are dropped."""
    group.configure(worker__delivery=delivery)
    await group.join()
    epoch = group.consumer.epoch(ZERO)
    group.membership().identity = identity

    group.assign(ZERO)

    assert group.fake.calls[-1:] == [("assigned", {ZERO}, {ZERO} if is_kept else set(), set())]
    assert (group.consumer.epoch(ZERO) is epoch) == is_kept


async def test_busy_partitions_are_kept_through_a_generation_that_assigned_nothing(group: Group) -> None:
    """The leader died before it assigned: no member claims a later generation than this one."""
    group.configure(worker__delivery="at_least_once")
    await group.join()
    group.assign(ZERO, ONE)
    group.assignments.busy = frozenset({ZERO})
    group.fake.calls.clear()
    group.membership().identity = ("member-1", 3)

    group.assign(ZERO, ONE, last=1)

    assert group.fake.calls[-1:] == [("assigned", {ZERO, ONE}, {ZERO}, set())]


async def test_partition_whose_last_offset_is_not_committed_is_reported_as_busy(group: Group) -> None:
    """Another owner would repeat the jobs that have ended."""
    await group.join()
    group.consumer.uncommitted = lambda: {ZERO: ...}

    claim = decode_claim(group.fake.assignor.metadata(["jobs"]))

    assert claim.busy == {ZERO}


async def test_member_that_leaves_asks_for_a_rebalance_once(group: Group) -> None:
    """With it the group learns which partitions are idle, and moves them."""
    await group.join()
    await group.consumer.receive([], 1)
    assert group.membership().rejoins == 0
    group.consumer.announce_departure()
    await group.consumer.receive([], 1)
    await group.consumer.receive([], 1)

    assert group.membership().rejoins == 1
    assert decode_claim(group.fake.assignor.metadata(["jobs"])).is_leaving


async def test_static_member_that_leaves_keeps_its_partitions(group: Group) -> None:
    """The process that replaces it is given the same ones."""
    group.configure(worker__group_instance_id="w-0")
    await group.join()
    group.consumer.announce_departure()
    await group.consumer.receive([], 1)

    assert group.membership().rejoins == 0


@pytest.mark.parametrize(
    ("is_moving", "is_rejoining", "refusal", "leaves"),
    [
        (False, False, 0, False),
        (True, False, 0, True),
        (False, True, 0, True),
        (True, True, FENCED_INSTANCE_ID, False),
    ],
    ids=["settled", "a-partition-is-promised", "rebalance-under-way", "fenced"],
)
async def test_static_member_that_stops_leaves_the_group_only_while_partitions_move(
    group: Group, *, is_moving: bool, is_rejoining: bool, refusal: int, leaves: bool
) -> None:
    """Every rebalance of these moves would wait for it. A fenced member's place is another process's now."""
    group.configure(worker__group_instance_id="w-0")
    await group.join()
    group.assign(ZERO, is_moving=is_moving)
    membership = group.membership()
    membership.is_rejoining, membership.refusal = is_rejoining, refusal
    await group.consumer.stop()

    assert membership.is_given_up is leaves
    assert group.fake.is_stopped


async def test_consumer_that_never_joined_stops(group: Group) -> None:
    """There is no membership to give up."""
    await group.consumer.stop()

    assert not group.fake.is_stopped


async def test_member_asks_for_a_rebalance_when_a_promised_partition_is_idle(group: Group) -> None:
    """Then the partition moves; while its jobs are open, there is nothing to ask for."""
    group.consumer._moves = MoveSchedule(move_timeout_s=60, linger_s=0, interval_s=0)
    await group.join()
    group.assignments.busy = frozenset({ZERO})
    group.assign(ZERO, promised=[ZERO])
    assert group.fake.calls[-1] == ("assigned", {ZERO}, {ZERO}, {ZERO})
    await group.consumer.receive([], 1)
    assert group.membership().rejoins == 0
    group.assignments.busy = frozenset()
    await group.consumer.receive([], 1)

    assert group.membership().rejoins == 1


async def test_bug_in_the_watch_of_the_logs_is_logged_and_the_watch_goes_on(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic that is replaced later is still noticed."""
    await group.join()
    group.consumer.seek(ZERO, 42)
    failures = iter([ZeroDivisionError("my prompt")])

    async def topic_ids(*_: object) -> dict[str, bytes]:
        for failure in failures:
            raise failure
        return {"jobs": b"second"}

    async def beginning(_: TopicPartition) -> int:
        return 0

    monkeypatch.setattr("streamworker.kafka.log_watch.read_topic_ids", topic_ids)
    monkeypatch.setattr(group.consumer, "beginning", beginning)
    group.fake.calls.clear()
    with capture_logs() as logs:
        await asyncio.sleep(11)

    assert [line["event"] for line in logs] == ["watch.crashed", "jobs.log_reset"]
    assert "my prompt" not in str(logs)
    assert group.fake.calls[-1] == ("log_reset", ZERO, "the topic was deleted and created again")


async def test_epoch_of_a_partition_that_is_not_owned_is_none(group: Group) -> None:
    """So that nothing is committed for it."""
    await group.join()
    group.assign(ONE)

    assert group.consumer.epoch(ZERO) is None


async def test_joining_that_takes_long_says_what_it_waits_for(group: Group) -> None:
    """After three seconds, then every ten; a member that died holds up the group until its session ends."""
    with capture_logs() as logs:
        starting = asyncio.ensure_future(group.consumer.start(group.assignments))
        await asyncio.sleep(20)
        group.assign(ZERO)
        await starting

    assert [(line["event"], line["waited_s"]) for line in logs] == [
        ("group.joining", 3),
        ("group.joining", 13),
    ]
    assert logs[0]["reason"] == (
        "the broker waits for the members of the group: for a new group group.initial.rebalance.delay.ms (3 s by default), "
        "for a member that has not rejoined at most 45 s"
    )


@pytest.mark.parametrize(
    ("refusal", "kind", "text"),
    [
        (FENCED_INSTANCE_ID, InstanceFenced, "worker.group_instance_id pod-0 (FENCED_INSTANCE_ID)"),
        (GROUP_MAX_SIZE_REACHED, KafkaRefused, "as many members as the broker's group.max.size allows"),
    ],
)
@pytest.mark.parametrize("is_member", [False, True])
async def test_member_that_the_group_refuses_for_good_ends_with_the_reason(
    group: Group, refusal: int, kind: type[KafkaError], text: str, *, is_member: bool
) -> None:
    """While it joins, and later: to join again would fence the other process, or be in vain."""
    group.configure(worker__group_instance_id="pod-0")
    if is_member:
        await group.join()
        working: asyncio.Future[Any] = asyncio.ensure_future(group.consumer.receive([ZERO], 1))
        group.fake.error = KafkaConnectionError("gone")
    else:
        working = asyncio.ensure_future(group.consumer.start(group.assignments))
        while group.fake.listener is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
    group.membership().refusal = refusal

    with pytest.raises(kind, match=re.escape(text)):
        await working


async def test_member_that_was_fenced_before_a_read_does_not_join_again(group: Group) -> None:
    """Its heartbeat task has died of the refusal. A new member with its instance id would fence the other process."""
    group.configure(worker__group_instance_id="pod-0")
    await group.join()
    membership = group.membership()
    membership.has_died, membership.refusal = True, FENCED_INSTANCE_ID

    with pytest.raises(InstanceFenced, match="FENCED_INSTANCE_ID"):
        async with asyncio.timeout(5):
            await group.consumer.receive([ZERO], 1)
    assert group.membership() is membership
    assert not group.fake.is_stopped


@pytest.mark.parametrize(
    ("over", "timeout_ms"),
    [
        ({}, 45_000),
        ({"worker__group_instance_id": "pod-0"}, 3000),
    ],
    ids=["dynamic", "static"],
)
async def test_rebalance_waits_for_a_static_member_for_seconds_and_for_another_one_a_session(
    group: Group, over: dict[str, str], timeout_ms: int
) -> None:
    """The broker removes a dynamic member that is late, with its streams; a static one keeps its partitions."""
    group.configure(**over)
    await group.join()

    assert group.fake.arguments["rebalance_timeout_ms"] == timeout_ms


@pytest.mark.parametrize(
    ("over", "due_s"),
    [({}, 2.0), ({"worker__group_instance_id": "pod-0"}, 3.5)],
    ids=["dynamic", "static"],
)
def test_rebalance_that_waited_for_a_static_member_is_followed_by_the_brokers_own(
    over: dict[str, str], due_s: float
) -> None:
    """The broker removes the absent member three seconds later, unless another rebalance comes before."""
    schedule = GroupConsumer(settings(topics__jobs="jobs", **over))._moves
    schedule.report(frozenset(), 100)
    schedule.assigned({ZERO}, 103)

    assert schedule.rejoin_at(frozenset(), 103) == 103 + due_s


async def test_membership_is_confirmed_after_the_rebalance_that_is_under_way(group: Group) -> None:
    """No heartbeat is sent meanwhile; a partition that opens then waits no longer than the rebalance."""
    await group.join()
    group.membership().is_joining = True
    confirmed = asyncio.ensure_future(group.consumer.confirm_membership())
    await asyncio.sleep(1)
    assert group.membership().heartbeats == 0
    group.membership().is_joining = False

    assert await confirmed
    assert group.membership().heartbeats == 1


async def test_membership_that_a_long_rebalance_leaves_open_is_asked_for_after_two_seconds(
    group: Group,
) -> None:
    """The caller asks again; its task may have been cancelled by then."""
    await group.join()
    group.membership().is_joining = True
    began = asyncio.get_running_loop().time()
    await group.consumer.confirm_membership()

    assert asyncio.get_running_loop().time() - began == pytest.approx(2, abs=0.1)
