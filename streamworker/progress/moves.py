"""Decide which member of a consumer group owns which partition, without cutting the jobs that are open on it.

A partition that is to move away from a member that stays alive, and that has open jobs, is *promised*: its owner keeps
it for now, accepts no more records from it, and asks for another rebalance when its jobs have ended. A partition
without open jobs moves at once. The leader of the group runs `plan`; every member runs a `MoveSchedule` and asks
`kept_partitions` what an assignment leaves untouched.

The target is balanced per topic and in total: the members' counts differ by at most one. It is sticky: a partition that
need not move does not. Kafka Connect's incremental assignor (KIP-415) and KIP-429 are the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import inf
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from collections.abc import Set as AbstractSet

    from streamworker.model import TopicPartition

__all__ = [
    "NO_GENERATION",
    "Assignment",
    "Claim",
    "MemberIdentity",
    "MoveSchedule",
    "Plan",
    "Report",
    "kept_partitions",
    "plan",
]

_REMOVAL_S = 0.5
"""How long after `absence_s` a member knows of the rebalance that follows the removal of one that is away, usually."""

NO_GENERATION = -1
"""The generation of a member that was never given an assignment."""


class MemberIdentity(NamedTuple):
    """The identity under which a member was given an assignment: the broker's id for it and the group's generation."""

    member_id: str
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What one member reports when it joins a rebalance.

    `owned` is the assignment that it was last given, in `generation`. `busy` and `sealed` are parts of it: the
    partitions with open jobs, and those that were promised before. `topics` are the topics that it subscribes to.
    """

    topics: frozenset[str]
    owned: frozenset[TopicPartition] = frozenset()
    generation: int = NO_GENERATION
    busy: frozenset[TopicPartition] = frozenset()
    sealed: frozenset[TopicPartition] = frozenset()
    is_leaving: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What one member is given: its partitions, and those of them that move on when their open jobs have ended."""

    owned: frozenset[TopicPartition]
    promised: frozenset[TopicPartition] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The assignment of every member, and the highest generation that a member claimed."""

    assignments: Mapping[str, Assignment]
    last_generation: int

    @property
    def is_moving(self) -> bool:
        """Whether a partition is promised, so that another rebalance is to follow."""
        return any(assignment.promised for assignment in self.assignments.values())


def plan(claims: Mapping[str, Claim], partitions: Iterable[TopicPartition]) -> Plan:
    """Assign the partitions to the members that subscribe to their topics.

    The same input gives the same plan, whatever its order. O(n log n) in the partitions, for each topic O(members).
    """
    owners = _owners(claims)
    by_topic: dict[str, list[TopicPartition]] = {}
    for partition in sorted(set(partitions)):
        by_topic.setdefault(partition.topic, []).append(partition)
    shares = [_TopicShare(topic, found, claims, owners) for topic, found in by_topic.items()]
    _level(shares, claims)
    owned: dict[str, set[TopicPartition]] = {member: set() for member in claims}
    promised: dict[str, set[TopicPartition]] = {member: set() for member in claims}
    for share in shares:
        share.keep(owned, promised)
    for share in shares:
        share.deal(owned)
    return Plan(
        assignments={
            member: Assignment(owned=frozenset(owned[member]), promised=frozenset(promised[member]))
            for member in claims
        },
        last_generation=max((claim.generation for claim in claims.values()), default=NO_GENERATION),
    )


def _owners(claims: Mapping[str, Claim]) -> dict[TopicPartition, str | None]:
    """Return the owner of each claimed partition: the claim of the highest generation, none where two are equal.

    A member that was out of the group for a while claims an old generation and loses.
    """
    owners: dict[TopicPartition, str | None] = {}
    generations: dict[TopicPartition, int] = {}
    for member, claim in claims.items():
        for partition in claim.owned:
            known = generations.get(partition)
            if known is None or claim.generation > known:
                owners[partition], generations[partition] = member, claim.generation
            elif claim.generation == known:
                owners[partition] = None
    return owners


