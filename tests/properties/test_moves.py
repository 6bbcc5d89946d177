"""The plan of a rebalance against a simulated group: members join, leave, die, freeze, and have jobs open."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from streamworker.model import TopicPartition
from streamworker.progress.moves import NO_GENERATION, Claim, Plan, plan
from tests.properties.work import work_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TOPICS = ("bulk", "chat", "mail")
SEEDS = st.integers(0, 1 << 32)  # Hypothesis' own `randoms` mostly gives the same value again and again
SOME = st.frozensets(st.builds(TopicPartition, st.sampled_from(TOPICS), st.integers(0, 4)))


@dataclass
class Member:
    """One simulated member. A previous version reports neither open jobs nor that it leaves."""

    topics: frozenset[str]
    reports: bool = True
    owned: frozenset[TopicPartition] = frozenset()
    generation: int = NO_GENERATION
    busy: set[TopicPartition] = field(default_factory=set)
    promised: frozenset[TopicPartition] = frozenset()
    is_leaving: bool = False
    is_frozen: bool = False

    def claim(self) -> Claim:
        if not self.reports:
            return Claim(topics=self.topics, owned=self.owned, generation=self.generation)
        return Claim(
            topics=self.topics,
            owned=self.owned,
            generation=self.generation,
            busy=frozenset(self.busy),
            sealed=self.promised,
            is_leaving=self.is_leaving,
        )


def owner_by_partition(found: Plan) -> dict[TopicPartition, str]:
    """Return the owners; fails if a partition has two."""
    owners: dict[TopicPartition, str] = {}
    for member, assignment in found.assignments.items():
        for partition in assignment.owned:
            assert partition not in owners
            owners[partition] = member
    return owners


def check(claims: Mapping[str, Claim], partitions: Iterable[TopicPartition], found: Plan) -> None:
    """Hold a plan to what is true of every plan."""
    owners = owner_by_partition(found)
    subscribers = {topic: {m for m, claim in claims.items() if topic in claim.topics} for topic in TOPICS}
    staying = {topic: {m for m in subscribers[topic] if not claims[m].is_leaving} for topic in TOPICS}
    assert set(owners) == {partition for partition in partitions if subscribers[partition.topic]}
    for member, assignment in found.assignments.items():
        claim = claims[member]
        assert assignment.promised <= assignment.owned & claim.busy & claim.owned
        assert {partition.topic for partition in assignment.owned} <= claim.topics
        for topic in TOPICS:
            promised = {p for p in assignment.promised if p.topic == topic}
            stays = {p for p in assignment.owned & claim.owned - assignment.promised if p.topic == topic}
            if (
                promised & claim.busy
            ):  # no busy partition waits in place of an idle one, or of one that has waited
                assert stays <= claim.busy
                assert promised <= claim.sealed or not stays & claim.sealed
            kept = [p for p in assignment.owned - assignment.promised if p.topic == topic]
            of_topic = sum(partition.topic == topic for partition in partitions)
            if member in staying[topic]:
                assert len(kept) <= -(-of_topic // len(staying[topic]))
            elif staying[topic]:
                assert kept == []
    for partition in partitions:
        claimants = [m for m, claim in claims.items() if partition in claim.owned]
        latest = max((claims[m].generation for m in claimants), default=None)
        winners = [m for m in claimants if claims[m].generation == latest]
        if len(winners) > 1:
            assert not any(partition in found.assignments[m].promised for m in claims)
        if len(winners) == 1 and winners[0] in subscribers[partition.topic]:
            winner = winners[0]
            if partition in claims[winner].busy:
                assert owners[partition] == winner


class Group(RuleBasedStateMachine):
    """A group that does everything at once, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, Member] = {}
        self.counts = dict.fromkeys(TOPICS, 0)
        self.generation = 0
        self.names = 0

    @property
    def partitions(self) -> list[TopicPartition]:
        return [TopicPartition(topic, n) for topic, count in self.counts.items() for n in range(count)]

    @rule(topic=st.sampled_from(TOPICS), count=st.integers(1, 6))
    def grow(self, topic: str, count: int) -> None:
        """Add partitions to a topic."""
        self.counts[topic] += count

    @rule(topics=st.sets(st.sampled_from(TOPICS), min_size=2), reports=st.sampled_from([True, True, False]))
    def join(self, topics: set[str], reports: bool) -> None:
        """Add a member, sometimes with another subscription, sometimes of the previous version."""
        self.names += 1
        self.members[f"m{self.names * 7919 % 1000}"] = Member(frozenset(topics), reports)

    @precondition(lambda self: self.members)
    @rule(data=st.data(), freezes=st.booleans())
    def lose(self, data: st.DataObject, freezes: bool) -> None:
        """Let a member die, or freeze so that the group goes on without it."""
        name = data.draw(st.sampled_from(sorted(self.members)))
        if freezes:
            self.members[name].is_frozen = True
        else:
            del self.members[name]

    @rule()
    def thaw(self) -> None:
        """Let the frozen members come back with what they believe."""
        for member in self.members.values():
            member.is_frozen = False

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        """Let a member drain."""
        self.members[data.draw(st.sampled_from(sorted(self.members)))].is_leaving = True

    @rule(seed=SEEDS, share=st.sampled_from([0.1, 0.5, 1.0]))
    def work(self, seed: int, share: float) -> None:
        """Open and end jobs; none is opened on a promised partition."""
        random = Random(seed)
        for name in sorted(self.members):
            member = self.members[name]
            for partition in sorted(member.owned):
                if random.random() < share:
                    is_free = partition not in member.promised and not member.is_leaving
                    member.busy.discard(partition)
                    if is_free and random.random() < 0.5:
                        member.busy.add(partition)

    @rule(seed=SEEDS)
    def rebalance(self, seed: int) -> None:
        """Plan and apply; jobs of a partition that was lost are cut."""
        self.generation += 1
        present = {name: member for name, member in self.members.items() if not member.is_frozen}
        claims = {name: member.claim() for name, member in present.items()}
        found = plan(claims, self.partitions)
        check(claims, self.partitions, found)
        names, partitions = list(claims), self.partitions
        Random(seed).shuffle(names)
        Random(seed).shuffle(partitions)
        assert plan({name: claims[name] for name in names}, partitions) == found
        assert found.last_generation < self.generation
        for name, assignment in found.assignments.items():
            member = present[name]
            member.owned, member.promised = assignment.owned, assignment.promised
            member.generation = self.generation
            member.busy &= member.owned


