"""The gateway's event log when its readers fail, in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.errors import KafkaUnavailable
from streamworker.gateway import replays
from streamworker.gateway.feeds import BrokerUnavailable, FeedLost, JobNotFound, Replay
from streamworker.gateway.log_observer import NullLogObserver
from streamworker.gateway.log_options import LogOptions
from streamworker.gateway.search import SearchLimits
from tests.properties.test_event_log import World, settle
from tests.properties.test_handover import Log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.gateway.event_log import KafkaEventLog


def job(deltas: int = 3) -> Log:
    """Return a log with one job that has ended."""
    log = Log()
    log.write("w", type="started", attempt="a", seq=0, cause="new")
    for seq in range(1, deltas + 1):
        log.write(type="delta", attempt="a", seq=seq)
    log.write("w", type="usage", attempt="a", seq=deltas + 1, status="completed")
    log.end("w")
    return log


async def replica(log: Log, **options: Any) -> tuple[World, KafkaEventLog]:
    """Return a replica that comes when the whole log was written."""
    world = World(log, LogOptions(**options), 2)
    world.topic.length = len(log.entries)
    return world, await world.replica()


async def all_of(feed: Any) -> list[int]:
    found = []
    async with asyncio.timeout(5):
        while (event := await feed.next()) is not None:
            found.append(event.seq)
    return found


def scan_with(log: KafkaEventLog, scan: Any) -> None:
    """Replace the scans of Kafka."""
    scanner: Any = log._scanner
    scanner.scan = scan


class Failing:
    """Scans of which the first ones raise an error, before or after a batch."""

    def __init__(self, scan: Any, errors: list[Exception]) -> None:
        self._scan, self._errors = scan, errors

    async def __call__(self, *arguments: Any, **how: Any) -> AsyncIterator[Any]:
        async for batch in self._scan(*arguments, **how):
            yield batch
            if self._errors:
                raise self._errors.pop()


async def test_event_log_replay_goes_on_after_a_failed_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind what was delivered; nothing comes twice."""
    monkeypatch.setattr(replays, "_BACKOFF_S", 0)
    _, log = await replica(job(9), history_bytes=0)
    errors: list[Exception] = [KafkaUnavailable("away"), KafkaUnavailable("away")]
    scan_with(log, Failing(log._scanner.scan, errors))
    assert await all_of(await log.open("j")) == list(range(11))
    assert errors == []
    await log.stop()


async def test_event_log_replay_that_cannot_go_on_fails_its_feeds() -> None:
    """Whatever the error is, no client waits for ever."""
    _, log = await replica(job(9))
    scan_with(log, Failing(log._scanner.scan, [RuntimeError("unexpected")]))
    feed = await log.open("j")
    with pytest.raises(RuntimeError, match="unexpected"):
        await all_of(feed)
    assert log._registry.by_key == {}
    assert await all_of(await log.open("j")) == list(range(11))
    await log.stop()


async def test_event_log_replay_that_was_cancelled_holds_up_no_later_client() -> None:
    """Its scan takes time to close; a client that comes meanwhile gets a scan of its own, and `stop` waits for both."""
    _, log = await replica(job(9), history_bytes=0)
    scan, closing = log._scanner.scan, asyncio.Event()

    async def hangs(*_: Any, **__: Any) -> AsyncIterator[Any]:
        try:
            await asyncio.sleep(60)
            yield []
        finally:
            await closing.wait()

    scan_with(log, hangs)
    first = asyncio.create_task(log.open("j"))
    await settle(5)
    log._lose(0)
    with pytest.raises(FeedLost):
        await first
    scan_with(log, scan)
    assert await all_of(await log.open("j")) == list(range(11))

    stopped = asyncio.create_task(log.stop())
    await settle(20)
    assert not stopped.done()
    closing.set()
    await stopped


