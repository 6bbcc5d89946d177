"""The gateway's reader of the events topic against Apache Kafka: feeds, cursors, searches, replays."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import NewTopic, RecordsToDelete

from streamworker.client.ids import new_job_id
from streamworker.config import KafkaSettings
from streamworker.errors import KafkaRefused
from streamworker.gateway.event_log import KafkaEventLog
from streamworker.gateway.feeds import (
    START,
    BrokerUnavailable,
    CursorLost,
    FeedEvent,
    FeedLost,
    InvalidCursor,
    JobNotFound,
    Replay,
)
from streamworker.gateway.log_options import LogOptions
from streamworker.gateway.search import SearchLimits
from tests.integration.events import delta, ended, home, started, written
from tests.integration.stage import eventually
from tests.integration.test_brokers import admin, create, producer

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
        self.partitions = PARTITIONS

    async def write(self, job_id: str, *values: bytes) -> int:
        """Write events of a job; return the offset of the first one."""
        sent = [
            await self.writer.send(
                self.name, value, key=job_id.encode(), partition=home(job_id, self.partitions)
            )
            for value in values
        ]
        return int((await asyncio.gather(*sent))[0].offset)

    async def write_job(self, job_id: str, deltas: int = 3) -> int:
        """Write a whole job."""
        values = [delta(job_id, seq) for seq in range(1, deltas + 1)]
        return await self.write(job_id, started(job_id), *values, ended(job_id, deltas + 1))

    async def replace(self, partitions: int = PARTITIONS) -> None:
        """Delete the topic and create it again under its name."""
        self.partitions = partitions
        async with admin(self.broker) as client, asyncio.timeout(20):
            await client.delete_topics([self.name])
            new = NewTopic(self.name, partitions, 1)
            while (await client.create_topics([new])).topic_errors[0][1]:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.05)
            while len(await self.writer.partitions_for(self.name)) != partitions:
                await self.writer.client.force_metadata_update()

    async def delete_before(self, partition: int, offset: int) -> None:
        """Delete the records before an offset, as retention does."""
        at = KafkaTopicPartition(self.name, partition)
        async with admin(self.broker) as client:
            await client.delete_records({at: RecordsToDelete(before_offset=offset)})

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


async def test_event_log_has_a_snapshot_behind_the_place_of_a_submitted_job(topic: Topic) -> None:
    """The address of a job's events has its place in it; a client that opens it late may ask for a snapshot."""
    job_id = new_job_id()
    async with topic.log() as log:
        place = await log.place(job_id)
        early = await log.open(job_id, cursor=place, replay=Replay.SNAPSHOT)
        await topic.write(job_id, started(job_id), delta(job_id, 1, "Hel"), delta(job_id, 2, "lo"))
        # What is in the log for one reader is there for all of them.
        kinds = [event.kind for _ in range(3) if (event := await early.next()) is not None]
        assert kinds == ["started", "delta", "delta"]
        late = await log.open(job_id, cursor=place, replay=Replay.SNAPSHOT)
        first = late.take()
        skipping = await log.open(job_id, cursor=place, replay=Replay.NONE)
        await topic.write(job_id, ended(job_id, 3))
        assert seqs(await rest(late)) == [3]
        assert seqs(await rest(skipping)) == [0, 1, 2, 3]
        early.close()

    assert first is not None
    assert (first.kind, first.seq, late.resumed_from) == ("snapshot", 2, place)


async def test_event_log_passes_on_events_of_later_versions(topic: Topic) -> None:
    """In their place and under their name, unless it has a line end. A snapshot leaves them out."""
    job_id = new_job_id()
    news, odd = written(job_id, 1, "progress"), written(job_id, 2, "x\nevent: usage")
    async with topic.log() as log:
        await topic.write(job_id, started(job_id), news, odd, delta(job_id, 3, "Hi"), ended(job_id, 4))
        events = await rest(await log.open(job_id))
        resumed = await rest(await log.open(job_id, cursor=events[1].cursor))
        state = await log.snapshot(job_id)

    assert [event.kind for event in events] == ["started", "progress", "other", "delta", "usage"]
    assert events[1].value == news
    assert seqs(resumed) == [2, 3, 4]
    assert state.choices[0]["message"]["content"] == "Hi"


