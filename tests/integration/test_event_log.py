"""The gateway's reader of the events topic against Apache Kafka: feeds, cursors, searches, replays."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.client.ids import new_job_id
from streamworker.config import KafkaSettings
from streamworker.gateway.event_log import KafkaEventLog, LogOptions
from streamworker.gateway.feeds import (
    START,
    FeedEvent,
    JobNotFound,
    Replay,
)
from streamworker.gateway.search import SearchLimits
from tests.integration.events import delta, ended, home, started
from tests.integration.test_brokers import create, producer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from streamworker.gateway.feeds import Feed
    from tests.brokers.apache import ApacheKafka

PARTITIONS = 2


class Counts:
    """An observer that adds up what is reported."""

    def __init__(self) -> None:
        self.feeds = self.records = self.overflows = self.followed = 0
        self.replays: list[str] = []
        self.searches: list[str] = []

    def subscribed(self, change: int) -> None:
        self.feeds += change

    def followed_changed(self, partitions: int) -> None:
        self.followed = partitions

    def replay_began(self, kind: str) -> None:
        self.replays.append(kind)

    def scanned(self, records: int) -> None:
        self.records += records

    def searched(self, outcome: str, records: int, seconds: float) -> None:
        assert records >= 0
        assert seconds >= 0
        self.searches.append(outcome)

    def mailbox_overflowed(self) -> None:
        self.overflows += 1

    def history_changed(self, size: int) -> None: ...


class Topic:
    """An events topic whose records the test writes."""

    def __init__(self, broker: ApacheKafka, name: str, writer: Any) -> None:
        self.broker, self.name, self.writer = broker, name, writer

    async def write(self, job_id: str, *values: bytes) -> int:
        """Write events of a job; return the offset of the first one."""
        sent = [
            await self.writer.send(self.name, value, key=job_id.encode(), partition=home(job_id, PARTITIONS))
            for value in values
        ]
        return int((await asyncio.gather(*sent))[0].offset)

    async def write_job(self, job_id: str, deltas: int = 3) -> int:
        """Write a whole job."""
        values = [delta(job_id, seq) for seq in range(1, deltas + 1)]
        return await self.write(job_id, started(job_id), *values, ended(job_id, deltas + 1))

    @asynccontextmanager
    async def log(self, observer: Counts | None = None, **options: Any) -> AsyncIterator[KafkaEventLog]:
        settings = KafkaSettings(bootstrap_servers=self.broker.bootstrap, request_timeout_s=10)
        log = KafkaEventLog(settings, self.name, LogOptions(**options), observer=observer)
        await log.start()
        try:
            yield log
        finally:
            await log.stop()


@pytest.fixture
async def topic(apache_kafka: ApacheKafka, topics: Callable[[str], str]) -> AsyncIterator[Topic]:
    name = topics("events")
    await create(apache_kafka, name, PARTITIONS)
    async with producer(apache_kafka) as writer:
        await writer.partitions_for(name)  # waits until the broker knows the topic
        yield Topic(apache_kafka, name, writer)


async def rest(feed: Feed, limit_s: float = 20) -> list[FeedEvent]:
    """Take every event to the end."""
    events = []
    async with asyncio.timeout(limit_s):
        while (event := await feed.next()) is not None:
            events.append(event)
    return events


def seqs(events: list[FeedEvent]) -> list[int]:
    return [event.seq for event in events]


async def test_event_log_feed_from_a_place_gets_every_event_of_the_job(topic: Topic) -> None:
    """The place is asked before the job exists; the value is the record's, byte for byte."""
    job_id = new_job_id()
    async with topic.log() as log:
        place = await log.place(job_id)
        feed = await log.open(job_id, cursor=place)
        reading = asyncio.create_task(rest(feed))
        await topic.write_job(job_id)
        events = await reading

    assert [event.kind for event in events] == ["started", "delta", "delta", "delta", "usage"]
    assert [event.value for event in events][1:4] == [delta(job_id, seq) for seq in (1, 2, 3)]
    assert place.endswith(".w")
    assert feed.resumed_from == place
    assert events[-1].cursor.endswith(".end")
    assert feed.is_over