@pytest.mark.parametrize("how", ["snapshot", "replay=snapshot", "replay=none"])
async def test_event_log_state_of_a_job_does_not_wait_for_a_broker_that_hangs_within_it(how: str) -> None:
    """It was found, and the rest of its events does not come: the client gets an error, and a drain is not held up."""
    _, log = await replica(job(9), history_bytes=0, timeout_s=0.1)
    scan = log._scanner.scan

    async def hangs(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async for batch in scan(*arguments, **options):
            yield batch
            await asyncio.sleep(60)

    scan_with(log, hangs)
    asked: Any = (
        log.snapshot("j") if how == "snapshot" else log.open("j", replay=Replay(how.partition("=")[2]))
    )
    with pytest.raises(BrokerUnavailable, match=r"could not be read on for 0\.1 s"):
        await asyncio.wait_for(asked, 5)
    assert log._registry.by_key == {}
    await log.stop()


async def test_event_log_is_not_ready_when_a_reader_has_crashed() -> None:
    """Its feeds raise the error."""
    _, log = await replica(job())
    feed = await log.open("other")
    log._followed.tail.crashed.set_exception(RuntimeError("unexpected"))
    await settle(2)
    assert not log.is_ready
    with pytest.raises(RuntimeError, match="unexpected"):
        await feed.next()
    await log.stop()


async def test_event_log_that_lost_its_end_ends_the_feeds_of_the_partition() -> None:
    """What is remembered of it is forgotten: other records may have those offsets."""
    world, log = await replica(job(), reads_all=True)
    feed = await log.open("other")
    tail: Any = log._followed.tail
    tail.on_records(0, world.topic.records(0, 3, with_aborted=True), 3)
    with pytest.raises(FeedLost, match="connect again with the cursor"):
        await feed.next()
    assert log._followed.tail_position(0) == 3
    assert log._known.get(b"j") == (0, 0)
    committed: Any = log._followed.committed_tail
    committed.on_records(0, world.topic.records(0, 2, with_aborted=True), 2)
    assert len(log._known) == 0
    assert log.is_ready
    await log.stop()


async def test_event_log_request_that_fails_or_takes_too_long_is_reported() -> None:
    """As an unavailable broker, which a client may try again; nothing stays open."""
    _, log = await replica(job(), timeout_s=0.05)

    async def fails(*_: Any, **__: Any) -> int:
        raise KafkaUnavailable("no leader")

    async def hangs(*_: Any, **__: Any) -> int:
        await asyncio.sleep(60)
        return 0

    for broken, reason in ((fails, "no leader"), (hangs, "no broker answered within 0.05 s")):
        scanner: Any = log._scanner
        scanner.end = broken
        with pytest.raises(BrokerUnavailable, match=reason):
            await log.place("j")
        with pytest.raises(BrokerUnavailable, match=reason):
            await log.open("j", cursor="0.0.w")
        with pytest.raises(BrokerUnavailable, match=reason):
            await log.snapshot("j")
    assert log._registry.by_key == {}
    assert log._followed._users[0] == 0
    await log.stop()


async def test_event_log_search_that_reads_nothing_in_time_is_an_outage() -> None:
    """One that has read something is over its budget."""
    _, log = await replica(job(), limits=SearchLimits(max_s=0.1))

    async def stuck(*_: Any, **__: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(60)
        yield []

    scan = log._scanner.scan
    scan_with(log, stuck)
    with pytest.raises(BrokerUnavailable, match="could not be read within"):
        await log.open("j")

    async def slow(*arguments: Any, **how: Any) -> AsyncIterator[Any]:
        async for batch in scan(*arguments, **how):
            yield batch
            await asyncio.sleep(60)

    await log.stop()
    _, log = await replica(job(), limits=SearchLimits(max_s=0.1))
    scan = log._scanner.scan
    scan_with(log, slow)
    with pytest.raises(JobNotFound):
        await log.open("other")
    assert log._registry.by_key == {}
    await log.stop()


async def test_event_log_feed_that_is_closed_releases_what_it_holds() -> None:
    """While it is replayed, too; a second call does nothing."""
    _, log = await replica(job(9), mailbox_bytes=1)
    feed, other = await log.open("j"), await log.open("j")
    feed.close()
    feed.close()
    assert log._registry.by_key[b"j"] == (other,)
    assert await all_of(other) == list(range(11))
    assert (log._registry.by_key, log._registry._feeds, log._followed._users[0]) == ({}, {}, 0)
    await log.stop()


async def test_event_log_stopped_before_it_started_does_nothing() -> None:
    """As after a start that failed."""
    world = World(job(), LogOptions(), 2)
    log = await world.replica()
    await log.stop()
    await log.stop()
    assert not log.is_ready


def test_null_observer_ignores_all_reports() -> None:
    """It is the default."""
    observer = NullLogObserver()
    observer.subscribed(1)
    observer.followed_changed(1)
    observer.replay_began("cursor")
    observer.scanned(1)
    observer.searched("found", 1, 0.1)
    observer.mailbox_overflowed()
    observer.history_changed(1)
