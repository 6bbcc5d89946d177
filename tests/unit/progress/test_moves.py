"""Plans by example, what a member keeps, and when it asks for a rebalance."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from streamworker.model import TopicPartition
from streamworker.progress.moves import Claim, MemberIdentity, MoveSchedule, Plan, kept_partitions, plan

TOPICS = frozenset({"jobs"})


def of(*numbers: int, topic: str = "jobs") -> frozenset[TopicPartition]:
    return frozenset(TopicPartition(topic, number) for number in numbers)


def claim(*owned: int, busy: frozenset[TopicPartition] = frozenset(), **options: Any) -> Claim:
    return Claim(
        topics=TOPICS, owned=of(*owned), generation=options.pop("generation", 1), busy=busy, **options
    )


NEW = Claim(topics=TOPICS)


def numbers(found: Plan, member: str) -> tuple[list[int], list[int]]:
    """Return what a member owns, and what of it is promised."""
    assignment = found.assignments[member]
    return sorted(n for _, n in assignment.owned), sorted(n for _, n in assignment.promised)


def test_plan_of_a_joining_member_moves_idle_partitions_and_promises_busy_ones() -> None:
    """Of four partitions one is idle: it moves now, a second one when its jobs have ended."""
    found = plan({"a": claim(0, 1, 2, 3, busy=of(0, 1, 2)), "b": NEW}, of(0, 1, 2, 3))

    assert numbers(found, "a") == ([0, 1, 2], [0])
    assert numbers(found, "b") == ([3], [])


def test_plan_of_a_leaving_member_moves_all_that_is_idle_and_promises_the_rest() -> None:
    """Its busy partitions have no other owner until their jobs have ended."""
    found = plan({"a": claim(0, 1, 2, busy=of(1), is_leaving=True), "b": claim(3)}, of(0, 1, 2, 3))

    assert numbers(found, "a") == ([1], [1])
    assert numbers(found, "b") == ([0, 2, 3], [])


def test_plan_of_a_promise_that_an_idle_partition_fulfils_withdraws_it() -> None:
    """Partition 2 became idle first, so the jobs of partition 0 need not end."""
    found = plan({"a": claim(0, 1, 2, busy=of(0, 1), sealed=of(0)), "b": claim(3)}, of(0, 1, 2, 3))

    assert numbers(found, "a") == ([0, 1], [])
    assert numbers(found, "b") == ([2, 3], [])


def test_plan_of_a_member_of_the_previous_version_moves_its_partitions_at_once() -> None:
    """It reports no open jobs, and would not know what a promise is."""
    found = plan({"old": claim(0, 1), "b": NEW}, of(0, 1))

    assert numbers(found, "old") == ([1], [])
    assert numbers(found, "b") == ([0], [])


def test_plan_of_a_claim_that_two_members_make_believes_the_later_generation() -> None:
    """A frozen worker comes back with open jobs on a partition that is another's by now."""
    zombie = claim(0, 1, busy=of(0, 1), generation=2)
    found = plan({"zombie": zombie, "b": claim(0, 1, busy=of(0, 1), generation=3)}, of(0, 1))

    assert numbers(found, "zombie") == ([], [])
    assert numbers(found, "b") == ([0, 1], [0])
    assert found.last_generation == 3


def test_plan_of_two_equal_claims_believes_neither() -> None:
    """No member keeps jobs on a partition of which two members claim to be the owner."""
    found = plan({"a": claim(0, busy=of(0)), "b": claim(0, busy=of(0))}, of(0))

    assert [assignment.promised for assignment in found.assignments.values()] == [frozenset()] * 2


def test_plan_of_another_member_deals_evenly_within_each_topic() -> None:
    """A busy topic and an idle one both get the new member's help, though the idle one's partitions move for nothing."""
    bulk, chat = of(*range(6), topic="bulk"), of(*range(6), topic="chat")
    topics = frozenset({"bulk", "chat"})
    found = plan(
        {"a": Claim(topics=topics, owned=bulk | chat, busy=bulk), "b": Claim(topics=topics)}, bulk | chat
    )

    assert found.assignments["b"].owned == of(0, 1, 2, topic="chat")
    assert found.assignments["a"].promised == of(0, 1, 2, topic="bulk")


def test_plan_of_many_small_topics_moves_no_more_than_the_new_member_gets() -> None:
    """Twenty topics of one partition: four move, and not some of each member's."""
    partitions = [TopicPartition(f"t{n:02}", 0) for n in range(20)]
    topics = frozenset(topic for topic, _ in partitions)
    claims = {
        f"m{n}": Claim(topics=topics, owned=frozenset(partitions[n::4]), generation=1) for n in range(4)
    }
    found = plan({**claims, "new": Claim(topics=topics)}, partitions)

    assert len(found.assignments["new"].owned) == 4
    assert all(found.assignments[name].owned <= claim.owned for name, claim in claims.items())


