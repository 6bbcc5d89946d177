"""The search for a job's first event: where it looks, what it reports, and what it holds afterwards."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.client.ids import new_job_id, submitted_ms
from streamworker.errors import KafkaUnavailable
from streamworker.gateway.feeds import BrokerUnavailable, JobNotFound
from streamworker.gateway.known_jobs import Place
from streamworker.gateway.mailbox import Opening
from streamworker.gateway.search import SearchLimits
from tests.integration.events import delta, ended, home, started
from tests.properties.test_event_log import settle
from tests.unit.gateway.log_parts import Parts, record, taken

FORMER = next(one for one in iter(new_job_id, "") if home(one, 2) == 1 and home(one, 1) == 0)
"""The id of a job whose events may be in partition 0 if the topic had one partition formerly."""


def at_home(partition: int = 0, now_ms: int | None = None) -> str:
    """Return the id of a new job whose events are in a partition."""
    return next(one for one in iter(lambda: new_job_id(now_ms), "") if home(one) == partition)


async def test_job_search_opens_a_known_job_without_a_lookup() -> None:
    """The tail has returned its `started`."""
    parts = Parts()
    parts.tail(record("x", 0, started("x")), record("order-1", 1, started("order-1")))
    feed = await parts.search.open("order-1")
    assert taken(feed) == [("started", 0)]
    assert parts.observer.replays == ["known"]
    assert not parts.scanner.requests
    feed.close()
    parts.assert_released()


async def test_job_search_forgets_a_known_job_that_is_not_there() -> None:
    """Another record is at the offset; the log is searched then."""
    parts = Parts()
    job_id = at_home()
    parts.write(record(job_id, 0, started(job_id)), record(job_id, 1, delta(job_id, 1)))
    parts.known.add(job_id.encode(), Place(0, 1))
    feed = await parts.search.open(job_id)
    assert taken(feed) == [("started", 0), ("delta", 1)]
    assert parts.observer.replays == ["known", "search"]
    assert parts.observer.outcomes == ["found"]
    assert parts.known.get(job_id.encode()) is None
    feed.close()
    parts.assert_released()


@pytest.mark.parametrize(("has_append_time", "margin_s"), [(False, 60), (True, 5)])
async def test_job_search_begins_shortly_before_the_time_in_the_id(
    *, has_append_time: bool, margin_s: int
) -> None:
    """The margin is that for the clocks of workers, unless the broker sets the timestamps."""
    parts = Parts()
    job_id = at_home()
    parts.followed.has_append_time = has_append_time
    parts.write(record("x", 5, started("x")), record(job_id, 6, started(job_id)))
    parts.scanner.offsets[0] = [5]
    feed = await parts.search.open(job_id)
    assert taken(feed) == [("started", 0)]
    assert parts.scanner.times == [(submitted_ms(job_id) or 0) - margin_s * 1000]
    assert parts.search.plan(job_id).bound_ms == parts.scanner.times[0]
    assert parts.search.plan("order-1", 1_700_000_000_000).bound_ms == 1_700_000_000_000 - margin_s * 1000


async def test_job_search_steps_back_from_an_event_that_does_not_begin_the_job() -> None:
    """Until it finds the `started`; the feeds of the former steps are closed."""
    parts = Parts()
    job_id = at_home()
    parts.write(
        *[record(job_id, 1 + seq, delta(job_id, seq) if seq else started(job_id)) for seq in range(4)]
    )
    parts.scanner.offsets[0] = [3, 2, 1]
    feed = await parts.search.open(job_id)
    assert taken(feed) == [("started", 0), ("delta", 1), ("delta", 2), ("delta", 3)]
    assert len(parts.scanner.times) == 3
    assert parts.scanner.times == sorted(parts.scanner.times, reverse=True)
    assert parts.observer.outcomes == ["found"]
    assert parts.observer.open == 1


@pytest.mark.parametrize("begin", [0, 7])
async def test_job_search_of_a_new_job_without_events_waits_for_its_first_one(begin: int) -> None:
    """Whether the log has lost older records or not."""
    parts = Parts()
    job_id = at_home()
    parts.scanner.begins[0] = parts.followed.tail[0] = begin
    feed = await parts.search.open(job_id)
    assert feed.mailbox.opening is Opening.EMPTY
    assert parts.observer.outcomes == ["empty"]
    parts.tail(record(job_id, begin, started(job_id)))
    assert taken(feed) == [("started", 0)]


@pytest.mark.parametrize(
    ("job_id", "advice"),
    [(new_job_id(1_600_000_000_000), "are older than the log"), ("order-1", None)],
    ids=["old", "without a time"],
)
async def test_job_search_of_an_old_job_without_events_finds_nothing(job_id: str, advice: str | None) -> None:
    """The log has lost its events; a job without a time in its id may be new."""
    parts = Parts()
    partition = home(job_id)
    parts.scanner.begins[partition] = parts.followed.tail[partition] = 7
    if advice is None:
        assert (await parts.search.open(job_id)).mailbox.opening is Opening.EMPTY
        return
    with pytest.raises(JobNotFound, match=advice):
        await parts.search.open(job_id)
    assert parts.observer.outcomes == ["not_found"]
    parts.assert_released()


async def test_job_search_ends_at_the_beginning_of_the_log() -> None:
    """Retention has deleted the `started`."""
    parts = Parts()
    job_id = at_home()
    parts.scanner.begins[0] = 2
    parts.write(record(job_id, 2, delta(job_id, 1)), record(job_id, 3, ended(job_id, 2)))
    with pytest.raises(JobNotFound):
        await parts.search.open(job_id)
    assert parts.observer.outcomes == ["not_found"]
    parts.assert_released()


async def test_job_search_ends_when_its_records_are_spent() -> None:
    """The budget is that of one search in one partition."""
    parts = Parts(limits=SearchLimits(max_records=3))
    parts.write(*[record("x", offset, delta("x", offset)) for offset in range(9)])
    with pytest.raises(JobNotFound, match="reached"):
        await parts.search.open(at_home())
    parts.assert_released()


@pytest.mark.parametrize("request_", ["offset_at", "beginning"])
async def test_job_search_whose_request_fails_holds_nothing(request_: str) -> None:
    """Before a feed was opened, and behind it."""
    parts = Parts()
    parts.scanner.failures[request_, 0] = KafkaUnavailable("no leader")
    with pytest.raises(BrokerUnavailable, match="no leader"):
        await parts.search.open(at_home())
    parts.assert_released()


# Former partitions


async def test_job_search_looks_in_the_present_partition_first() -> None:
    """A partition is not searched twice."""
    parts = Parts(former_partitions=(1, 2, 1))
    assert parts.search.partitions(FORMER) == (1, 0)
    assert Parts().search.partitions(FORMER) == (1,)


async def test_job_search_finds_a_job_in_a_former_partition() -> None:
    """The feed in the present one, where it has no event, is closed."""
    parts = Parts(former_partitions=(1,))
    parts.write(record(FORMER, 0, started(FORMER)))
    feed = await parts.search.open(FORMER)
    assert feed.partition == 0
    assert taken(feed) == [("started", 0)]
    assert parts.observer.outcomes == ["empty", "found"]
    assert parts.registry.by_key == {FORMER.encode(): (feed,)}


async def test_job_search_of_a_job_without_events_waits_in_the_present_partition() -> None:
    """A worker publishes its events there."""
    parts = Parts(former_partitions=(1,))
    feed = await parts.search.open(FORMER)
    assert feed.partition == 1
    assert parts.registry.by_key == {FORMER.encode(): (feed,)}
    assert parts.observer.outcomes == ["empty", "empty"]


async def test_job_search_that_finds_nothing_anywhere_reports_the_present_partition() -> None:
    """Nothing stays open."""
    job_id = next(
        one
        for one in (new_job_id(1_600_000_000_000) for _ in range(1000))
        if (home(one, 2), home(one, 1)) == (1, 0)
    )
    parts = Parts(former_partitions=(1,))
    for partition in (0, 1):
        parts.scanner.begins[partition] = parts.followed.tail[partition] = 7
    with pytest.raises(JobNotFound):
        await parts.search.open(job_id)
    assert parts.observer.outcomes == ["not_found", "not_found"]
    parts.assert_released()


async def test_job_search_that_fails_in_a_former_partition_holds_nothing() -> None:
    """The feed in the present one is closed."""
    parts = Parts(former_partitions=(1,))
    parts.scanner.failures["offset_at", 0] = KafkaUnavailable("no leader")
    with pytest.raises(BrokerUnavailable, match="no leader"):
        await parts.search.open(FORMER)
    assert parts.observer.outcomes == ["empty"]
    parts.assert_released()


async def test_job_search_whose_client_leaves_in_a_former_partition_holds_nothing() -> None:
    """Its request is cancelled."""
    parts = Parts(former_partitions=(1,))
    parts.write(record("x", 0, started("x")))
    searching = asyncio.create_task(parts.search.open(FORMER))
    await settle(3)
    assert parts.observer.outcomes == ["empty"]
    searching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await searching
    parts.assert_released()
