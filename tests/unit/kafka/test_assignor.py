"""The assignor as aiokafka calls it: metadata and assignments as bytes, a leader of this or the previous version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from structlog.testing import capture_logs

from streamworker.kafka import assignor
from streamworker.kafka.assignor import DeferredAssignor
from streamworker.kafka.compat import new_sticky_assignor
from streamworker.model import TopicPartition
from streamworker.progress.moves import MoveSchedule

if TYPE_CHECKING:
    from collections.abc import Iterable


def of(*numbers: int) -> frozenset[TopicPartition]:
    return frozenset(TopicPartition("jobs", number) for number in numbers)


def cluster(partitions: int) -> ClusterMetadata:
    metadata = ClusterMetadata()
    metadata._partitions = {"jobs": dict.fromkeys(range(partitions))}
    return metadata


class Peer:
    """A member of this version, with what surrounds its assignor."""

    def __init__(self, name: str, *, is_fenced: bool = False) -> None:
        self.name = name
        self.generation = -1
        self.busy: frozenset[TopicPartition] = frozenset()
        self.now = 0.0
        self.schedule = MoveSchedule(move_timeout_s=900)
        self.assignor = DeferredAssignor(
            self.schedule,
            identity=lambda: (self.name, self.generation),
            busy=lambda: self.busy,
            is_fenced=is_fenced,
            clock=lambda: self.now,
        )

    @property
    def owned(self) -> frozenset[TopicPartition]:
        return self.assignor.outcome.owned

    def assigned(self, assignment: ConsumerProtocolMemberAssignment, generation: int) -> None:
        self.generation = generation
        self.assignor.on_assignment(assignment)
        self.busy &= self.assignor.outcome.kept


class Stock:
    """A member of the previous version."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.assignor: Any = new_sticky_assignor()

    @property
    def owned(self) -> frozenset[TopicPartition]:
        return frozenset(TopicPartition(*partition) for partition in self.assignor.member_assignment)

    def assigned(self, assignment: ConsumerProtocolMemberAssignment, generation: int) -> None:
        self.assignor.on_assignment(assignment)
        self.assignor.on_generation_assignment(generation)


def rebalance(generation: int, peers: Iterable[Peer | Stock], *, partitions: int = 6) -> None:
    """Do what the broker does; the first peer leads."""
    peers = list(peers)
    joined = {
        peer.name: ConsumerProtocolMemberMetadata.decode(peer.assignor.metadata({"jobs"}).encode())
        for peer in peers
    }
    given = peers[0].assignor.assign(cluster(partitions), joined)
    for peer in peers:
        peer.assigned(ConsumerProtocolMemberAssignment.decode(given[peer.name].encode()), generation)


def test_assignor_keeps_busy_partitions_until_they_are_idle() -> None:
    """One member becomes three: four partitions have to move, three wait, and none is cut."""
    a, b, c = Peer("a"), Peer("b"), Peer("c")
    rebalance(1, [a])
    a.busy = of(0, 1, 2, 3, 4)
    rebalance(2, [a, b, c])
    assert a.assignor.outcome.kept == a.owned == of(0, 1, 2, 3, 4)
    assert a.assignor.outcome.promised == a.schedule.promised == of(0, 1, 2)
    assert b.owned | c.owned == of(5)
    a.busy = of(1, 3, 4)
    rebalance(3, [b, a, c])
    assert a.assignor.outcome.promised == of(1)
    a.busy = of(3, 4)
    rebalance(4, [c, b, a])

    assert a.owned == of(3, 4)
    assert len(b.owned) == len(c.owned) == 2
    assert a.schedule.promised == of()


def test_assignor_reports_to_every_member_that_a_partition_of_another_one_is_promised() -> None:
    """Also the member that is to receive it, and one that has nothing to do with it."""
    a, b, c = Peer("a"), Peer("b"), Peer("c")
    rebalance(1, [a, b], partitions=4)
    assert not a.assignor.outcome.is_moving
    a.busy, b.busy = a.owned, b.owned
    rebalance(2, [a, b, c], partitions=4)
    assert [len(peer.schedule.promised) for peer in (a, b, c)].count(1) == 1
    assert [peer.assignor.outcome.is_moving for peer in (a, b, c)] == [True] * 3
    a.busy = b.busy = of()
    rebalance(3, [a, b, c], partitions=4)

    assert [peer.assignor.outcome.is_moving for peer in (a, b, c)] == [False] * 3


def test_assignor_moves_the_partitions_of_a_leaving_member_as_they_become_idle() -> None:
    """Nothing is left to it in the end."""
    a, b = Peer("a"), Peer("b")
    rebalance(1, [a, b])
    a.busy = of(*[n for _, n in sorted(a.owned)][:1])
    a.schedule.leave()
    rebalance(2, [b, a])
    assert a.owned == a.assignor.outcome.promised == a.busy
    assert len(b.owned) == 5
    a.busy = of()
    rebalance(3, [b, a])

    assert a.owned == of()