def test_plan_of_a_topic_that_only_some_subscribe_to_leaves_the_other_topics_alone() -> None:
    """In the middle of a rollout that adds a topic, open jobs are as safe as before."""
    both = Claim(topics=frozenset({"jobs", "new"}), owned=of(0), generation=1, busy=of(0))
    found = plan({"a": both, "b": claim(1, busy=of(1))}, of(0, 1) | of(0, 1, topic="new"))

    assert found.assignments["a"].owned == of(0) | of(0, 1, topic="new")
    assert found.assignments["b"].owned == of(1)


@pytest.mark.parametrize(("busy", "is_moving"), [(of(), False), (of(0, 1), True)])
def test_plan_is_moving_while_a_partition_is_promised(
    busy: frozenset[TopicPartition], *, is_moving: bool
) -> None:
    """Another rebalance follows when its jobs have ended; where all is idle, everything has moved."""
    assert plan({"a": claim(0, 1, busy=busy), "b": NEW}, of(0, 1)).is_moving is is_moving


def test_plan_without_members_or_partitions_is_empty() -> None:
    """Nothing to decide is not an error."""
    assert plan({}, of(0)).assignments == {}
    assert not plan({}, of(0)).is_moving
    assert plan({"a": NEW}, ()).assignments["a"].owned == frozenset()


@pytest.mark.parametrize(
    ("before", "now", "options", "kept"),
    [
        (None, MemberIdentity("a", 1), {}, of()),
        (MemberIdentity("a", 4), MemberIdentity("a", 5), {}, of(0, 1)),
        (MemberIdentity("a", 4), MemberIdentity("a", 4), {}, of(0, 1)),
        (MemberIdentity("a", 4), MemberIdentity("b", 5), {"is_fenced": True}, of()),
        (MemberIdentity("a", 4), MemberIdentity("a", 6), {}, of()),
        (MemberIdentity("a", 4), MemberIdentity("a", 6), {"is_fenced": True}, of(0, 1)),
        (MemberIdentity("a", 4), MemberIdentity("a", 6), {"last_generation": 4}, of(1)),
        (MemberIdentity("a", 4), MemberIdentity("a", 6), {"last_generation": 5}, of()),
        (MemberIdentity("a", 4), MemberIdentity("a", 3), {"last_generation": 2}, of(1)),
    ],
    ids=[
        "first-assignment",
        "next-generation",
        "same-generation",
        "new-member-id",
        "gap",
        "gap-and-fenced",
        "gap-without-claims",
        "gap-with-a-later-claim",
        "generation-went-back",
    ],
)
def test_kept_partitions_are_those_that_no_other_member_can_have_owned(
    before: MemberIdentity | None,
    now: MemberIdentity,
    options: dict[str, Any],
    kept: frozenset[TopicPartition],
) -> None:
    """Partition 1 has open jobs, 2 is lost, 3 is new."""
    options = {"last_generation": None, "is_fenced": False} | options
    found = kept_partitions(
        before, now, owned_before=of(0, 1, 2), owned=of(0, 1, 3), busy=of(1, 2), **options
    )

    assert found == kept


def scheduled(*promised: int, at: float = 100.0) -> MoveSchedule:
    schedule = MoveSchedule(move_timeout_s=900, linger_s=5, interval_s=3)
    schedule.assigned(of(*promised), at)
    return schedule


def test_schedule_without_promises_asks_for_nothing() -> None:
    """A stable group does not rebalance."""
    schedule = scheduled()

    assert not schedule.is_pending
    assert schedule.rejoin_at(of(1, 2), 200) == inf


def test_schedule_asks_at_once_when_the_last_promised_partition_is_idle() -> None:
    """There is nothing more to wait for."""
    schedule = scheduled(0, 1)
    assert schedule.rejoin_at(of(0, 1, 2), 110) == 100 + 900

    assert schedule.rejoin_at(of(2), 111) == 111


def test_schedule_lingers_for_others_when_the_first_promised_partition_is_idle() -> None:
    """From the first one on, however many follow."""
    schedule = scheduled(0, 1, 2)
    assert schedule.rejoin_at(of(1, 2), 110) == 115

    assert schedule.rejoin_at(of(2), 114) == 115