TestGroup = Group.TestCase


@st.composite
def groups(
    draw: st.DrawFn, *, topics: tuple[str, ...] = TOPICS
) -> tuple[dict[str, Member], list[TopicPartition], Random]:
    """Give a group in any state that one generation can have: owners, claims of an older one, open jobs."""
    partitions = [TopicPartition(topic, n) for topic in topics for n in range(draw(st.integers(0, 12)))]
    names = [f"m{n}" for n in range(draw(st.integers(1, 7)))]
    random = Random(draw(SEEDS))
    members = {name: Member(frozenset(topics), generation=random.choice([3, 4, 4])) for name in names}
    skew = draw(st.sampled_from([1, 2, 7]))
    for partition in partitions:
        owner = members[names[random.randrange(len(names)) // skew]]
        if random.random() < 0.9:
            owner.owned |= {partition}
            owner.busy |= {partition} if random.random() < 0.7 else set()
            owner.promised |= {partition} if random.random() < 0.3 else set()
    leaving = random.sample(names, draw(st.integers(0, len(names) - 1)))
    for name in leaving:
        members[name].is_leaving = True
    return members, partitions, random


@given(
    st.dictionaries(
        st.sampled_from([f"m{n}" for n in range(5)]),
        st.builds(
            Claim,
            topics=st.frozensets(st.sampled_from(TOPICS)),
            owned=SOME,
            generation=st.integers(-1, 3),
            busy=SOME,
            sealed=SOME,
            is_leaving=st.booleans(),
        ),
    ),
    SOME,
    SEEDS,
)
def test_plan_of_claims_that_contradict_one_another_gives_each_partition_one_owner(
    claims: dict[str, Claim], partitions: frozenset[TopicPartition], seed: int
) -> None:
    """Whatever members believe; and every leader would decide alike."""
    found = plan(claims, partitions)
    check(claims, partitions, found)
    names, shuffled = list(claims), list(partitions)
    Random(seed).shuffle(names)
    Random(seed).shuffle(shuffled)

    assert plan({name: claims[name] for name in names}, shuffled) == found


@given(groups(), st.integers(1, 4))
def test_moves_finish_in_finitely_many_rebalances_and_leave_a_level_group(
    group: tuple[dict[str, Member], list[TopicPartition], Random], ends: int
) -> None:
    """Each rebalance in which a promised partition is idle moves one at least; then nothing moves any more."""
    members, partitions, random = group
    for _ in range(len(partitions) + 1):
        claims = {name: member.claim() for name, member in members.items()}
        found = plan(claims, partitions)
        check(claims, partitions, found)
        for name, member in members.items():
            member.owned, member.promised = found.assignments[name].owned, found.assignments[name].promised
            member.generation, member.busy = 5, member.busy & member.owned
        promised = sorted((partition, name) for name, m in members.items() for partition in m.promised)
        if not promised:
            break
        for partition, name in random.sample(promised, min(ends, len(promised))):
            members[name].busy.discard(partition)
        for member in members.values():
            for partition in member.owned - member.promised:
                (member.busy.add if random.random() < 0.7 else member.busy.discard)(partition)
    assert not any(member.promised for member in members.values())

    staying = [member for member in members.values() if not member.is_leaving]
    totals = [len(member.owned) for member in staying]
    assert max(totals) - min(totals) <= 1
    for topic in TOPICS:
        counts = [sum(p.topic == topic for p in member.owned) for member in staying]
        assert max(counts) - min(counts) <= 1
    for member in members.values():
        member.busy = {partition for partition in member.owned if random.random() < 0.5}
    again = plan({name: member.claim() for name, member in members.items()}, partitions)
    assert {name: a.owned for name, a in again.assignments.items()} == {
        name: member.owned for name, member in members.items()
    }
    assert not any(assignment.promised for assignment in again.assignments.values())


@given(groups(topics=("bulk",)))
def test_moves_of_one_topic_are_as_few_as_a_level_group_allows(
    group: tuple[dict[str, Member], list[TopicPartition], Random],
) -> None:
    """Members lose what they hold beyond their share, and of that as few as possible have to wait."""
    members, partitions, _ = group
    staying = [member for member in members.values() if not member.is_leaving]
    floor, extra = divmod(len(partitions), len(staying))
    held = [len(member.owned) for member in staying]
    keepable = sum(min(count, floor) for count in held) + min(extra, sum(count > floor for count in held))
    found = plan({name: member.claim() for name, member in members.items()}, partitions)
    kept = sum(
        len((found.assignments[name].owned - found.assignments[name].promised) & member.owned)
        for name, member in members.items()
    )

    assert kept == keepable
    surplus = [(m, len(m.owned) - (0 if m.is_leaving else floor)) for m in members.values()]
    waits = [max(0, over - len(m.owned - m.busy)) for m, over in surplus]
    spared = sum(count > 0 for (m, _), count in zip(surplus, waits, strict=True) if not m.is_leaving)
    promised = sum(len(assignment.promised) for assignment in found.assignments.values())
    assert promised == sum(waits) - min(extra, spared)


@given(groups())
def test_moves_of_a_group_that_leaves_as_a_whole_are_none(
    group: tuple[dict[str, Member], list[TopicPartition], Random],
) -> None:
    """No member could receive a partition, so all stay until their jobs have ended."""
    members, partitions, _ = group
    for member in members.values():
        member.is_leaving = True
    found = plan({name: member.claim() for name, member in members.items()}, partitions)

    assert all(member.owned <= found.assignments[name].owned for name, member in members.items())
    assert not any(assignment.promised for assignment in found.assignments.values())


def test_work_of_a_plan_grows_with_the_partitions_no_faster_than_sorting_them() -> None:
    """Ten times the partitions, in a group of forty to which ten more members come."""

    def work(count: int) -> int:
        partitions = [TopicPartition("bulk", number) for number in range(count)]
        topics = frozenset({"bulk"})
        claims = {
            f"m{n}": Claim(
                topics=topics, owned=frozenset(partitions[n::40]), busy=frozenset(partitions[n::80])
            )
            for n in range(40)
        }
        return work_of(
            lambda: plan({**claims, **{f"n{n}": Claim(topics=topics) for n in range(10)}}, partitions)
        )

    assert work(4000) < 11 * work(400)