def test_assignor_moves_an_overdue_partition_and_says_that_it_was_cut() -> None:
    """Its time is over, though its jobs are open."""
    a, b = Peer("a"), Peer("b")
    rebalance(1, [a], partitions=2)
    a.busy = of(0, 1)
    rebalance(2, [a, b], partitions=2)
    assert a.assignor.outcome.promised == of(0)
    a.now = 901
    rebalance(3, [a, b], partitions=2)

    assert a.owned == a.busy == of(1)
    assert a.assignor.outcome.overdue == of(0)
    assert b.owned == of(0)


def test_assignor_of_a_member_with_another_id_claims_nothing() -> None:
    """The group has forgotten it, and its partitions are another's by now."""
    a, b = Peer("a"), Peer("b")
    rebalance(1, [a, b])
    a.busy = of(*range(6))
    rebalance(2, [b])
    assert b.owned == of(*range(6))
    b.busy = b.owned
    a.name = "a-again"
    rebalance(3, [a, b])

    assert a.assignor.outcome.kept == of()
    assert b.assignor.outcome.kept == b.owned == of(*range(6))
    assert len(b.assignor.outcome.promised) == 3


def test_assignor_of_a_member_that_was_away_for_a_generation_loses_to_the_later_claim() -> None:
    """It kept its id, and open jobs on partitions that the group gave away: their new owner keeps them."""
    a, b = Peer("a"), Peer("b")
    rebalance(1, [a])
    a.busy = a.owned
    rebalance(2, [b])
    b.busy = b.owned
    rebalance(3, [a, b])

    assert a.assignor.outcome.kept == of()
    assert b.assignor.outcome.kept == of(*range(6))


def test_assignor_keeps_busy_partitions_through_a_generation_that_assigned_nothing() -> None:
    """The leader died before it assigned anything, so no partition changed its owner."""
    a, b = Peer("a"), Peer("b")
    rebalance(1, [a, b])
    a.busy = of(min(a.owned).partition)
    rebalance(3, [a, b])

    assert a.owned >= a.assignor.outcome.kept == a.busy != of()


def test_assignor_keeps_all_partitions_through_a_gap_where_owners_are_fenced() -> None:
    """The broker refuses the commits of a former owner, so nothing can go wrong unnoticed."""
    a = Peer("a", is_fenced=True)
    rebalance(1, [a])
    rebalance(5, [a])

    assert a.assignor.outcome.kept == of(*range(6))


def test_assignor_leads_members_of_the_previous_version() -> None:
    """Their partitions move at once, as before; a busy partition of this version waits."""
    new, old = Peer("new"), Stock("old")
    rebalance(1, [old], partitions=4)
    rebalance(2, [new, old], partitions=4)
    assert len(new.owned) == len(old.owned) == 2
    new.busy = new.owned
    another = Stock("another")
    rebalance(3, [new, old, another, Stock("third")], partitions=4)

    assert new.assignor.outcome.kept == new.owned
    assert len(new.owned) == 2
    assert len(new.assignor.outcome.promised) == 1
    assert len(old.owned) == len(another.owned) == 1


def test_assignor_follows_a_leader_of_the_previous_version() -> None:
    """It assigns as before: partitions that stay are kept, and none is promised."""
    new, old = Peer("new"), Stock("old")
    rebalance(1, [new], partitions=4)
    new.busy = new.owned
    rebalance(2, [old, new], partitions=4)

    assert len(new.owned) == len(old.owned) == 2
    assert new.assignor.outcome.kept == new.owned
    assert new.schedule.promised == of()
    assert not new.assignor.outcome.is_moving


def test_assignor_whose_plan_fails_assigns_as_the_previous_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the plan must not stop the group."""

    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    a, b = Peer("a"), Peer("b")
    rebalance(1, [a])
    monkeypatch.setattr(assignor, "plan", fails)
    with capture_logs() as logs:
        rebalance(2, [a, b])

    assert len(a.owned) == len(b.owned) == 3
    assert [entry["event"] for entry in logs] == ["rebalance.plan_failed"]


def test_assignor_gives_partitions_of_a_grown_topic_to_members_that_have_fewest() -> None:
    """New partitions are idle; nothing else moves."""
    a, b = Peer("a"), Peer("b")
    rebalance(1, [a, b])
    a.busy, b.busy = a.owned, b.owned
    before = a.owned, b.owned
    rebalance(2, [a, b], partitions=8)

    assert (a.assignor.outcome.kept, b.assignor.outcome.kept) == before
    assert len(a.owned) == len(b.owned) == 4


def test_assignor_assigns_nothing_of_a_topic_that_the_broker_does_not_know() -> None:
    """The group goes on; the topic's partitions are assigned when they appear."""
    a = Peer("a")
    rebalance(1, [a], partitions=0)

    assert a.owned == of()


@pytest.mark.parametrize("user_data", [b"", b"\xff", b"\x00\x00\x00\x00\x00\x00\x00\x01sw1"])
def test_assignor_leads_members_whose_metadata_is_damaged(user_data: bytes) -> None:
    """They are taken for new ones."""
    a = Peer("a")
    joined = {
        "a": a.assignor.metadata({"jobs"}),
        "b": ConsumerProtocolMemberMetadata(0, ["jobs"], user_data),
    }
    given = a.assignor.assign(cluster(4), joined)

    assert [len(assignment.partitions()) for assignment in given.values()] == [2, 2]