def test_schedule_asks_no_sooner_than_the_interval_after_an_assignment_or_a_request() -> None:
    """Each rebalance stops everybody's intake for a moment."""
    schedule = scheduled(0)
    assert schedule.rejoin_at(of(), 101) == 103
    schedule.requested(103)

    assert schedule.rejoin_at(of(), 104) == 106


def test_schedule_asks_for_nothing_while_a_rebalance_is_under_way() -> None:
    """It would be lost, or would make the group begin anew."""
    schedule = scheduled(0)
    schedule.rebalancing()
    assert schedule.rejoin_at(of(), 200) == inf
    schedule.assigned(of(0), 201)

    assert schedule.rejoin_at(of(), 202) == 204


def test_schedule_reports_a_partition_past_the_timeout_as_idle() -> None:
    """It moves although its job is open; the time is kept through every rebalance in between."""
    schedule = scheduled(0, 1)
    schedule.assigned(of(0), 500)
    schedule.assigned(of(0, 1), 800)
    assert schedule.promised_s(TopicPartition("jobs", 0), 900) == 800
    assert schedule.report(of(0, 1, 2), 999).busy == of(0, 1, 2)
    schedule.assigned(of(0, 1), 999.5)
    assert schedule.rejoin_at(of(0, 1), 999.5) == 1002.5
    report = schedule.report(of(0, 1, 2), 1002.5)

    assert report.busy == of(1, 2)
    assert report.overdue == of(0)
    assert report.sealed == of(0, 1)


def test_schedule_does_not_call_an_idle_partition_overdue() -> None:
    """Nothing is cut when it moves."""
    assert scheduled(0).report(of(), 2000).overdue == of()


def test_schedule_asks_when_the_timeout_of_the_only_promised_partition_passes() -> None:
    """The owner's clock bounds the wait; the leader has none."""
    schedule = scheduled(0)
    assert schedule.rejoin_at(of(0), 999) == 1000

    assert schedule.rejoin_at(of(0), 1000) == 1000


def test_schedule_announces_a_departure_at_once() -> None:
    """Without regard to the interval: new jobs of its partitions wait until then."""
    schedule = scheduled()
    schedule.leave()
    assert schedule.is_pending
    assert schedule.rejoin_at(of(0), 100.5) == 100.5
    schedule.requested(100.5)
    assert schedule.rejoin_at(of(0), 101) == 103.5
    assert schedule.report(of(0), 101).is_leaving
    schedule.assigned(of(0), 102)

    assert schedule.rejoin_at(of(0), 103) == 102 + 900


def test_schedule_announces_a_departure_again_that_came_after_the_report() -> None:
    """The rebalance under way does not know of it."""
    schedule = scheduled()
    schedule.report(of(), 100)
    schedule.leave()
    assert schedule.rejoin_at(of(), 100) == inf
    schedule.assigned(of(), 101)

    assert schedule.rejoin_at(of(), 101) == 101


@pytest.mark.parametrize(
    ("took_s", "due_s"),
    [(0.2, 3), (1.9, 3), (2.0, 4.5), (4.0, 4.5), (60.0, 4.5)],
    ids=["short", "nearly-half", "half", "whole", "longer"],
)
def test_schedule_after_a_rebalance_that_waited_for_an_absent_member_asks_after_its_removal(
    took_s: float, due_s: float
) -> None:
    """A request before it would make the group wait for that member once more. Others may have joined before this one."""
    schedule = MoveSchedule(move_timeout_s=900, linger_s=5, interval_s=3, absence_s=4)
    schedule.report(of(0), 100)
    schedule.assigned(of(0), 100 + took_s)

    assert schedule.rejoin_at(of(), 100 + took_s) == 100 + took_s + due_s


def test_schedule_waits_for_the_removal_once() -> None:
    """The next rebalance is a short one again. A member that is assigned without a report has not waited."""
    schedule = MoveSchedule(move_timeout_s=900, linger_s=5, interval_s=3, absence_s=4)
    schedule.assigned(of(0), 90)
    assert schedule.rejoin_at(of(), 90) == 93
    schedule.report(of(0), 100)
    schedule.assigned(of(0), 104)
    schedule.report(of(0), 108.2)
    schedule.assigned(of(0), 108.3)

    assert schedule.rejoin_at(of(), 108.3) == 111.3


def test_schedule_of_a_group_without_static_members_keeps_its_interval() -> None:
    """The broker removes a dynamic member that is away when the rebalance ends."""
    schedule = scheduled()
    schedule.report(of(0), 100)
    schedule.assigned(of(0), 145)

    assert schedule.rejoin_at(of(), 145) == 148