async def test_event_log_cursor_of_a_deleted_event_begins_anew_or_is_lost(topic: Topic) -> None:
    """At the job's `started` if the log has it; else it is lost, as a place before the log's beginning is."""
    other = new_job_id()
    async with topic.log() as log:
        old = await log.place(other)
        await topic.write(other, *[delta(other, seq) for seq in range(1, 4)])
        await topic.delete_before(home(other, PARTITIONS), 2)
        job_id = next(one for one in iter(new_job_id, "") if home(one, PARTITIONS) == home(other, PARTITIONS))
        await topic.write_job(job_id)
        async with topic.log() as reader:  # the end of a transaction is visible some ms after its commit
            await rest(await reader.open(job_id))
        partition = home(job_id, PARTITIONS)
        for lost in (f"{partition}.0.1.e8b7be43", f"{partition}.2.1.00000000", f"{partition}.99.1.e8b7be43"):
            feed = await log.open(job_id, cursor=lost)
            assert feed.resumed_from == START
            assert seqs(await rest(feed)) == [0, 1, 2, 3, 4]
        for gone in (old, f"{partition}.99.1.e8b7be43", f"{partition}.99.w", f"{1 - partition}.0.w"):
            with pytest.raises(CursorLost):
                await log.open(other, cursor=gone)
        with pytest.raises(InvalidCursor):
            await log.open(job_id, cursor="7")


