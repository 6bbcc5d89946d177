"""The places at which feeds begin: behind a cursor of an event, behind a place, or at the job's first event."""

from __future__ import annotations

import asyncio
import time

import pytest

from streamworker.client.ids import new_job_id
from streamworker.errors import KafkaUnavailable
from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.feeds import START, BrokerUnavailable, CursorLost, JobNotFound
from streamworker.gateway.known_jobs import Place
from streamworker.gateway.mailbox import Opening
from tests.integration.events import delta, started
from tests.properties.test_event_log import settle
from tests.unit.gateway.log_parts import Parts, record, taken
from tests.unit.gateway.test_job_search import at_home

JOB = at_home()

AFTER_ALL_MS = 1 << 48
"""A time behind that of every id."""


def event(offset: int, seq: int, partition: int = 0) -> Cursor:
    """Return the cursor of an event."""
    return Cursor(partition, offset, seq, attempt8("a"))


def with_job(job_id: str = JOB) -> Parts:
    """Return a log that holds a `started` and two deltas at offsets 1 to 3, none of which is in memory."""
    parts = Parts()
    values = [started("x"), started(job_id), delta(job_id, 1), delta(job_id, 2)]
    parts.write(*[record(job_id if at else "x", at, value) for at, value in enumerate(values)])
    return parts


async def test_feed_opener_without_a_cursor_searches_the_job() -> None:
    """The feed begins with its first event."""
    parts = with_job()
    feed = await parts.opener.open(JOB, None, None)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert feed.resumed_from == START
    assert parts.observer.replays == ["search"]
    with pytest.raises(JobNotFound):
        await parts.opener.open(new_job_id(1_600_000_000_000), None, None)


async def test_feed_opener_goes_on_behind_an_event() -> None:
    """Its record is compared: no request is needed for an offset before the tail."""
    parts = with_job()
    feed = await parts.opener.open(JOB, event(2, 1), None)
    assert taken(feed) == [("delta", 2)]
    assert feed.resumed_from == str(event(2, 1))
    assert parts.observer.replays == ["cursor"]
    assert parts.scanner.requests == {"scan": 1}
    feed.close()
    parts.assert_released()


async def test_feed_opener_behind_a_terminal_event_opens_a_feed_that_is_over() -> None:
    """It holds nothing, and nothing is read."""
    parts = Parts()
    feed = await parts.opener.open(JOB, Cursor(0, 9, 3, attempt8("a"), is_end=True), None)
    assert feed.is_over
    assert await feed.next() is None
    feed.close()
    assert not parts.scanner.requests
    parts.assert_released()


@pytest.mark.parametrize(
    "cursor",
    [event(2, 7), event(0, 0), event(2, 1, partition=1), event(99, 1)],
    ids=[
        "another event is there",
        "another job is there",
        "not the job's partition",
        "behind the end of the log",
    ],
)
async def test_feed_opener_behind_an_event_that_is_not_there_begins_anew(cursor: Cursor) -> None:
    """At the job's first event."""
    parts = with_job()
    feed = await parts.opener.open(JOB, cursor, None)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert feed.resumed_from == START
    feed.close()
    parts.assert_released()


@pytest.mark.parametrize("job_id", [at_home(), new_job_id(1_600_000_000_000)], ids=["new", "old"])
async def test_feed_opener_behind_an_event_of_a_job_that_is_not_there_has_lost_the_cursor(
    job_id: str,
) -> None:
    """A job that had an event must not be waited for; nothing stays open."""
    parts = Parts()
    for partition in (0, 1):
        parts.scanner.begins[partition] = parts.followed.tail[partition] = 7
    cursor = event(2, 1, *parts.search.partitions(job_id))
    with pytest.raises(CursorLost):
        await parts.opener.open(job_id, cursor, None)
    parts.assert_released()


async def test_feed_opener_waits_for_an_event_that_the_tail_has_not_read_yet() -> None:
    """Another replica has delivered it."""
    parts = with_job()
    parts.followed.tail[0] = 2
    opening = asyncio.create_task(parts.opener.open(JOB, event(2, 1), None))
    await settle(5)
    assert list(parts.registry.by_key) == [JOB.encode()]
    parts.tail(record(JOB, 2, delta(JOB, 1)), record(JOB, 3, delta(JOB, 2)))
    feed = await asyncio.wait_for(opening, 5)
    assert taken(feed) == [("delta", 2)]
    assert parts.scanner.requests == {"end": 1}


# Places


async def test_feed_opener_behind_a_place_delivers_what_comes_after_it() -> None:
    """At the tail, without a request."""
    parts = with_job()
    parts.opener.started()
    job_id = at_home()
    feed = await parts.opener.open(job_id, Cursor(0, 4), None)
    assert feed.mailbox.opening is Opening.EMPTY
    assert parts.observer.replays == ["place"]
    assert not parts.scanner.requests
    parts.tail(record(job_id, 4, started(job_id)))
    assert taken(feed) == [("started", 0)]


async def test_feed_opener_behind_a_place_before_the_job_finds_its_started() -> None:
    """It is behind the place."""
    parts = with_job()
    feed = await parts.opener.open(JOB, Cursor(0, 0), None)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert feed.resumed_from == "0.0.w"


