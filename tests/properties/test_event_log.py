"""The gateway's event log: every client gets what `EventReader` gives for the topic with its committed terminal events.

The log runs on readers in memory, whose progress Hypothesis chooses: the topic grows, tail and committed reader of each
replica read some records, clients take some events, are cut, and resume with their last cursor on any replica; replicas
restart, mailboxes overflow, recent records are forgotten, and partitions are paused.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.structs import ConsumerRecord
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamworker.config import KafkaSettings
from streamworker.gateway import event_log, followed
from streamworker.gateway.cursors import Cursor
from streamworker.gateway.event_log import KafkaEventLog
from streamworker.gateway.feeds import Push, Tally
from streamworker.gateway.log_options import LogOptions
from streamworker.gateway.shared_limit import CONNECTION_BYTES, SharedLimit
from streamworker.handover import Kind
from streamworker.kafka.compat import AbortedRecord
from tests.properties.test_handover import Entry, Log, logs, valid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from streamworker.gateway.job_feed import JobFeed
    from streamworker.gateway.log_observer import LogObserver

KINDS = {Kind.STARTED: "started", Kind.RESTARTED: "started", Kind.DELTA: "delta", Kind.ENDED: "usage"}


class Topic:
    """A topic with one partition, which is visible up to a length."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.length = 0

    def end(self, *, committed_only: bool) -> int:
        return self.log.stable(self.length) if committed_only else self.length

    def key(self, entry: Entry) -> bytes:
        return b"stranger" if entry.value is None else b"j"

    def records(self, start: int, stop: int, *, with_aborted: bool, marks_aborted: bool = False) -> list[Any]:
        found = []
        for offset in range(start, stop):
            entry = self.log.entries[offset]
            if entry.value is None and entry.ends_at is None:
                continue  # the marker of a transaction
            if entry.is_aborted and not with_aborted:
                continue
            kind = AbortedRecord if entry.is_aborted and marks_aborted else ConsumerRecord
            value = b"{}" if entry.value is None else entry.value
            found.append(kind("t", 0, offset, 0, 0, self.key(entry), value, None, 0, 0, ()))
        return found


class Tail:
    """Stands for `TopicTail`. It reads when the test calls `read`."""

    def __init__(
        self,
        topic: Topic,
        on_records: Callable[[int, Sequence[Any], int], None],
        *,
        committed_only: bool,
        starts_paused: bool,
        on_read: Callable[[], None] = lambda: None,
        **_: Any,
    ) -> None:
        self.topic, self.on_records, self.committed_only = topic, on_records, committed_only
        self.on_read = on_read
        self.positions: dict[int, int] = {}
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_paused = starts_paused

    async def start(self) -> None:
        self.positions = {0: self.topic.end(committed_only=self.committed_only)}

    async def stop(self) -> None: ...

    def pause(self, _: int) -> None:
        self.is_paused = True

    def resume(self, _: int) -> None:
        self.is_paused = False

    def move(self, partition: int, offset: int) -> None:
        self.positions[partition] = offset

    def read(self, count: int) -> None:
        """Read at most `count` offsets."""
        start = self.positions[0]
        stop = min(start + count, self.topic.end(committed_only=self.committed_only))
        if self.is_paused or start >= stop:
            return
        records = self.topic.records(start, stop, with_aborted=not self.committed_only)
        self.positions[0] = stop
        self.on_records(0, records, stop)
        self.on_read()


class Scanner:
    """Stands for `LogScanner`."""

    def __init__(self, topic: Topic, batch: int) -> None:
        self.topic, self.batch = topic, batch

    async def stop(self) -> None: ...

    async def topic_id(self, _: str) -> bytes:
        return b"the only one"

    async def beginning(self, _: Any) -> int:
        return 0

    async def end(self, _: Any, *, committed_only: bool) -> int:
        return self.topic.end(committed_only=committed_only)

    async def offset_at(self, _: Any, __: int) -> int:
        return 0

    async def scan(
        self, _: Any, start: int, stop: int, *, committed_only: bool, with_aborted: bool
    ) -> AsyncIterator[list[Any]]:
        assert stop <= self.topic.end(committed_only=committed_only)
        assert committed_only == with_aborted
        while start < stop:
            await asyncio.sleep(0)
            end = min(stop, start + self.batch)
            if records := self.topic.records(start, end, with_aborted=True, marks_aborted=with_aborted):
                yield records
            start = end


