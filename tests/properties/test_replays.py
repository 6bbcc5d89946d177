"""The gateway's replays: after a restart, each part of the log is read once for all clients that come back.

A replica has just started. Clients of several jobs come one after the other, each with the cursor of an event of its
job, while the topic grows, transactions end, and both live readers go on. Scans take some time. Hypothesis chooses all
of it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamworker.gateway import replays
from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.log_observer import NullLogObserver
from streamworker.gateway.log_options import LogOptions
from tests.properties.test_event_log import KINDS, Scanner, Topic, World, settle
from tests.properties.test_handover import Entry, Log, valid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from streamworker.gateway.event_log import KafkaEventLog
    from streamworker.gateway.job_feed import JobFeed

Events = list[tuple[str, int]]
"""Kind and offset of each event."""


class Jobs(Topic):
    """A partition with the events of several jobs."""

    def key(self, entry: Entry) -> bytes:
        return b"stranger" if entry.value is None else str(entry.event["job_id"]).encode()

    def expected(self, job_id: str) -> Events:
        """Return what a client of the job has to get."""
        key = job_id.encode()
        own = [one if self.key(one) == key else Entry(ends_at=one.ends_at) for one in self.log.entries]
        return [(KINDS[kind], offset) for kind, offset in valid(Log(own))]

    def cursor(self, offset: int) -> str:
        """Return the cursor of an event."""
        event = self.log.entries[offset].event
        return str(Cursor(0, offset, event["seq"], attempt8(event["attempt"])))


def job(log: Log, job_id: str, failures: Sequence[bool], deltas: int) -> list[Callable[[], None]]:
    """Return the steps that write a job. Each failure is an attempt without a terminal event, or with one that is rolled back."""
    steps: list[Callable[[], None]] = []
    for number, has_ending in enumerate([*failures, None]):
        event = {"job_id": job_id, "attempt": f"{job_id}-{number}"}
        cause = "redelivered" if number else "new"
        steps.append(partial(log.write, job_id, type="started", seq=0, cause=cause, **event))
        steps.append(partial(log.end, job_id))
        steps += [partial(log.write, type="delta", seq=seq, **event) for seq in range(1, deltas + 1)]
        if has_ending is not False:
            usage = {"type": "usage", "seq": deltas + 1, "status": "completed"}
            steps.append(partial(log.write, job_id, **usage, **event))
            steps.append(partial(log.end, job_id, is_aborted=has_ending is not None))
    return steps


def mixed(jobs: list[list[Callable[[], None]]], choose: Callable[[int], int]) -> None:
    """Write the steps of jobs in a mixed order."""
    while jobs:
        at = choose(len(jobs))
        jobs[at].pop(0)()
        if not jobs[at]:
            jobs.pop(at)


class SlowScanner(Scanner):
    """A scanner that takes some turns of the event loop for each batch.

    A scan that begins at an offset of `held` returns nothing until its event is set.
    """

    def __init__(self, topic: Topic, batch: int, turns: Sequence[int]) -> None:
        super().__init__(topic, batch)
        self.turns = cycle(turns)
        self.held: dict[int, asyncio.Event] = {}
        self.ranges: list[tuple[int, int]] = []
        self.returned: Counter[int] = Counter()
        """How often the record at each offset was returned."""

    async def scan(
        self, _: Any, start: int, stop: int, *, committed_only: bool, with_aborted: bool
    ) -> AsyncIterator[list[Any]]:
        assert start < stop <= self.topic.end(committed_only=committed_only)
        self.ranges.append((start, stop))
        held = self.held.get(start)
        while start < stop:
            end = min(stop, start + self.batch)
            records = self.topic.records(start, end, with_aborted=True, marks_aborted=with_aborted)
            await settle(next(self.turns))
            if held is not None:
                await held.wait()
            if records:
                self.returned.update(record.offset for record in records)
                yield records
            start = end


class Scanned(NullLogObserver):
    """Adds up what replays have read."""

    def __init__(self) -> None:
        self.records = 0

    def scanned(self, records: int) -> None:
        self.records += records


class Restart(World):
    """A replica that has just started, and the clients that come back to it."""

    def __init__(
        self, topic: Jobs, length: int, batch: int, turns: Sequence[int], options: LogOptions | None = None
    ) -> None:
        """`length` is that of the topic when the replica starts."""
        super().__init__(topic.log, options or LogOptions(), batch)
        self.topic: Jobs = topic
        self.topic.length = length
        self.scans = SlowScanner(topic, batch, turns)
        self.observer = Scanned()
        self.tail_records = 0
        self.coming: list[asyncio.Task[None]] = []
        self.clients_of: list[
            tuple[JobFeed, Events, Events]
        ] = []  # with the events taken, and the expected ones

    def scanner(self) -> Scanner:
        return self.scans

    async def begin(self) -> KafkaEventLog:
        self.replicas = [await self.replica(self.observer)]
        return self.replicas[0]

    def events(self) -> list[int]:
        """Return the offsets of all events that a client may have had last."""
        jobs = {str(entry.event["job_id"]) for entry in self.topic.log.entries if entry.value is not None}
        found = [one for job_id in sorted(jobs) for one in self.topic.expected(job_id)]
        return sorted(offset for kind, offset in found if kind != "usage" and offset < self.topic.length)

    def come(self, offset: int) -> None:
        """Let a client come back that had the event at this offset last."""
        self.coming.append(asyncio.create_task(self._come(offset)))

    async def _come(self, offset: int) -> None:
        job_id = str(self.topic.log.entries[offset].event["job_id"])
        expected = self.topic.expected(job_id)
        feed = await self.replicas[0].open(job_id, cursor=self.topic.cursor(offset))
        assert feed.resumed_from == self.topic.cursor(offset)
        self.clients_of.append((feed, [], [one for one in expected if one[1] > offset]))

    def take(self) -> None:
        """Let all clients take what is there."""
        for feed, events, _ in self.clients_of:
            while (event := feed.take()) is not None:
                events.append((event.kind, Cursor.parse(event.cursor).offset))

    def read(self, reader: str, count: int) -> None:
        """Let the tail or the committed reader read at most a number of offsets."""
        followed: Any = self.replicas[0]._followed
        if reader == "committed":
            followed.committed_tail.read(count)
            return
        start = followed.tail.positions[0]
        followed.tail.read(count)
        end = followed.tail.positions[0]
        self.tail_records += len(self.topic.records(start, end, with_aborted=True))

    async def finish(self) -> None:
        """Let everything be written and read, and compare what the clients got."""
        self.topic.length = len(self.topic.log.entries)
        async with asyncio.timeout(5):
            while self._is_short:
                self.read("tail", 1000)
                self.read("committed", 1000)
                await settle(5)
                self.take()
        for feed, events, expected in self.clients_of:
            assert events == expected, feed.resumed_from
        await self.replicas[0].stop()

    @property
    def _is_short(self) -> bool:
        for task in self.coming:
            if task.done():
                task.result()
        return not all(task.done() for task in self.coming) or any(
            len(events) < len(expected) for _, events, expected in self.clients_of
        )

    @property
    def kept(self) -> int:
        """How many records are in memory."""
        return sum(block.count for block in self.replicas[0]._history)


@st.composite
def topics(draw: st.DrawFn) -> Jobs:
    """Draw a topic with the records of some jobs."""
    log = Log()
    failures, deltas = st.lists(st.booleans(), max_size=2), st.integers(0, 5)
    jobs = [job(log, f"j{number}", draw(failures), draw(deltas)) for number in range(draw(st.integers(1, 5)))]
    mixed(jobs, lambda count: draw(st.integers(0, count - 1)))
    return Jobs(log)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "yield", "yield", "grow", "tail", "committed"]), st.integers(0, 99)
    ),
    max_size=60,
)
"""What happens: a client comes back, or how much is read or written, or for how many turns scans go on."""


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    topics(),
    STEPS,
    st.integers(2, 60),
    st.integers(1, 30),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.sampled_from([0, 3, 20_000]),
)
def test_replays_after_a_restart_read_no_record_twice(
    topic: Jobs, steps: list[tuple[str, int]], length: int, batch: int, turns: list[int], near: int
) -> None:
    """Whatever the clients' cursors are, in whatever order they come; each gets every event that it has missed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replays, "NEAR", near)
        asyncio.run(_restart(topic, steps, length, batch, turns))


async def _restart(
    topic: Jobs, steps: list[tuple[str, int]], length: int, batch: int, turns: list[int]
) -> None:
    world = Restart(topic, min(length, len(topic.log.entries)), batch, turns)
    await world.begin()
    for kind, count in steps:
        if kind == "come":
            offsets = world.events()
            if offsets:
                world.come(offsets[count % len(offsets)])
        elif kind == "yield":
            await settle(count % 20)
        elif kind == "grow":
            topic.length = min(len(topic.log.entries), topic.length + count % 10)
        else:
            world.read(kind, count % 10)
        world.take()
    await world.finish()

    # Blocks do not overlap. So a record that was scanned twice, or that the tail returned too, is counted once here.
    assert world.observer.records + world.tail_records == world.kept
