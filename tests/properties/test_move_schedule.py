"""Plan and schedule together, on a turned clock: a group under load grows, shrinks, and cuts no jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import TopicPartition
from streamworker.progress.moves import NO_GENERATION, Claim, MoveSchedule, plan

POLL_S = 0.25
HEARTBEAT_S = 1.0
LINGER_S = 2.0
INTERVAL_S = 3.0
TIMEOUT_S = 60.0
ABSENCE_S = 5.0
REMOVAL_S = 0.5
TOPICS = frozenset({"jobs"})


@dataclass
class Member:
    """A worker: `busy_until` is when the last open job of a partition ends, in seconds."""

    schedule: MoveSchedule
    owned: frozenset[TopicPartition] = frozenset()
    generation: int = NO_GENERATION
    busy_until: dict[TopicPartition, float] = field(default_factory=dict)
    is_leaving: bool = False
    is_away: bool = False
    claim: Claim | None = None  # what it reported last

    def busy(self, now: float) -> frozenset[TopicPartition]:
        return frozenset(partition for partition, end in self.busy_until.items() if end > now)


class Group:
    """Workers that look at their schedules every `POLL_S`, and notice a rebalance with their next heartbeat."""

    def __init__(self, partitions: int, random: Random) -> None:
        self.partitions = [TopicPartition("jobs", n) for n in range(partitions)]
        self.random = random
        self.members: dict[str, Member] = {}
        self.now = 0.0
        self.generation = 0
        self.rebalances = 0
        self.cuts: list[TopicPartition] = []
        self.waits: list[float] = []  # from a promised partition's last job to its new owner
        self.longest_s = 8.0
        self.names = 0
        self.waited = 0  # rebalances that waited for a member that is away
        self.removal_at = inf
        self.is_moving = False

    def join(self, count: int) -> None:
        for _ in range(count):
            self.names += 1
            schedule = MoveSchedule(
                move_timeout_s=TIMEOUT_S, linger_s=LINGER_S, interval_s=INTERVAL_S, absence_s=ABSENCE_S
            )
            self.members[f"m{self.names:02}"] = Member(schedule)
        self.rebalance()

    def leave(self, count: int) -> None:
        for member in self.random.sample(list(self.members.values()), count):
            member.is_leaving = True
            member.schedule.leave()

    def stop(self, name: str) -> None:
        """Stop a static member without open jobs. It stays in the group, for its successor, if no partition moves."""
        if self.is_moving:
            del self.members[name]
            self.rebalance()
        else:
            self.members[name].is_away = True

    @property
    def present(self) -> dict[str, Member]:
        return {name: member for name, member in self.members.items() if not member.is_away}

    def open_jobs(self) -> None:
        """Keep nearly every partition of which records are accepted busy."""
        for member in self.present.values():
            for partition in member.owned - member.schedule.promised:
                if not member.is_leaving and self.random.random() < 0.9:
                    end = self.now + self.random.uniform(0, self.longest_s)
                    member.busy_until[partition] = max(end, member.busy_until.get(partition, 0))

    def rebalance(self) -> None:
        self.rebalances += 1
        self.generation += 1
        claims = {}
        is_waiting = len(self.present) < len(self.members)
        self.waited += is_waiting
        ends = self.now + (ABSENCE_S if is_waiting else HEARTBEAT_S)
        self.removal_at = ends + ABSENCE_S if is_waiting else inf
        busy_at_report = {}
        for name, member in self.members.items():
            if member.is_away:
                assert member.claim is not None
                claims[name] = member.claim
                continue
            at = self.now + self.random.uniform(0, HEARTBEAT_S)
            report = member.schedule.report(member.busy(at), at)
            busy_at_report[name] = report.overdue
            claims[name] = member.claim = Claim(
                topics=TOPICS,
                owned=member.owned,
                generation=member.generation,
                busy=report.busy,
                sealed=report.sealed,
                is_leaving=report.is_leaving,
            )
        self.now = ends
        found = plan(claims, self.partitions)
        self.is_moving = found.is_moving
        for name, member in self.members.items():
            for partition in member.owned - found.assignments[name].owned:
                end = member.busy_until.pop(partition, 0.0)
                if end > self.now:
                    self.cuts.append(partition)
                elif partition in claims[name].sealed:
                    self.waits.append(
                        self.now - max(end, self.now - member.schedule.promised_s(partition, self.now))
                    )
            if member.is_away:
                continue
            member.owned, member.generation = found.assignments[name].owned, self.generation
            member.schedule.assigned(found.assignments[name].promised, self.now)

    def run(self, limit_s: float) -> float:
        """Go on until nothing is to move, and return how long it took."""
        begun = self.now
        while self.now < begun + limit_s:
            self.now += POLL_S
            self.open_jobs()
            for name, member in list(self.members.items()):
                if member.is_leaving and not member.owned:
                    del self.members[name]
            if self.now >= self.removal_at:
                self.members = self.present
                self.rebalance()
                continue
            asks = [
                m
                for m in self.present.values()
                if m.schedule.rejoin_at(m.busy(self.now), self.now) <= self.now
            ]
            for member in asks:
                member.schedule.requested(self.now)
            if asks:
                self.rebalance()
            elif self.removal_at == inf and not any(m.schedule.is_pending for m in self.members.values()):
                break
        return self.now - begun

    def is_level(self) -> bool:
        counts = [len(member.owned) for member in self.members.values()]
        return sum(counts) == len(self.partitions) and max(counts) - min(counts) <= 1


@given(
    st.integers(1, 30),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4),
    st.integers(0, 1 << 32),
)
def test_group_that_grows_and_shrinks_under_load_cuts_nothing_and_becomes_level_in_time(
    partitions: int, steps: list[tuple[int, int]], seed: int
) -> None:
    """A partition waits for its new owner no longer than the interval and the two rebalances around it."""
    group = Group(partitions, Random(seed))
    group.join(1)
    group.open_jobs()
    for joining, leaving in steps:
        group.join(joining)
        group.leave(min(leaving, len(group.members) - 1))
        assert group.run(300) < group.longest_s + 60
        assert group.is_level()

    assert group.cuts == []
    assert all(wait <= INTERVAL_S + 2 * (HEARTBEAT_S + POLL_S) for wait in group.waits)


@given(st.integers(2, 24), st.integers(2, 6), st.integers(1, 3), st.integers(0, 1 << 32))
def test_group_waits_once_for_a_static_member_that_is_away(
    partitions: int, members: int, joining: int, seed: int
) -> None:
    """The broker removes it before a partition that has become idle asks for another rebalance. No stream is cut."""
    group = Group(partitions, Random(seed))
    group.join(members)
    group.run(300)
    away = group.random.choice(sorted(group.members))
    group.members[away].busy_until.clear()
    group.stop(away)
    group.open_jobs()
    group.waits.clear()
    group.join(joining)
    group.run(300)

    assert group.waited == 1
    assert away not in group.members
    assert group.cuts == []
    assert group.is_level()
    assert all(
        wait <= ABSENCE_S + REMOVAL_S + INTERVAL_S + 2 * (HEARTBEAT_S + POLL_S) for wait in group.waits
    )


@given(st.integers(5, 24), st.integers(1, 4), st.integers(0, 1 << 32))
def test_group_waits_for_no_static_member_that_stops_while_partitions_move(
    partitions: int, members: int, seed: int
) -> None:
    """It leaves the group, and what was promised to it stays where it is."""
    group = Group(partitions, Random(seed))
    group.join(members)
    group.run(300)
    for member in group.members.values():
        member.busy_until = dict.fromkeys(member.owned, group.now + 6)
    group.join(1)
    newest = f"m{group.names:02}"
    group.members[newest].busy_until.clear()
    assert group.is_moving
    group.stop(newest)
    group.run(300)

    assert group.waited == 0
    assert newest not in group.members
    assert group.cuts == []
    assert group.is_level()
    assert all(wait <= INTERVAL_S + 2 * (HEARTBEAT_S + POLL_S) for wait in group.waits)


@given(st.integers(2, 12), st.integers(0, 1 << 32))
def test_group_with_jobs_past_the_timeout_cuts_what_is_to_move_and_not_before(
    partitions: int, seed: int
) -> None:
    """Jobs that never end hold their partition until the timeout, and only those of it that has to move are cut."""
    group = Group(partitions, Random(seed))
    group.join(1)
    (first,) = group.members.values()
    first.busy_until = dict.fromkeys(group.partitions, 1e9)
    begun = group.now
    group.join(1)
    promised = first.schedule.promised
    assert len(promised) == partitions // 2
    group.run(TIMEOUT_S - 5)
    assert group.cuts == []
    group.longest_s = 0
    group.run(300)

    assert group.now - begun <= TIMEOUT_S + INTERVAL_S + 3 * HEARTBEAT_S
    assert group.is_level()
    assert sorted(group.cuts) == sorted(promised)