Step = tuple[str, int, int]

STEPS = st.lists(
    st.tuples(
        st.sampled_from([*["grow", "tail", "committed", "take"] * 2, "yield", "cut", "restart", "pause"]),
        st.integers(0, 3),
        st.integers(1, 6),
    ),
    max_size=60,
)
"""What happens: kind, which replica or client, and how much."""


class World:
    """Two replicas and three clients of one job; deltas are pushed to the third one."""

    def __init__(
        self, log: Log, options: LogOptions, batch: int, shared_bytes: int = CONNECTION_BYTES
    ) -> None:
        self.shared = SharedLimit(shared_bytes)
        self.topic = Topic(log)
        self.options = options
        self.batch = batch
        self.replicas: list[KafkaEventLog] = []
        self.clients: list[Client] = []

    def scanner(self) -> Scanner:
        return Scanner(self.topic, self.batch)

    async def replica(self, observer: LogObserver | None = None) -> KafkaEventLog:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(event_log, "LogScanner", lambda *_: self.scanner())
            patch.setattr(
                followed, "TopicTail", lambda _, __, on_records, **how: Tail(self.topic, on_records, **how)
            )
            log = KafkaEventLog(KafkaSettings(), "t", self.options, observer=observer)
        await log.start()
        return log

    async def run(self, steps: list[Step], cursors: list[str | None]) -> None:
        self.replicas = [await self.replica() for _ in range(2)]
        kinds = [Client, Client, PushedClient]
        self.clients = [kind(cursor, self.shared) for kind, cursor in zip(kinds, cursors, strict=False)]
        for at, client in enumerate(self.clients):
            await client.connect(self.replicas[at % 2])
        for step in steps:
            await self.step(*step)
        while self.topic.length < len(self.topic.log.entries):
            await self.step("grow", 0, self.batch)
            for at in range(2):
                await self.step("tail", at, self.batch)
            await self.step("take", 2, self.batch)
        for _ in range(3):
            for at in range(2):
                await self.step("tail", at, 1000)
                await self.step("committed", at, 1000)
            for at in range(len(self.clients)):
                await self.step("take", at, 1000)
        for client in self.clients:
            await client.leave()
        for log in self.replicas:
            await log.stop()

    async def step(self, kind: str, which: int, count: int) -> None:
        log = self.replicas[which % 2]
        client = self.clients[which % len(self.clients)]
        readers: dict[str, Any] = {"tail": log._followed.tail, "committed": log._followed.committed_tail}
        match kind:
            case "grow":
                self.topic.length = min(len(self.topic.log.entries), self.topic.length + count)
            case "tail" | "committed":
                readers[kind].read(count)
            case "take":
                await client.take(count)
            case "yield":
                await settle(count)
            case "cut":
                await client.connect(self.replicas[count % 2])
            case "restart":
                await self.restart(which % 2, count % 2)
            case "pause":
                pause(log)

    async def restart(self, at: int, other: int) -> None:
        """Start a replica anew; its clients connect to it or to the other one."""
        log = self.replicas[at]
        self.replicas[at] = await self.replica()
        for client in self.clients:
            if client.log is log:
                await client.connect(self.replicas[other])
        await log.stop()


def pause(log: KafkaEventLog) -> None:
    """Pause the partition, as after some time without a feed."""
    if not log._followed._users[0] and 0 in log._followed._active:
        log._followed._pause(0)


class Client:
    """Follows the job, as a browser does: it resumes with the cursor of the last event that it had."""

    def __init__(self, cursor: str | None, shared: SharedLimit) -> None:
        self.shared = shared
        self.cursor = cursor
        self.events: list[tuple[str, int]] = []
        self.log: KafkaEventLog | None = None
        self.feed: JobFeed | None = None

    async def leave(self) -> None:
        if self.feed is not None:
            self.shared.remove(self.feed)
            self.feed.close()
            self.feed = None

    async def connect(self, log: KafkaEventLog) -> None:
        await self.leave()
        self.log = log
        opening = asyncio.create_task(log.open("j", cursor=self.cursor))
        async with asyncio.timeout(5):
            while not opening.done():
                await settle(30)
                tail: Any = log._followed.tail
                tail.read(1)  # it may be behind the cursor
        self.feed = await opening
        self.shared.add(self.feed)

    async def take(self, count: int) -> None:
        assert self.feed is not None
        for _ in range(count):
            if (event := self.feed.take()) is None:
                await settle(8)
                if (event := self.feed.take()) is None:
                    return
            self.note(event.kind, event.cursor)

    def note(self, kind: str, cursor: str) -> None:
        self.events.append((kind, Cursor.parse(cursor).offset))
        self.cursor = cursor


