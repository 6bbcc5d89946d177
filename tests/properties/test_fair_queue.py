"""The fair queue against a model that remembers every waiting job: no job starves, and no entry outlives its job."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamworker.limits.fair_queue import FairQueue, TopicShares, ValueLimit, divide
from tests.properties.work import work_of

TOPICS = ("bulk", "chat", "mail")
VALUES = (None, "a", b"b")
SEEDS = st.integers(0, 1 << 32)
WEIGHTS = st.dictionaries(st.sampled_from(TOPICS), st.integers(1, 9), min_size=2)


class Job(NamedTuple):
    number: int
    topic: str
    value: object
    is_retry: bool


class Queues(RuleBasedStateMachine):
    """Two upstreams with one bound on the streams of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.bound = 1
        self.limit = ValueLimit(self.bound)
        self.shares = [TopicShares({"chat": 3}), TopicShares()]
        self.queues: list[FairQueue[Job]] = [FairQueue(shares, self.limit) for shares in self.shares]
        self.waiting: list[list[Job]] = [[], []]
        self.open: list[tuple[int, Job]] = []
        self.jobs = 0

    def is_full(self, value: object) -> bool:
        return value is not None and sum(job.value == value for _, job in self.open) >= self.bound

    @rule(
        n=st.integers(0, 1), topic=st.sampled_from(TOPICS), value=st.sampled_from(VALUES), retry=st.booleans()
    )
    def add(self, n: int, topic: str, value: str | bytes | None, retry: bool) -> None:
        """Let a job wait."""
        self.jobs += 1
        job = Job(self.jobs, topic, value, retry)
        self.queues[n].add(job, topic=topic, value=value, is_retry=retry)
        self.waiting[n].append(job)

    @rule(n=st.integers(0, 1), data=st.data())
    def withdraw(self, n: int, data: st.DataObject) -> None:
        """Let a job go away, or one that does not wait."""
        job = data.draw(st.sampled_from([*self.waiting[n], Job(0, "bulk", None, False)]))
        assert self.queues[n].remove(job) is (job in self.waiting[n])
        if job in self.waiting[n]:
            self.waiting[n].remove(job)

    @rule(n=st.integers(0, 1))
    def take(self, n: int) -> None:
        """Open a stream, if any may open."""
        job = self.queues[n].head()
        may_go = [waiting for waiting in self.waiting[n] if not self.is_full(waiting.value)]
        assert (job is None) is (not may_go)
        if job is None:
            return
        assert self.queues[n].pop() == job
        of_its_value = [other for other in may_go if (other.topic, other.value) == (job.topic, job.value)]
        assert job == min(of_its_value, key=lambda other: (not other.is_retry, other.number))
        self.waiting[n].remove(job)
        self.open.append((n, job))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """End a stream."""
        n, job = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.queues[n].leave(topic=job.topic, value=job.value)

    @rule(n=st.integers(0, 1))
    def clear(self, n: int) -> None:
        """Take all waiting jobs away."""
        assert self.queues[n].clear() == self.waiting[n]
        self.waiting[n] = []

    @invariant()
    def remembers_only_what_waits_or_is_open(self) -> None:
        for n, queue in enumerate(self.queues):
            assert list(queue) == self.waiting[n]
            assert len(queue) == len(self.waiting[n])
            assert set(queue._topics) == {job.topic for job in self.waiting[n]}
            for topic, rotation in queue._topics.items():
                values = {*rotation._ready, *rotation._parked}
                assert values == {job.value for job in self.waiting[n] if job.topic == topic}
                assert len(values) == len(rotation._ready) + len(rotation._parked)
            assert set(self.shares[n]._open) == {job.topic for m, job in self.open if m == n}
        assert set(self.limit._open) == {job.value for _, job in self.open if job.value is not None}
        parked = {v for queue in self.queues for rotation in queue._topics.values() for v in rotation._parked}
        assert set(self.limit._parked) == parked
        assert all(map(self.is_full, parked))


