"""The open feeds of a process: what they hold, how they advance, and how they end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.feeds import BrokerUnavailable, FeedLost
from streamworker.gateway.mailbox import Opening
from tests.integration.events import delta, ended, started
from tests.unit.gateway.log_parts import Parts, record, taken

if TYPE_CHECKING:
    from streamworker.gateway.job_feed import JobFeed


async def opened(feed: JobFeed) -> Opening:
    async with asyncio.timeout(5):
        return await feed.opened()


async def test_feed_registry_feed_holds_its_partition_until_it_is_forgotten() -> None:
    """Feeds of one job are independent; a second call does nothing."""
    parts = Parts()
    first, second, other = parts.feed("j"), parts.feed("j"), parts.feed("other", partition=1)
    assert parts.registry.by_key == {b"j": (first, second), b"other": (other,)}
    assert parts.followed.users == {0: 2, 1: 1}
    assert parts.observer.open == 3
    before = parts.registry.by_key[b"j"]
    first.close()
    first.close()
    assert before == (first, second)
    assert parts.registry.by_key == {b"j": (second,), b"other": (other,)}
    assert parts.followed.users == {0: 1, 1: 1}
    second.close()
    other.close()
    parts.assert_released()


async def test_feed_registry_feed_at_the_tail_is_live_at_once() -> None:
    """There is nothing to replay, and no request to the broker."""
    parts = Parts()
    parts.followed.tail[0] = 7
    feed = parts.feed("j", 7)
    assert feed.mailbox.opening is Opening.EMPTY
    assert feed.mailbox.is_live
    assert parts.registry.position(0) == 7
    assert not parts.scanner.requests


async def test_feed_registry_feed_is_replayed_from_memory_before_kafka_is_asked() -> None:
    """Records that the tail has returned are kept."""
    parts = Parts()
    parts.tail(record("j", 0, started("j")), record("j", 1, delta("j", 1)))
    feed = parts.feed("j")
    assert feed.mailbox.is_live
    assert taken(feed) == [("started", 0), ("delta", 1)]
    assert not parts.scanner.requests


async def test_feed_registry_feed_behind_the_history_is_replayed_from_kafka() -> None:
    """It is live when the replay has reached the tail."""
    parts = Parts()
    parts.write(record("j", 0, started("j")), record("x", 1, started("x")), record("j", 2, delta("j", 1)))
    feed = parts.feed("j")
    assert not feed.mailbox.is_live
    assert await opened(feed) is Opening.FOUND
    assert feed.mailbox.is_live
    assert taken(feed) == [("started", 0), ("delta", 1)]
    assert parts.scanner.requests == {"scan": 1}


async def test_feed_registry_feed_of_a_client_that_falls_behind_is_replayed_when_it_has_room() -> None:
    """Its overflow is reported once; nothing is lost or repeated."""
    parts = Parts(mailbox_bytes=2000)
    feed = parts.feed("j")
    parts.tail(record("j", 0, started("j")))
    for seq in range(1, 10):
        parts.tail(record("j", seq, delta("j", seq, "x" * 500)))
    assert not feed.mailbox.is_live
    assert parts.observer.overflows == 1
    assert parts.observer.replays == ["slow"]
    assert taken(feed) == [("started", 0), *(("delta", seq) for seq in range(1, 10))]
    assert feed.mailbox.is_live
    parts.tail(record("j", 10, delta("j", 10)))
    assert taken(feed) == [("delta", 10)]


async def test_feed_registry_feeds_wait_until_they_are_closed_or_released() -> None:
    """Behind a terminal event that is not committed yet, a record waits for the committed reader."""
    parts = Parts()
    feed, closed = parts.feed("j"), parts.feed("j")
    parts.tail(record("j", 0, started("j")), record("j", 1, ended("j", 1)), record("j", 2, delta("j", 1)))
    assert parts.registry.waiting == {0: {feed: None, closed: None}}
    closed.close()
    assert parts.registry.waiting == {0: {feed: None}}
    parts.commit(record("j", 1, ended("j", 1)))
    assert parts.registry.waiting == {0: {}}


async def test_feed_registry_that_fails_all_feeds_raises_the_error_in_each() -> None:
    """A reader has crashed; nothing stays open."""
    parts = Parts()
    feeds = [parts.feed("j"), parts.feed("j"), parts.feed("other", partition=1)]
    parts.registry.fail_all(error := RuntimeError("unexpected"))
    for feed in feeds:
        with pytest.raises(RuntimeError) as raised:
            await feed.next()
        assert raised.value is error
    parts.assert_released()


async def test_feed_registry_that_stops_fails_each_feed_with_an_error_of_its_own() -> None:
    """The traceback of an error that feeds share grows with each of them. A replay under way ends."""
    parts = Parts()
    parts.scanner.hangs = True
    parts.write(record("j", 0, started("j")))
    feeds = [parts.feed("j"), parts.feed("other", partition=1)]
    await asyncio.sleep(0)
    await asyncio.wait_for(parts.registry.stop(), 5)
    errors = []
    for feed in feeds:
        with pytest.raises(BrokerUnavailable, match="stopping") as raised:
            await feed.next()
        errors.append(raised.value)
    assert errors[0] is not errors[1]
    parts.assert_released()


async def test_feed_registry_that_lost_a_partition_ends_its_feeds_alone() -> None:
    """Its records in memory are dropped: the log holds other ones at their offsets."""
    parts = Parts()
    lost, other = parts.feed("j"), parts.feed("other", partition=1)
    parts.tail(record("j", 0, started("j")))
    parts.tail(record("other", 0, started("other"), 1), partition=1)
    parts.registry.lose(0)
    with pytest.raises(FeedLost):
        await lost.next()
    assert parts.registry.by_key == {b"other": (other,)}
    assert {block.partition for block in parts.history} == {1}
    assert taken(other) == [("started", 0)]


async def test_feed_registry_drops_what_the_committed_reader_has_not_passed() -> None:
    """The partition is paused, and begins later when it is read again."""
    parts = Parts()
    parts.tail(record("j", 0, started("j")))
    parts.registry.drop_undecided(0)
    assert list(parts.history) == []
    parts.tail(record("j", 1, delta("j", 1)))
    parts.commit(end=2)
    parts.registry.drop_undecided(0)
    assert len(list(parts.history)) == 1


async def test_feed_registry_feed_behind_an_event_that_is_not_there_is_lost() -> None:
    """Another record is at the cursor's offset."""
    parts = Parts()
    parts.tail(record("j", 0, started("j")), record("j", 1, delta("j", 1)))
    right, wrong = Cursor(0, 1, 1, attempt8("a")), Cursor(0, 1, 2, attempt8("a"))
    assert parts.feed("j", 1, behind=right).mailbox.opening is Opening.FOUND
    assert parts.feed("j", 1, behind=wrong).mailbox.opening is Opening.LOST
    place = parts.feed("j", 1, behind=Cursor(0, 1))
    assert place.mailbox.opening is Opening.UNOPENED
    assert place.resumed_from == "0.1.w"