class _TopicShare:
    """One topic: who holds its partitions, how many each member shall have, and which ones move."""

    def __init__(
        self,
        topic: str,
        partitions: Collection[TopicPartition],
        claims: Mapping[str, Claim],
        owners: Mapping[TopicPartition, str | None],
    ) -> None:
        self.topic = topic
        subscribers = sorted(member for member, claim in claims.items() if topic in claim.topics)
        staying = [member for member in subscribers if not claims[member].is_leaving]
        self._is_kept = not staying
        """Whether every subscriber leaves, so that moving a partition to another one of them would be in vain."""
        self.receivers = frozenset(staying or subscribers)
        self._claims = claims
        self._held: dict[str, list[TopicPartition]] = {member: [] for member in subscribers}
        self._pool: list[TopicPartition] = []
        for partition in partitions:
            owner = owners.get(partition)
            if owner is None or owner not in self._held:
                self._pool.append(partition)
            else:
                self._held[owner].append(partition)
        for member, held in self._held.items():
            held.sort(key=lambda partition, member=member: self._cost(member, partition))  # type: ignore[misc]
        self.floor, self._extra = divmod(len(partitions), len(self.receivers)) if self.receivers else (0, 0)
        self.above = set(self._holders_above_floor()[: self._extra])
        """The members that shall have one partition more than `floor`."""

    def _cost(self, member: str, partition: TopicPartition) -> tuple[bool, bool, TopicPartition]:
        """Order the partitions of a member by what it costs to move them, the cheapest first.

        An idle partition needs no wait; of the busy ones, a promised one has waited already.
        """
        claim = self._claims[member]
        return partition in claim.busy, partition not in claim.sealed, partition

    def _holders_above_floor(self) -> list[str]:
        """Return the receivers that hold more than `floor` partitions, those first that one more spares a wait."""
        found = [member for member in self.receivers if len(self._held[member]) > self.floor]

        def rank(member: str) -> tuple[bool, bool, str]:
            held = self._held[member]
            is_busy, is_new, _ = self._cost(member, held[len(held) - self.floor - 1])
            return not is_busy, not is_new, member

        return sorted(found, key=rank)

    @property
    def missing(self) -> int:
        """Return how many members more shall have one above `floor`."""
        return self._extra - len(self.above)

    def shift_cost(self, member: str) -> tuple[bool, bool, str]:
        """Order the topics in which a member could have one partition less, the cheapest first."""
        held = self._held[member]
        is_busy, is_new, _ = self._cost(member, held[0]) if held else (False, False, None)
        return is_busy, is_new, self.topic

    def _target(self, member: str) -> int:
        if self._is_kept:
            return max(len(self._held[member]), self.floor + (member in self.above))
        return self.floor + (member in self.above) if member in self.receivers else 0

    def keep(
        self, owned: Mapping[str, set[TopicPartition]], promised: Mapping[str, set[TopicPartition]]
    ) -> None:
        """Leave each member what it may keep and what is busy; put the rest into the pool."""
        for member, held in self._held.items():
            surplus = max(0, len(held) - self._target(member))
            busy = self._claims[member].busy
            moving = [partition for partition in held[:surplus] if partition not in busy]
            promised[member].update(partition for partition in held[:surplus] if partition in busy)
            owned[member].update(held)
            owned[member].difference_update(moving)
            self._pool.extend(moving)
            self._held[member] = held[surplus:]

    def deal(self, owned: Mapping[str, set[TopicPartition]]) -> None:
        """Give each partition of the pool to the member that is furthest below its target."""
        if not self.receivers:
            return
        below = [
            (len(self._held[member]) - self._target(member), len(owned[member]), member)
            for member in self.receivers
        ]
        heapify(below)
        for partition in self._pool:
            lacking, count, member = below[0]
            owned[member].add(partition)
            heapreplace(below, (lacking + 1, count + 1, member))


def _level(shares: Collection[_TopicShare], claims: Mapping[str, Claim]) -> None:
    """Choose, topic by topic, which members shall have one partition above the floor, so that the totals are level.

    A member that holds such a partition keeps it where that is possible. Each shift lowers the sum of the squared
    totals, so there is a last one.
    """
    totals = dict.fromkeys(claims, 0)
    for share in shares:
        for member in share.receivers:
            totals[member] += share.floor + (member in share.above)
    for share in shares:
        free = [(totals[member], member) for member in share.receivers - share.above]
        heapify(free)
        for _ in range(share.missing):
            _, member = heappop(free)
            share.above.add(member)
            totals[member] += 1
    above = {
        member: sorted(
            (share for share in shares if member in share.above), key=lambda share: share.shift_cost(member)
        )
        for member in claims
    }
    while (shift := _shift(totals, above)) is not None:
        share, giver, taker = shift
        share.above.remove(giver)
        share.above.add(taker)
        above[giver].remove(share)
        above[taker].append(share)
        totals[giver] -= 1
        totals[taker] += 1


def _shift(
    totals: Mapping[str, int], above: Mapping[str, list[_TopicShare]]
) -> tuple[_TopicShare, str, str] | None:
    """Find a topic in which a member with a high total can have one partition less, and a member one more."""
    order = sorted(totals, key=lambda member: (totals[member], member))
    for giver in reversed(order):
        for taker in order:
            if totals[giver] - totals[taker] <= 1:
                break
            for share in above[giver]:
                if taker in share.receivers and taker not in share.above:
                    return share, giver, taker
    return None