class PushedClient(Client):
    """Follows the job as a stream of the gateway does: it waits, and deltas are written to it until it is full."""

    def __init__(self, cursor: str | None, shared: SharedLimit) -> None:
        super().__init__(cursor, shared)
        self.task: asyncio.Task[None] | None = None
        self.room = 0
        """How many deltas it takes before it is full."""

    async def leave(self) -> None:
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task
        await super().leave()

    async def connect(self, log: KafkaEventLog) -> None:
        await super().connect(log)
        assert self.feed is not None
        self.task = asyncio.create_task(self._follow(self.feed))

    async def _follow(self, feed: JobFeed) -> None:
        push = Push(_CursorOnly(), self._write, Tally())
        while (event := feed.take() or await feed.next(push)) is not None:
            self.note(event.kind, event.cursor)

    def _write(self, cursor: bytes) -> None:
        assert self.feed is not None
        self.note("delta", cursor.decode())
        self.room -= 1
        if self.room <= 0:
            self.feed.hold()

    async def take(self, count: int) -> None:
        self.room = count
        before = -1
        while before < len(self.events):
            before = len(self.events)
            await settle(10)


class _CursorOnly:
    """A framing that leaves the value out."""

    def delta(self, cursor: bytes, _: bytes) -> bytes:
        return cursor


async def settle(turns: int) -> None:
    """Let the tasks of the event loop run."""
    for _ in range(turns):
        await asyncio.sleep(0)


def expected(log: Log) -> Iterator[tuple[str, int]]:
    return ((KINDS[kind], offset) for kind, offset in valid(log))


def suffixes(wanted: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Return everything, and what follows from each `started` on: a replica may know a later attempt only."""
    return [wanted, *(wanted[at:] for at, (kind, _) in enumerate(wanted) if kind == "started")]


OPTIONS = st.builds(
    LogOptions,
    mailbox_bytes=st.sampled_from([1, 700, 1500, 1 << 20]),
    history_bytes=st.sampled_from([0, 6000, 1 << 20]),
    reads_all=st.booleans(),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(logs(reruns=False), STEPS, OPTIONS, st.integers(1, 9), st.sampled_from([0, 4000, 1 << 20]))
def test_event_log_client_gets_what_the_event_reader_gives_through_cuts_and_restarts(
    log: Log, steps: list[Step], options: LogOptions, batch: int, shared_bytes: int
) -> None:
    """Clients with a place, without a cursor, and slow ones that share a limit; no event twice, none missing, one committed ending."""
    world = World(log, options, batch, shared_bytes)
    asyncio.run(world.run(steps, ["0.0.w", None, "0.0.w"]))

    wanted = list(expected(log))
    with_place, without, with_place_too = (client.events for client in world.clients)
    assert with_place == with_place_too == wanted
    assert without in suffixes(wanted)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(logs(reruns=False), st.integers(0, 40), st.integers(0, 40), OPTIONS, st.integers(1, 9))
def test_event_log_resumes_behind_every_event_on_another_replica(
    log: Log, length: int, tail: int, options: LogOptions, batch: int
) -> None:
    """Whatever the second replica has read when the client comes."""
    asyncio.run(_resumes_behind_every_event(log, length, tail, options, batch))


async def _resumes_behind_every_event(
    log: Log, length: int, tail: int, options: LogOptions, batch: int
) -> None:
    world = World(log, options, batch)
    await world.run([], ["0.0.w"])
    wanted = list(expected(log))
    feed = await (replica := await world.replica()).open("j")
    cursors = [event.cursor for _ in wanted if (event := await feed.next()) is not None]
    await replica.stop()

    for at, cursor in enumerate(cursors[:-1]):
        offset = wanted[at][1]
        again = World(log, options, batch)
        again.topic.length = max(offset + 1, min(length, len(log.entries)))
        steps: list[Step] = [("tail", 0, tail), ("committed", 1, tail), ("yield", 0, 3)]
        await again.run(steps, [cursor])
        assert again.clients[0].events == wanted[at + 1 :], cursor