async def test_event_log_resumes_behind_each_event_on_a_second_replica(topic: Topic) -> None:
    """Nothing twice, nothing missing, while the job runs and after its end."""
    job_id = new_job_id()
    async with topic.log() as first, topic.log() as second:
        feed = await first.open(job_id, cursor=await first.place(job_id))
        await topic.write(job_id, started(job_id), *[delta(job_id, seq) for seq in range(1, 6)])
        events = [event for _ in range(6) if (event := await feed.next()) is not None]
        resumed = [await second.open(job_id, cursor=event.cursor) for event in events]
        await topic.write(job_id, *[delta(job_id, seq) for seq in range(6, 9)], ended(job_id, 9))
        events += await rest(feed)
        live = [seqs(await rest(one)) for one in resumed]
        late = [seqs(await rest(await second.open(job_id, cursor=event.cursor))) for event in events]

    assert seqs(events) == list(range(10))
    assert live == [list(range(at + 1, 10)) for at in range(6)]
    assert late == [list(range(at + 1, 10)) for at in range(10)]


async def test_event_log_finds_a_job_by_the_time_in_its_id(topic: Topic) -> None:
    """Without a cursor, from the first event on; a fresh id without events is waited for."""
    job_id, fresh = new_job_id(), new_job_id()
    counts = Counts()
    await topic.write_job(job_id)
    async with topic.log(counts) as log:
        found = await log.open(job_id)
        waiting = await log.open(fresh)
        assert await asyncio.wait_for(rest(found), 10)
        assert found.resumed_from == waiting.resumed_from == START
        assert waiting.take() is None
        await topic.write_job(fresh)
        assert seqs(await rest(waiting)) == [0, 1, 2, 3, 4]

    assert counts.searches == ["found", "empty"]
    assert counts.feeds == 0


async def test_event_log_finds_a_job_whose_started_is_before_the_bound(topic: Topic) -> None:
    """A worker's clock was slow: the search steps back until a `started` is found."""
    now = time.time_ns() // 1_000_000
    job_id = new_job_id(now)
    partition = home(job_id, PARTITIONS)

    async def write_at(value: bytes, ms: int) -> None:
        await topic.writer.send_and_wait(
            topic.name, value, key=job_id.encode(), partition=partition, timestamp_ms=ms
        )

    await write_at(started(job_id), now - 600_000)
    await write_at(delta(job_id, 1), now)
    await write_at(ended(job_id, 2), now)
    async with topic.log() as log:
        assert seqs(await rest(await log.open(job_id))) == [0, 1, 2]


async def test_event_log_search_beyond_its_budget_reports_how_far_it_looked(topic: Topic) -> None:
    """Too many records, or an id whose events retention has deleted."""
    await topic.write("noise", *[delta("noise", seq) for seq in range(300)])
    other = next(f"other-{n}" for n in range(99) if home(f"other-{n}") == home("noise"))
    limits = SearchLimits(max_records=100)
    began = time.time_ns() // 1_000_000
    async with topic.log(limits=limits) as log:
        with pytest.raises(JobNotFound, match="pass `since`") as caught:
            await log.open(other)
        with pytest.raises(JobNotFound):
            await log.snapshot(other)

    assert began - 3_700_000 <= caught.value.searched_from <= began - 3_500_000


@pytest.mark.parametrize("replay", [Replay.SNAPSHOT, Replay.NONE])
async def test_event_log_replaces_the_replay(topic: Topic, replay: Replay) -> None:
    """One `snapshot` or nothing in place of the events before; then every event, to the end."""
    job_id = new_job_id()
    async with topic.log() as log:
        await topic.write(job_id, started(job_id), delta(job_id, 1, "Hel"), delta(job_id, 2, "lo"))
        feed = await log.open(job_id, replay=replay)
        first = feed.take()
        resumed = await log.open(job_id, cursor=first.cursor if first else feed.cursor, replay=replay)
        await topic.write(job_id, delta(job_id, 3, "!"), ended(job_id, 4))
        events = await rest(feed)
        assert await rest(resumed) == events

    assert seqs(events) == [3, 4]
    if replay is Replay.NONE:
        assert first is None
        assert feed.resumed_from.split(".")[2] == "2"
    else:
        assert first is not None
        assert first.kind == "snapshot"
        assert b'"content":"Hello"' in first.value
        assert first.seq == 2
