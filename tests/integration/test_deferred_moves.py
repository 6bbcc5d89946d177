"""The assignor of deferred moves in plain aiokafka members of one group, on Apache Kafka."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamworker.kafka.assignor import DeferredAssignor
from streamworker.kafka.compat import new_sticky_assignor
from streamworker.model import TopicPartition
from streamworker.progress.moves import MemberIdentity, MoveSchedule
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType

    from tests.brokers.apache import ApacheKafka

PARTITIONS = 12


class Peer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """A member of this version with pretended jobs: `busy` partitions, and `cuts`, those that were lost busy."""

    def __init__(self, group: Group, assignor: Any = None, instance_id: str | None = None) -> None:
        self.busy: set[TopicPartition] = set()
        self.cuts: set[TopicPartition] = set()
        self.generation = 0  # of the last assignment
        self.schedule = MoveSchedule(move_timeout_s=60, linger_s=0.5, interval_s=0.5)
        self.assignor: Any = assignor or DeferredAssignor(
            self.schedule, identity=self.identity, busy=lambda: self.busy, is_fenced=False
        )
        self.consumer: Any = AIOKafkaConsumer(
            bootstrap_servers=group.bootstrap,
            group_id=group.name,
            group_instance_id=instance_id,
            session_timeout_ms=group.session_timeout_ms,
            heartbeat_interval_ms=200,
            enable_auto_commit=False,
            partition_assignment_strategy=[self.assignor],
        )
        self.consumer.subscribe([group.topic], listener=self)
        self._polling: asyncio.Task[None] | None = None

    def identity(self) -> MemberIdentity:
        coordinator = self.consumer._coordinator
        return MemberIdentity(coordinator.member_id, coordinator.generation)

    @property
    def owned(self) -> frozenset[TopicPartition]:
        return frozenset(TopicPartition(*partition) for partition in self.consumer.assignment())

    @property
    def promised(self) -> frozenset[TopicPartition]:
        return self.schedule.promised

    @property
    def is_leader(self) -> bool:
        return self.consumer._coordinator._group_subscription is not None

    def on_partitions_revoked(self, _: object) -> None:
        self.schedule.rebalancing()

    def on_partitions_assigned(self, _: object) -> None:
        self.generation = self.identity().generation
        self.cuts |= self.busy - self.assignor.outcome.kept
        self.busy &= self.assignor.outcome.kept

    async def _poll(self) -> None:
        while True:
            await self.consumer.getmany(timeout_ms=50)
            now = monotonic()
            if self.schedule.rejoin_at(self.busy, now) <= now:
                self.consumer._coordinator.request_rejoin()
                self.schedule.requested(now)

    async def __aenter__(self) -> Self:
        await self.consumer.start()
        self._polling = asyncio.create_task(self._poll())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with suppress(asyncio.CancelledError):
                await self._polling
            self._polling = None
            await self.consumer.stop()


class Stock(Peer):
    """A member of the previous version."""

    def __init__(self, group: Group) -> None:
        super().__init__(group, new_sticky_assignor())

    def on_partitions_assigned(self, _: object) -> None:
        self.assignor.on_generation_assignment(self.identity().generation)
        self.cuts |= self.busy - self.owned
        self.busy &= self.owned


class Group:
    """A group on a topic of its own; the members leave with the test."""

    def __init__(self, bootstrap: str, topic: str, name: str) -> None:
        self.bootstrap = bootstrap
        self.topic = topic
        self.name = name
        self.session_timeout_ms = 6000
        self._members = AsyncExitStack()

    async def join(self, kind: type[Peer] = Peer, **options: Any) -> Peer:
        return await self._members.enter_async_context(kind(self, **options))

    async def close(self) -> None:
        await self._members.aclose()


@pytest.fixture
async def group(apache_kafka: ApacheKafka, topics: Callable[[str], str]) -> AsyncIterator[Group]:
    group = Group(apache_kafka.bootstrap, topics("jobs"), topics("group"))
    admin = AIOKafkaAdminClient(bootstrap_servers=group.bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(group.topic, PARTITIONS, 1)])
    finally:
        await admin.close()
    yield group
    await group.close()


def owns(peer: Peer, count: int) -> Callable[[], bool]:
    return lambda: len(peer.owned) == count


def share(*peers: Peer) -> Callable[[], bool]:
    """Whether the members hold all partitions, each one once, in equal parts, and none of them is promised."""

    def is_even() -> bool:
        owned = [partition for peer in peers for partition in peer.owned]
        counts = {len(peer.owned) for peer in peers}
        is_settled = not any(peer.promised for peer in peers)
        return len(owned) == len(set(owned)) == PARTITIONS and len(counts) == 1 and is_settled

    return is_even


async def test_two_members_more_cut_no_jobs_and_get_their_share_when_these_have_ended(group: Group) -> None:
    """Idle partitions move with the first rebalance, promised ones after their jobs."""
    a = await group.join()
    await eventually(owns(a, PARTITIONS))
    idle = {TopicPartition(group.topic, number) for number in (2, 7, 11)}
    a.busy = set(a.owned - idle)
    b, c = await asyncio.gather(group.join(), group.join())
    await eventually(lambda: b.owned | c.owned == idle and len(a.promised) == 5)
    assert a.owned == a.busy
    first = min(a.promised)
    a.busy.discard(first)
    await eventually(lambda: first in b.owned | c.owned)
    assert len(a.promised) == 4
    a.busy -= a.promised
    await eventually(share(a, b, c))

    assert len(a.busy) == 4
    assert (a.cuts, b.cuts, c.cuts) == (set(), set(), set())


async def test_member_that_drains_gives_up_idle_partitions_at_once_and_busy_ones_in_time(
    group: Group,
) -> None:
    """It leaves with nothing, and its leaving moves nothing."""
    a, b = await group.join(), await group.join()
    await eventually(share(a, b))
    (stays,) = sorted(a.owned)[:1]
    a.busy, b.busy = {stays}, set(b.owned)
    a.schedule.leave()
    await eventually(lambda: a.owned == a.promised == {stays} and len(b.owned) == PARTITIONS - 1)
    a.busy.clear()
    await eventually(owns(b, PARTITIONS))
    await a.stop()

    assert (a.cuts, b.cuts) == (set(), set())
    assert len(b.busy) == 6


async def test_members_keep_their_jobs_through_a_generation_in_which_nothing_was_assigned(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader dies while it assigns, so its followers miss a generation."""
    group.session_timeout_ms = 1500
    a, b = await group.join(), await group.join()
    await eventually(share(a, b))
    leader, follower = (a, b) if a.is_leader else (b, a)
    follower.busy = set(follower.owned)
    before = follower.generation

    def dies(*_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(leader.assignor, "assign", dies)
    c = await group.join()
    await eventually(lambda: follower.generation > before and len(c.owned) == 6)

    assert follower.generation >= before + 2
    assert follower.cuts == set()
    assert len(follower.busy) == 6


@pytest.mark.parametrize("leads", [True, False], ids=["leader", "follower"])
async def test_static_member_that_comes_back_gives_up_what_its_stored_assignment_promises(
    group: Group, leads: bool
) -> None:
    """The broker stores the promises; the new process has no open jobs, so the partitions move at once."""
    first = None if leads else await group.join(instance_id="c")
    a = await group.join(instance_id="a")
    members = [a] if first is None else [first, a]
    await eventually(share(*members))
    for member in members:
        member.busy = set(member.owned)
    assert a.is_leader is leads
    b = await group.join(instance_id="b")
    await eventually(
        lambda: sum(len(member.promised) for member in members) == PARTITIONS // (1 + len(members))
    )
    promised = a.promised
    await a.stop()
    again = await group.join(instance_id="a")
    await eventually(lambda: again.generation)
    assert again.promised == promised
    if first is not None:
        first.busy -= first.promised
    await eventually(share(again, b, *members[:-1]))

    assert b.cuts == set()
    assert first is None or first.cuts == set()


async def test_members_of_two_versions_share_a_group_under_either_leader(group: Group) -> None:
    """Forward and back: the previous version leads, then this one, then the previous one again."""
    old = await group.join(Stock)
    await eventually(owns(old, PARTITIONS))
    new = await group.join()
    await eventually(share(old, new))
    assert old.is_leader
    new.busy = set(new.owned)

    await old.stop()
    await eventually(owns(new, PARTITIONS))
    new.busy = set(new.owned)
    back = await group.join(Stock)
    await eventually(lambda: len(new.promised) == 6)
    assert new.is_leader
    assert back.owned == set()
    new.busy -= new.promised
    await eventually(share(new, back))
    assert new.cuts == set()

    await new.stop()
    await eventually(owns(back, PARTITIONS))