async def test_event_log_does_not_find_a_job_whose_events_were_deleted(topic: Topic) -> None:
    """Its id is older than the log."""
    old = new_job_id(time.time_ns() // 1_000_000 - 7_200_000)
    partition = home(old, PARTITIONS)
    async with topic.log() as log:
        await topic.write_job(old)
        await topic.delete_before(partition, 5)
        await topic.write("noise", *[delta("noise", seq) for seq in range(3)])
        with pytest.raises(JobNotFound, match="older than the log") as caught:
            await log.open(old)
    assert caught.value.searched_from <= time.time_ns() // 1_000_000 - 7_200_000


async def test_event_log_snapshot_follows_a_job_from_queue_to_end(topic: Topic) -> None:
    """`wait_s` returns as soon as the job ends; an ended job is remembered until it runs again."""
    job_id = new_job_id()
    async with topic.log() as log:
        place = await log.place(job_id)
        waiting = await log.snapshot(job_id, cursor=place)
        assert (waiting.status, waiting.cursor, waiting.has_ended) == ("waiting", place, False)
        await topic.write(job_id, started(job_id), delta(job_id, 1, "Hi"))
        running = await log.snapshot(job_id)
        assert (running.status, running.model, running.attempts_seen) == ("running", "m", 1)
        assert running.choices[0]["message"]["content"] == "Hi"
        assert (await log.snapshot(job_id, wait_s=0.05)).status == "running"
        asking = asyncio.create_task(log.snapshot(job_id, cursor=place, wait_s=20))
        await topic.write(job_id, ended(job_id, 2))
        done = await asyncio.wait_for(asking, 10)
        assert (done.status, done.ending_value) == ("completed", ended(job_id, 2))
        assert done.cursor.endswith(".end")
        assert await log.snapshot(job_id, cursor=running.cursor) is done
        assert log._registry.by_key == {}
        again = started(job_id).replace(b'"attempt": "a"', b'"attempt": "b"').replace(b'"t"', b'"t2"')
        await topic.write(job_id, again)
        await eventually(lambda: log._ended.get(job_id.encode(), 0) is None)


async def test_event_log_over_a_cursor_behind_the_end_has_nothing(topic: Topic) -> None:
    """Without a request to Kafka."""
    async with topic.log() as log:
        feed = await log.open("j", cursor="0.7.1.e8b7be43.end")
        assert feed.is_over
        assert await feed.next() is None
        feed.close()


async def test_event_log_delta_waits_for_no_transaction_of_another_producer(
    topic: Topic, topics: Callable[[str], str]
) -> None:
    """A worker that died within its transaction delays terminal events alone."""
    job_id = new_job_id()
    delays = []
    async with topic.log() as log, producer(topic.broker, transactional_id=topics("tx")) as dead:
        feed = await log.open(job_id, cursor=await log.place(job_id))
        await dead.begin_transaction()
        await dead.send_and_wait(topic.name, b"{}", key=b"x", partition=home(job_id, PARTITIONS))
        await topic.write(job_id, started(job_id))
        assert await feed.next() is not None
        for seq in range(1, 101):
            began = time.monotonic()
            await topic.write(job_id, delta(job_id, seq))
            event = await asyncio.wait_for(feed.next(), 5)
            assert event is not None
            assert event.seq == seq
            delays.append(time.monotonic() - began)
        await topic.write(job_id, ended(job_id, 101))
        assert feed.take() is None
        waiting = asyncio.create_task(feed.next())
        assert not (await asyncio.wait([waiting], timeout=0.5))[0]
        late = await log.open(job_id)
        assert len([await late.next() for _ in range(101)]) == 101
        await dead.abort_transaction()
        last = await asyncio.wait_for(waiting, 10)
        assert last is not None
        assert last.kind == "usage"
        assert seqs(await rest(late)) == [101]

    delays.sort()
    print(f"delta behind an open transaction: p50 {delays[50] * 1e3:.1f} ms, max {delays[-1] * 1e3:.1f} ms")  # noqa: T201
    assert delays[50] < 0.1
    assert delays[-1] < 1


async def test_event_log_does_not_show_an_ending_that_is_rolled_back(
    topic: Topic, topics: Callable[[str], str]
) -> None:
    """Neither live nor in a replay, before and after the rollback; the next attempt follows."""
    job_id = new_job_id()
    partition = home(job_id, PARTITIONS)
    async with topic.log() as log, producer(topic.broker, transactional_id=topics("tx")) as worker:
        feeds = [await log.open(job_id, cursor=await log.place(job_id))]
        await topic.write(job_id, started(job_id), delta(job_id, 1))
        await worker.begin_transaction()
        await worker.send_and_wait(topic.name, ended(job_id, 2), key=job_id.encode(), partition=partition)
        feeds.append(await log.open(job_id))
        await worker.abort_transaction()
        feeds.append(await log.open(job_id))
        async with topic.log() as other:
            feeds.append(await other.open(job_id))
            assert (await other.snapshot(job_id)).status == "running"
            again = [
                value.replace(b'"attempt": "a"', b'"attempt": "b"').replace(b'"new"', b'"redelivered"')
                for value in (started(job_id), delta(job_id, 1), ended(job_id, 2))
            ]
            await topic.write(job_id, *again)
            found = [await rest(feed) for feed in feeds]
    kinds = ["started", "delta", "started", "delta", "usage"]
    assert [[event.kind for event in events] for events in found] == [kinds] * 4
    assert {events[-1].attempt for events in found} == {"b"}


async def test_event_log_slow_client_gets_everything_and_delays_no_other(topic: Topic) -> None:
    """Its mailbox is bounded; the rest waits in the log."""
    job_id = new_job_id()
    counts = Counts()
    values = [delta(job_id, seq, "x" * 500) for seq in range(1, 3000)]
    async with topic.log(counts, mailbox_bytes=64 << 10, history_bytes=256 << 10) as log:
        slow = await log.open(job_id, cursor=await log.place(job_id))
        quick = await log.open(job_id, cursor=await log.place(job_id))
        reading = asyncio.create_task(rest(quick))
        await topic.write(job_id, started(job_id), *values, ended(job_id, 3000))
        assert seqs(await reading) == list(range(3001))
        assert not slow.is_live
        assert slow.mailbox.queued_bytes < 70 << 10
        found = []
        while (event := await slow.next()) is not None:
            assert slow.mailbox.queued_bytes < 70 << 10
            found.append(event.seq)

    assert found == list(range(3001))
    assert counts.overflows >= 1
    assert counts.feeds == 0


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
async def test_event_log_many_reconnects_read_each_record_once(topic: Topic, count: int) -> None:
    """500, or 5,000, clients come back one after the other, with cursors from all over the outage."""
    jobs = [new_job_id() for _ in range(count)]
    cursors: list[tuple[str, str, int]] = []
    async with topic.log() as log:
        feeds = [await log.open(job_id, cursor=await log.place(job_id)) for job_id in jobs]
        for seq in range(6):
            kind = started if seq == 0 else delta
            await asyncio.gather(*(topic.write(job_id, kind(job_id, seq)) for job_id in jobs))
        for job_id, feed in zip(jobs, feeds, strict=True):
            for seq in range(5):
                event = await feed.next()
                assert event is not None
                cursors.append((job_id, event.cursor, seq))
    await topic.write("noise", *[delta("noise", seq) for seq in range(5000)])
    counts = Counts()
    async with topic.log(counts) as log:
        reconnecting = []
        for number, (job_id, cursor, _) in enumerate(cursors):
            reconnecting.append(asyncio.create_task(log.open(job_id, cursor=cursor)))
            if number % (count // 4) == 0:
                await asyncio.sleep(0.005)
        feeds = await asyncio.gather(*reconnecting)
        for feed, (_, cursor, seq) in zip(feeds, cursors, strict=True):
            assert feed.resumed_from == cursor
            events = [event for _ in range(5 - seq) if (event := await feed.next())]
            assert seqs(events) == list(range(seq + 1, 6))
        await asyncio.gather(*(topic.write(job_id, ended(job_id, 6)) for job_id in jobs))
        endings = await asyncio.gather(*map(rest, feeds))

    assert [seqs(events) for events in endings] == [[6]] * 5 * count
    written = 5000 + 6 * count
    print(f"{5 * count} reconnects read {counts.records} of {written} records")  # noqa: T201
    assert counts.records <= written


async def test_event_log_survives_a_broker_restart_within_a_job(
    topic: Topic, apache_kafka: ApacheKafka
) -> None:
    """A live feed, and one whose replay has just begun, go on by themselves."""
    job_id = new_job_id()
    async with topic.log() as log, topic.log() as other:
        feed = await log.open(job_id, cursor=await log.place(job_id))
        await topic.write(job_id, started(job_id), *[delta(job_id, seq) for seq in range(1, 4)])
        reading = asyncio.create_task(rest(feed, 60))
        late = await other.open(job_id)
        await asyncio.to_thread(apache_kafka.restart)
        assert log.is_ready
        await topic.write(job_id, *[delta(job_id, seq) for seq in range(4, 7)], ended(job_id, 7))
        assert seqs(await reading) == list(range(8))
        assert seqs(await rest(late, 60)) == list(range(8))


async def test_event_log_reports_a_broker_that_does_not_answer(
    topic: Topic, apache_kafka: ApacheKafka
) -> None:
    """Only where it cannot be answered otherwise: a partition that is read already gives its place."""
    async with topic.log(timeout_s=1.0) as log:
        job_id = new_job_id()  # a job of before the start might be one of a topic that was replaced
        here = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
        other = next(one for one in iter(new_job_id, "") if home(one) != home(job_id))
        await log.place(job_id)
        apache_kafka.pause()
        try:
            assert await log.place(here)
            feed = await log.open(here, cursor=await log.place(here))
            for failing in (log.place(other), log.open(here), log.snapshot(other)):
                with pytest.raises(BrokerUnavailable):
                    await failing
        finally:
            apache_kafka.resume()
        await topic.write_job(here)
        assert seqs(await rest(feed)) == [0, 1, 2, 3, 4]
        assert await asyncio.wait_for(log.place(other), 20)


async def test_event_log_pauses_a_partition_without_feeds_and_reads_it_again(topic: Topic) -> None:
    """What was written meanwhile is found; what is written then comes at once."""
    job_id, later = new_job_id(), ""
    counts = Counts()
    async with topic.log(counts, idle_s=0.1) as log:
        later = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
        feed = await log.open(job_id, cursor=await log.place(job_id))
        assert counts.followed == 1
        await topic.write(job_id, started(job_id))
        event = await feed.next()
        assert event is not None
        feed.close()
        await eventually(lambda: counts.followed == 0)
        place = log._followed.tail_position(home(job_id))
        await topic.write(job_id, *[delta(job_id, seq) for seq in range(1, 4)])
        assert log._followed.tail_position(home(job_id)) == place
        resumed = await log.open(job_id, cursor=event.cursor)
        events = [one for _ in range(3) if (one := await resumed.next())]
        assert seqs(events) == [1, 2, 3]
        await topic.write(job_id, ended(job_id, 4))
        assert seqs(await rest(resumed)) == [4]
        await topic.write_job(later)
        assert seqs(await rest(await log.open(later))) == [0, 1, 2, 3, 4]


async def test_event_log_that_reads_all_knows_every_job_by_its_id(topic: Topic) -> None:
    """Also ids without a time, and without a scan."""
    counts = Counts()
    limits = SearchLimits(lookback_s=0.001, max_records=1)
    async with topic.log(counts, reads_all=True, limits=limits) as log:
        for number in range(20):
            await topic.write_job(f"order-{number}")
        await eventually(lambda: len(log._known) == 20)
        found = [seqs(await rest(await log.open(f"order-{number}"))) for number in range(20)]
    assert found == [[0, 1, 2, 3, 4]] * 20
    assert counts.records == 0
    assert counts.replays == ["known"] * 20


async def test_event_log_finds_jobs_from_before_partitions_were_added(topic: Topic) -> None:
    """In the partition of the former count."""
    job_id = next(one for one in iter(new_job_id, "") if home(one) == 1)
    await topic.writer.send_and_wait(topic.name, started(job_id), key=job_id.encode(), partition=0)
    await topic.writer.send_and_wait(topic.name, ended(job_id, 1), key=job_id.encode(), partition=0)
    async with topic.log(former_partitions=(1,)) as log:
        feed = await log.open(job_id)
        events = await rest(feed)
        assert seqs(events) == [0, 1]
        assert seqs(await rest(await log.open(job_id, cursor=events[0].cursor))) == [1]
        fresh = await log.open(new_job_id())
        fresh.close()
        assert log._registry.by_key == {}


async def test_event_log_that_stops_ends_its_feeds(topic: Topic) -> None:
    """A reader that waits is woken; the log is not ready any more."""
    async with topic.log(home_name="gateway-1", home_count=1) as log:
        ids = [log.new_id("acme") for _ in range(10)]
        assert {log.partition(one) for one in ids} == log._home
        assert all(one.startswith("acme.") for one in ids)
        feed = await log.open(ids[0], cursor=await log.place(ids[0]))
        waiting = asyncio.create_task(feed.next())
        await asyncio.sleep(0)
    with pytest.raises(BrokerUnavailable, match="stopping"):
        await waiting
    assert not log.is_ready
    feed.close()


async def test_event_log_position_cursor_skips_what_was_searched(topic: Topic) -> None:
    """A quiet feed's place moves with the tail; after an event it is that event's cursor."""
    job_id = new_job_id()
    other = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
    async with topic.log() as log:
        feed = await log.open(job_id)
        before = feed.place()
        await topic.write_job(other)
        await eventually(lambda: feed.place() != before)
        resumed = await log.open(job_id, cursor=feed.place())
        await topic.write(job_id, started(job_id))
        event = await resumed.next()
        assert event is not None
        assert resumed.place() == event.cursor == resumed.cursor
        assert feed.place() in {before, feed.cursor, resumed.resumed_from}


async def rest_of(log: KafkaEventLog, job_id: str, cursor: str | None = None) -> list[FeedEvent]:
    """Follow a job to its end, as a client that connects again where its feed was lost."""
    events: list[FeedEvent] = []
    async with asyncio.timeout(20):
        while True:
            feed = await log.open(job_id, cursor=cursor)
            try:
                while (event := await feed.next()) is not None:
                    events.append(event)
            except FeedLost:
                cursor = feed.cursor
            else:
                return events


@pytest.mark.parametrize("is_followed", [True, False], ids=["followed", "paused"])
@pytest.mark.parametrize("new_jobs", [0, 1, 20], ids=["empty", "shorter", "longer"])
async def test_event_log_reads_a_topic_that_was_replaced_from_its_start(
    topic: Topic, monkeypatch: pytest.MonkeyPatch, new_jobs: int, is_followed: bool
) -> None:
    """Feeds of before end, their cursors are lost, and jobs of the new topic are found, whatever their offsets are."""
    monkeypatch.setattr("streamworker.gateway.followed._WATCH_S", 0.1)
    old, queued = new_job_id(), new_job_id()
    after = [new_job_id() for _ in range(new_jobs)]
    counts = Counts()
    async with topic.log(counts, idle_s=30 if is_followed else 0.05) as log:
        place = await log.place(queued)
        await topic.write_job(old, deltas=12)
        events = await rest(await log.open(old))
        feed = await log.open(old, cursor=events[3].cursor) if is_followed else None
        await eventually(lambda: is_followed or counts.followed == 0)
        await topic.replace()
        for job_id in after:
            await topic.write_job(job_id)
        await eventually(lambda: feed is None or feed.mailbox.is_closed)
        for job_id in after:
            assert seqs(await rest_of(log, job_id)) == [0, 1, 2, 3, 4]
        waiting = asyncio.create_task(rest_of(log, queued, place))
        # What is in memory is that of the former topic until the topic's id was compared.
        await eventually(lambda: log._opener.replaced_ms, what=lambda: "the topic's id was not compared")
        with pytest.raises(CursorLost):
            await log.open(old, cursor=events[3].cursor)
        await topic.write_job(queued)
        assert seqs(await waiting) == [0, 1, 2, 3, 4]
        if feed is not None:
            with pytest.raises(FeedLost):
                await rest(feed)


async def test_event_log_distrusts_a_place_of_before_the_topic_was_replaced(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job's events may be before it in the new log, which is longer."""
    monkeypatch.setattr("streamworker.gateway.followed._WATCH_S", 0.1)
    job_id, last = new_job_id(), new_job_id()
    other = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
    async with topic.log() as log:
        await topic.write_job(other)
        place = await log.place(job_id)
        await topic.replace()
        await topic.write_job(job_id)
        await topic.write_job(other, deltas=20)
        await eventually(lambda: log._opener.replaced_ms, what=lambda: "the topic's id was not compared")
        assert seqs(await rest_of(log, job_id, place)) == [0, 1, 2, 3, 4]
        await topic.write_job(last)
        assert seqs(await rest_of(log, last)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("has_time", [True, False], ids=["uuid7", "no_time"])
async def test_event_log_that_was_started_after_the_topic_was_replaced_distrusts_a_place_of_before(
    topic: Topic, has_time: bool
) -> None:
    """The job's events are before it in the new log, which is longer. They are neither missed nor waited for."""
    job_id = new_job_id() if has_time else f"job-{new_job_id()[:8]}"
    other = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
    async with topic.log() as log:
        await topic.write_job(other, deltas=10)
        place = await log.place(job_id)
    await topic.replace()
    await topic.write_job(job_id)
    await topic.write_job(other, deltas=20)
    async with topic.log() as log:
        feed = await log.open(job_id, cursor=place)
        assert feed.resumed_from == "start"
        assert seqs(await rest(feed)) == [0, 1, 2, 3, 4]
        job = await log.snapshot(job_id, cursor=place)
        assert job.status == "completed"


async def test_event_log_place_behind_a_job_that_was_read_begins_at_its_started(topic: Topic) -> None:
    """A job that is submitted again under its id is not run again: its events are before the second place."""
    job_id = new_job_id()
    async with topic.log() as log:
        await log.place(job_id)
        await topic.write_job(job_id)
        await rest(await log.open(job_id))
        place = await log.place(job_id)
        feed = await log.open(job_id, cursor=place)
        assert seqs(await rest(feed)) == [0, 1, 2, 3, 4]
        assert feed.resumed_from == "start"


async def test_event_log_trusts_the_place_of_a_job_that_waits(topic: Topic) -> None:
    """Its wait is not searched again, and delivery begins at the place, also where a young log was searched."""
    job_id = new_job_id()
    other = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
    now_ms = time.time_ns() // 1_000_000
    await topic.writer.send_and_wait(
        topic.name, started(other), key=other.encode(), partition=home(job_id), timestamp_ms=now_ms - 120_000
    )
    counts = Counts()
    async with topic.log(counts) as log:
        place = await log.place(job_id)
        feed = await log.open(job_id, cursor=place)
        assert counts.searches == []
        assert feed.resumed_from == place
        await topic.write_job(job_id)
        assert seqs(await rest(feed)) == [0, 1, 2, 3, 4]


async def test_event_log_keeps_the_place_of_a_job_without_events_in_a_young_log(topic: Topic) -> None:
    """The search finds nothing, and events that come meanwhile are delivered."""
    job_id = new_job_id()
    other = next(one for one in iter(new_job_id, "") if home(one) == home(job_id))
    await topic.write_job(other)
    async with topic.log() as log:
        place = await log.place(job_id)
        feed = await log.open(job_id, cursor=place)
        assert feed.resumed_from == place
        await topic.write_job(job_id)
        assert seqs(await rest(feed)) == [0, 1, 2, 3, 4]
        assert log._registry.by_key == {}


async def test_event_log_waits_for_no_job_that_is_older_than_kafka_keeps_it(topic: Topic) -> None:
    """Though the log has all of its records: a job of two hours ago may be in the queue, one of a month ago is not."""
    now_ms, hour_ms = time.time_ns() // 1_000_000, 3_600_000
    async with topic.log() as log:
        waiting = await log.snapshot(new_job_id(now_ms - 2 * hour_ms))
        with pytest.raises(JobNotFound) as missing:
            await log.open(new_job_id(now_ms - 30 * 24 * hour_ms))

    assert waiting.status == "waiting"
    assert abs(missing.value.searched_from - (now_ms - 30 * 24 * hour_ms)) < 100_000


async def test_event_log_refuses_a_malformed_cursor_also_for_a_job_that_has_ended(topic: Topic) -> None:
    """The answer does not depend on what this process remembers."""
    job_id = new_job_id()
    async with topic.log() as log:
        await topic.write_job(job_id)
        assert (await log.snapshot(job_id)).has_ended
        with pytest.raises(InvalidCursor):
            await log.snapshot(job_id, cursor="x")


@pytest.mark.parametrize("partitions", [1, 3])
async def test_event_log_reads_a_topic_that_was_replaced_by_one_with_other_partitions(
    topic: Topic, monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    """Jobs are looked for in the partitions that the new topic has."""
    monkeypatch.setattr("streamworker.gateway.followed._WATCH_S", 0.1)
    monkeypatch.setattr("streamworker.kafka.tail._METADATA_MAX_AGE_MS", 500)
    before = [new_job_id() for _ in range(4)]
    async with topic.log() as log:
        for job_id in before:
            await topic.write_job(job_id)
            await rest(await log.open(job_id))
        await topic.replace(partitions)
        await eventually(lambda: log._followed.partitions == partitions)
        after = [new_job_id() for _ in range(8)]
        for job_id in after:
            await topic.write_job(job_id)
        assert len({log.partition(job_id) for job_id in after}) > 1 or partitions == 1
        for job_id in after:
            assert seqs(await rest_of(log, job_id)) == [0, 1, 2, 3, 4]


async def test_event_log_of_a_topic_that_does_not_exist_says_so(topic: Topic) -> None:
    """And leaves nothing open."""
    topic.name = "never-created"
    with pytest.raises(KafkaRefused, match="topics create"):
        async with topic.log():
            pass