async def test_feed_opener_behind_a_place_within_the_job_begins_at_its_started() -> None:
    """The place is not that of a client that has had events."""
    parts = with_job()
    feed = await parts.opener.open(JOB, Cursor(0, 2), None)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert feed.resumed_from == START
    feed.close()
    parts.assert_released()


@pytest.mark.parametrize(
    ("offset", "is_resumed", "requests"),
    [(4, True, []), (3, False, ["beginning"]), (6, True, ["end"]), (7, False, ["end"])],
    ids=["the tail", "deleted by retention", "the end", "behind the end"],
)
async def test_feed_opener_resumes_at_a_place_that_is_in_the_log(
    offset: int, *, is_resumed: bool, requests: list[str]
) -> None:
    """The requests are those that it takes to know."""
    parts = Parts()
    parts.opener.started()
    parts.followed.tail[0] = parts.scanner.begins[0] = 4
    parts.scanner.ends[0] = 6
    job_id = at_home()
    feed = await parts.opener.open(job_id, Cursor(0, offset), None)
    assert parts.observer.replays == (["place"] if is_resumed else ["search"])
    assert feed.resumed_from == (f"0.{offset}.w" if is_resumed else START)
    assert all(parts.scanner.requests[name] for name in requests)
    assert requests or not parts.scanner.requests
    feed.close()
    parts.assert_released()


async def test_feed_opener_behind_a_place_in_memory_needs_no_request() -> None:
    """What the tail has returned is in the log."""
    parts = Parts()
    parts.opener.started()
    parts.tail(record("x", 0, started("x")), record("x", 1, delta("x", 1)))
    feed = await parts.opener.open(at_home(), Cursor(0, 1), None)
    assert feed.mailbox.opening is Opening.EMPTY
    assert not parts.scanner.requests


async def test_feed_opener_behind_a_place_after_a_known_job_begins_at_its_started() -> None:
    """The tail has returned it before the place; a place before it is right, and the job begins anew."""
    parts = Parts()
    parts.tail(record(JOB, 0, started(JOB)), record("x", 1, started("x")))
    feed = await parts.opener.open(JOB, Cursor(0, 2), None)
    assert taken(feed) == [("started", 0)]
    assert feed.resumed_from == START
    assert not parts.scanner.requests
    assert parts.registry.by_key == {JOB.encode(): (feed,)}

    parts.known.forget(JOB.encode())
    parts.known.add(JOB.encode(), Place(0, 9))
    late = await parts.opener.open(JOB, Cursor(0, 2), None)
    assert late.mailbox.opening is Opening.EMPTY
    assert late.resumed_from == "0.2.w"


async def test_feed_opener_searches_before_the_place_of_a_job_from_before_the_start() -> None:
    """The topic may have been replaced before: then all records are younger than the job."""
    job_id = at_home()
    parts = with_job(job_id)
    parts.opener._compared_from_ms = AFTER_ALL_MS
    parts.scanner.ends[0] = parts.followed.tail[0] = parts.followed.committed[0] = 5
    feed = await parts.opener.open(job_id, Cursor(0, 5), None)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert parts.observer.replays == ["place", "search"]
    assert parts.registry.by_key == {job_id.encode(): (feed,)}


@pytest.mark.parametrize("has_older_records", [True, False])
async def test_feed_opener_keeps_the_place_of_a_waiting_job_from_before_the_start(
    *, has_older_records: bool
) -> None:
    """A log with records that are older than the job was not replaced since; in another one, the job has no event."""
    parts = with_job()
    parts.opener._compared_from_ms = AFTER_ALL_MS
    parts.scanner.offsets[0] = [3 if has_older_records else 0]
    job_id = at_home()
    feed = await parts.opener.open(job_id, Cursor(0, 4), None)
    assert feed.resumed_from == "0.4.w"
    assert parts.observer.replays == (["place"] if has_older_records else ["place", "search"])
    assert parts.registry.by_key == {job_id.encode(): (feed,)}


async def test_feed_opener_whose_request_behind_a_place_fails_holds_nothing() -> None:
    """The feed behind the place is closed."""
    parts = with_job()
    parts.opener._compared_from_ms = AFTER_ALL_MS
    parts.scanner.failures["offset_at", 0] = KafkaUnavailable("no leader")
    with pytest.raises(BrokerUnavailable, match="no leader"):
        await parts.opener.open(at_home(), Cursor(0, 4), None)
    parts.assert_released()


async def test_feed_opener_distrusts_places_of_before_the_topic_was_replaced() -> None:
    """Cursors of events are compared."""
    job_id = at_home(now_ms=time.time_ns() // 1_000_000 - 1000)
    parts = with_job(job_id)
    parts.opener.topic_replaced()
    assert parts.opener.replaced_ms > 0
    feed = await parts.opener.open(job_id, Cursor(0, 4), None)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert taken(await parts.opener.open(job_id, event(2, 1), None)) == [("delta", 2)]
    assert parts.observer.replays == ["search", "cursor"]