TestQueues = Queues.TestCase


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 59), SEEDS)
def test_job_leaves_within_as_many_rounds_as_jobs_of_its_value_are_before_it(
    values: list[int], marked: int, seed: int
) -> None:
    """However many jobs of other values come meanwhile; a round has one job of each value."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    random = Random(seed)
    for number, value in enumerate(values):
        queue.add(("", number), value=value)
    marked %= len(values)
    before = values[:marked].count(values[marked])
    others = [value for value in range(9) if value != values[marked]]
    pops = 0
    while ("", marked) in queue:
        for value in random.choices(others, k=3):
            queue.add(("new", random.getrandbits(60)), value=value)
        queue.pop()
        pops += 1

    assert pops <= (before + 1) * (1 + len(others))


def are_level(counts: dict[str, int], weights: dict[str, int]) -> bool:
    """Whether no topic is ahead of another one, for its weight, by more than one of each."""
    return all(
        counts[one] / weight - counts[other] / others <= 1 / weight + 1 / others + 1e-9
        for one, weight in weights.items()
        for other, others in weights.items()
    )


@given(WEIGHTS, st.integers(1, 40), SEEDS)
def test_open_streams_of_topics_with_work_are_shared_by_weight(
    weights: dict[str, int], slots: int, seed: int
) -> None:
    """To within one stream of each topic, however long their jobs take."""
    queue: FairQueue[int] = FairQueue(TopicShares(weights))
    random = Random(seed)
    topics = dict(enumerate(sorted(weights) * 400))
    for number, topic in topics.items():
        queue.add(number, topic=topic)
    streams = [topics[queue.pop()] for _ in range(slots)]
    slow = random.choice(sorted(weights))
    for _ in range(100):
        ends = random.randrange(slots)
        if streams[ends] == slow and random.random() < 0.9:
            continue
        queue.leave(topic=streams.pop(ends))
        streams.append(topics[queue.pop()])
        assert are_level({topic: streams.count(topic) for topic in weights}, weights)


@given(WEIGHTS, st.integers(0, 50), SEEDS)
def test_calls_of_topics_with_work_are_shared_by_weight_where_one_stream_is_open(
    weights: dict[str, int], alone: int, seed: int
) -> None:
    """To within one call of each topic; one that had the upstream for itself before owes nothing."""
    queue: FairQueue[int] = FairQueue(TopicShares(weights))
    topics = dict(enumerate(sorted(weights) * 300))
    first = Random(seed).choice(sorted(weights))
    for number, topic in topics.items():
        if topic == first:
            queue.add(number, topic=topic)
    for _ in range(alone):
        queue.leave(topic=topics[queue.pop()])
    for number, topic in topics.items():
        if topic != first:
            queue.add(number, topic=topic)
    calls = dict.fromkeys(weights, 0)
    for _ in range(100):
        topic = topics[queue.pop()]
        queue.leave(topic=topic)
        calls[topic] += 1
        assert are_level(calls, weights)


@given(st.lists(st.booleans(), max_size=80))
def test_jobs_of_one_topic_and_value_leave_first_come_first_served(retries: list[bool]) -> None:
    """Without `weights` and `fair_by` nothing is new: retries, then first calls, each in their order."""
    queue: FairQueue[int] = FairQueue()
    for number, is_retry in enumerate(retries):
        queue.add(number, is_retry=is_retry)
    left = [queue.pop() for _ in retries]

    assert left == sorted(range(len(retries)), key=lambda number: (not retries[number], number))


@given(st.integers(0, 5000), st.sets(st.sampled_from(TOPICS), min_size=1), WEIGHTS)
def test_divide_gives_all_by_weight_and_each_topic_one(
    total: int, topics: set[str], weights: dict[str, int]
) -> None:
    """To within one, and not more than there is unless a topic would have none."""
    shares = divide(total, topics, weights)
    whole = sum(weights.get(topic, 1) for topic in topics)
    exact = {topic: total * weights.get(topic, 1) / whole for topic in topics}

    assert set(shares) == topics
    assert all(share >= 1 for share in shares.values())
    assert all(abs(max(1, exact[topic]) - share) <= 1 for topic, share in shares.items())
    assert sum(shares.values()) == total or min(exact.values()) < 1


def test_work_of_a_job_does_not_grow_with_the_jobs_that_wait() -> None:
    """Add, withdraw from the middle, and take: as many steps with 4,000 waiting jobs as with 40."""

    def work(count: int) -> int:
        queue: FairQueue[int] = FairQueue(limit=ValueLimit(1))
        for number in range(count):
            queue.add(number, value=number % (count // 4))
            if number % 2:
                queue.head()

        def job() -> None:
            queue.add(-1, value=3)
            queue.remove(count // 2)
            queue.pop()
            queue.remove(-1)

        return work_of(job)

    assert work(4000) <= work(40) * 1.1