def kept_partitions(
    before: MemberIdentity | None,
    now: MemberIdentity,
    *,
    owned_before: AbstractSet[TopicPartition],
    owned: AbstractSet[TopicPartition],
    busy: AbstractSet[TopicPartition],
    last_generation: int | None,
    is_fenced: bool,
) -> frozenset[TopicPartition]:
    """Return the partitions that no other member can have owned since the member's last assignment.

    Their jobs go on; the rest of `owned` is to be opened anew. `last_generation` is the plan's, None where the leader
    did not send it. `is_fenced` says that the broker refuses the commits of a former owner, whatever it believes.

    A member can miss generations and keep its id: a leader may have died before it assigned anything. Then the
    partitions are still its own if no member of the present one claims a later generation. Such a claimant may be dead,
    though, and have owned what was idle; what was busy was not given away.
    """
    if before is None or before.member_id != now.member_id:
        return frozenset()
    both = frozenset(owned_before & owned)
    if now.generation - before.generation in {0, 1} or is_fenced:
        return both
    if last_generation is not None and last_generation <= before.generation:
        return both & busy
    return frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a member reports about its partitions in the next rebalance. `overdue` ones are busy, and not reported so."""

    busy: frozenset[TopicPartition]
    sealed: frozenset[TopicPartition]
    overdue: frozenset[TopicPartition]
    is_leaving: bool


class MoveSchedule:
    """One member's promised partitions: what it reports of them, and when it asks for a rebalance.

    A rebalance stops the whole group's intake for a moment, so a member asks for one seldom: when the last promised
    partition is idle, or some time after the first one, and never while one is under way. All times are seconds on one
    monotonic clock.
    """

    def __init__(
        self,
        *,
        move_timeout_s: float,
        linger_s: float = 1.5,
        interval_s: float = 2.0,
        absence_s: float = inf,
    ) -> None:
        """Bound how long a promised partition may stay busy (`move_timeout_s`).

        The schedule asks at most `linger_s` after the first promised partition became idle, and at least `interval_s`
        after the last rebalance.

        `absence_s` is how long a rebalance waits for a static member that is away. The broker removes such a member as
        long after the rebalance, and begins another one. A request before that would make the group wait once more, so
        the schedule asks for nothing until then.
        """
        self._move_timeout_s = move_timeout_s
        self._linger_s = linger_s
        self._interval_s = interval_s
        self._absence_s = absence_s
        self._reported_at = inf
        self._promised_at: dict[TopicPartition, float] = {}
        self._first_idle_at = inf
        self._quiet_until = -inf
        self._requested_at = -inf
        self._is_rebalancing = False
        self._is_leaving = False
        self._has_announced = False

    @property
    def promised(self) -> frozenset[TopicPartition]:
        """The partitions of which no more records are accepted."""
        return frozenset(self._promised_at)

    @property
    def is_pending(self) -> bool:
        """Whether `rejoin_at` can be finite: a partition is promised, or a departure is not announced yet."""
        return bool(self._promised_at) or self._must_announce

    def promised_s(self, partition: TopicPartition, now: float) -> float:
        """Return for how long this partition has been promised, 0 if it is not."""
        return now - self._promised_at.get(partition, now)

    def leave(self) -> None:
        """Announce with the next rebalance that this member leaves the group; `rejoin_at` asks for one at once."""
        self._is_leaving = True

    def rebalancing(self) -> None:
        """Note that a rebalance is under way."""
        self._is_rebalancing = True

    def report(self, busy: AbstractSet[TopicPartition], now: float) -> Report:
        """Return what to report when joining a rebalance. No record may be accepted from here to `assigned`."""
        self._is_rebalancing = True
        self._reported_at = now
        self._has_announced = self._is_leaving
        overdue = frozenset(partition for partition in self._overdue(now) if partition in busy)
        return Report(
            busy=frozenset(busy) - overdue,
            sealed=self.promised,
            overdue=overdue,
            is_leaving=self._is_leaving,
        )

    def assigned(self, promised: Iterable[TopicPartition], now: float) -> None:
        """Note the end of a rebalance. A partition that is promised again keeps the time of its first promise."""
        self._promised_at = {partition: self._promised_at.get(partition, now) for partition in promised}
        self._first_idle_at = inf
        is_long = now - self._reported_at >= self._absence_s / 2  # others may have joined a heartbeat earlier
        self._quiet_until = now + (self._absence_s + _REMOVAL_S if is_long else self._interval_s)
        self._reported_at = inf
        self._requested_at = -inf
        self._is_rebalancing = False

    def rejoin_at(self, busy: AbstractSet[TopicPartition], now: float) -> float:
        """Return when to ask for a rebalance if nothing else happens; infinity if there is no reason to."""
        if self._is_rebalancing:
            return inf
        if self._must_announce:
            return max(now, self._requested_at + self._interval_s)
        if not self._promised_at:
            return inf
        overdue = self._overdue(now)
        waiting = [since for p, since in self._promised_at.items() if p in busy and p not in overdue]
        if len(waiting) < len(self._promised_at):
            self._first_idle_at = min(self._first_idle_at, now)
        due = min((since + self._move_timeout_s for since in waiting), default=now)
        due = min(due, self._first_idle_at + self._linger_s)
        return max(now, due, self._requested_at + self._interval_s, self._quiet_until)

    def requested(self, now: float) -> None:
        """Note that a rebalance was asked for; it is asked for again if none comes."""
        self._requested_at = now

    @property
    def _must_announce(self) -> bool:
        return self._is_leaving and not self._has_announced

    def _overdue(self, now: float) -> set[TopicPartition]:
        timeout = self._move_timeout_s
        return {partition for partition, since in self._promised_at.items() if now - since >= timeout}
