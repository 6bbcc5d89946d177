"""A feed: its cursor, its waiting, and deltas that are passed on by a call."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.feeds import START, FeedEvent, FeedLost, Push, Tally
from streamworker.gateway.job_feed import JobFeed
from streamworker.gateway.mailbox import Fate, Mailbox
from streamworker.handover import read_head
from tests.integration.events import delta, ended, started

if TYPE_CHECKING:
    from collections.abc import Callable


class Owner:
    """Stands for the log."""

    def __init__(self) -> None:
        self.forgotten: list[JobFeed] = []
        self.refilled: list[JobFeed] = []

    def refill(self, feed: JobFeed) -> None:
        self.refilled.append(feed)

    def forget(self, feed: JobFeed) -> None:
        self.forgotten.append(feed)

    def position(self, _: int) -> int:
        return 99


def live(limit_bytes: int = 1 << 20) -> JobFeed:
    """Return a feed whose job has begun, and whose `started` was taken."""
    mailbox = Mailbox("j", 3, 10, committed=10, limit_bytes=limit_bytes)
    mailbox.replay(10, started("j"), Fate.FINAL)
    mailbox.join(tail=11, committed=11)
    feed = JobFeed(Owner(), mailbox)
    assert feed.take() is not None
    return feed


def arrive(feed: JobFeed, offset: int, value: bytes) -> None:
    """Let the tail return a record, as `KafkaEventLog` distributes it."""
    head = read_head(value)
    assert head is not None
    if feed.direct is not None and feed.direct.passes(offset, head):
        feed.write(feed.frame(offset, head.seq, value, None))
    else:
        feed.direct = None
        feed.mailbox.tail(offset, head, value)
        feed.wake()


Pushed = list[tuple[bytes, bytes]]
"""Cursors and values."""


class Kept:
    """A framing that keeps what it gets."""

    def __init__(self, pushed: Pushed) -> None:
        self._pushed = pushed

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        self._pushed.append((cursor, value))
        return b"framed"


def into(pushed: Pushed, write: Callable[[bytes], object] = len) -> Push:
    """Return a push that keeps what it gets."""
    return Push(Kept(pushed), write, Tally())


def seqs(pushed: Pushed) -> list[int]:
    """Return the numbers of the events in their cursors."""
    return [Cursor.parse(cursor.decode()).seq for cursor, _ in pushed]


async def waiting(feed: JobFeed, push: Push | None = None) -> asyncio.Task[FeedEvent | None]:
    task = asyncio.create_task(feed.next(push))
    await asyncio.sleep(0)
    return task


def test_feed_cursor_is_that_of_the_last_event_that_was_taken() -> None:
    """Before the first event it is the place at which the log is read."""
    feed = live()
    assert feed.cursor == f"3.10.0.{attempt8('a')}"
    assert feed.resumed_from == START
    fresh = JobFeed(Owner(), Mailbox("j", 3, 10, committed=10))
    assert fresh.cursor == fresh.place() == "3.10.w"
    fresh.mailbox.join(tail=10, committed=10)
    assert (fresh.cursor, fresh.place()) == ("3.10.w", "3.99.w")
    resumed = JobFeed(Owner(), Mailbox("j", 3, 10, committed=10), behind=Cursor(3, 10, 4, "9f2c01ab"))
    assert resumed.resumed_from == resumed.cursor == resumed.place() == "3.10.4.9f2c01ab"


async def test_feed_passes_deltas_by_a_call_while_its_reader_waits() -> None:
    """In order with the events that are queued; the terminal event is returned."""
    feed = live()
    pushed: Pushed = []
    written: list[bytes] = []
    push = into(pushed, written.append)
    task = await waiting(feed, push)
    for seq in (1, 2, 3):
        arrive(feed, 10 + seq, delta("j", seq))
    assert seqs(pushed) == [1, 2, 3]
    assert written == [b"framed"] * 3
    assert push.delivered.events == 3
    assert pushed[-1] == (f"3.13.3.{attempt8('a')}".encode(), delta("j", 3))
    assert feed.cursor == pushed[-1][0].decode()
    assert not task.done()
    head = read_head(ended("j", 4))
    assert head is not None
    feed.mailbox.tail(14, head, ended("j", 4))
    feed.mailbox.committed(14, head, ended("j", 4))
    feed.wake()
    last = await task
    assert last is not None
    assert last.kind == "usage"
    assert feed.is_over
    assert feed.direct is None


async def test_feed_queues_what_its_reader_does_not_take_by_a_call() -> None:
    """From a `hold` on, which comes from within the write of a delta, and while no reader waits."""
    feed = live()
    pushed: Pushed = []
    task = await waiting(feed, into(pushed, lambda _: feed.hold()))
    arrive(feed, 11, delta("j", 1))
    arrive(feed, 12, delta("j", 2))
    assert seqs(pushed) == [1]
    second = await task
    arrive(feed, 13, delta("j", 3))
    third = feed.take()
    assert second is not None
    assert third is not None
    assert (second.seq, third.seq) == (2, 3)


@pytest.mark.parametrize("attempt", ["a", "b"], ids=["repeated", "of another attempt"])
async def test_feed_that_is_held_pushes_nothing_behind_a_record_that_is_not_delivered(attempt: str) -> None:
    """Such a record wakes the reader, and nothing is returned; the client's transport is full all the same."""
    feed = live()
    pushed: Pushed = []
    task = await waiting(feed, into(pushed, lambda _: feed.hold()))
    arrive(feed, 11, delta("j", 1))
    arrive(feed, 12, delta("j", 1).replace(b'"attempt": "a"', f'"attempt": "{attempt}"'.encode()))
    await asyncio.sleep(0)
    assert not task.done()
    arrive(feed, 13, delta("j", 2))
    event = await asyncio.wait_for(task, 1)
    assert event is not None
    assert event.seq == 2
    assert seqs(pushed) == [1]
    task = await waiting(feed, into(pushed))
    arrive(feed, 14, delta("j", 3))
    assert seqs(pushed) == [1, 3]
    task.cancel()


async def test_feed_does_not_overtake_what_is_queued_by_a_call() -> None:
    """A reader that is woken has not taken it yet."""
    feed = live()
    pushed: Pushed = []
    task = await waiting(feed, into(pushed))
    restarted = started("j").replace(b'"attempt": "a"', b'"attempt": "b"')
    arrive(feed, 11, restarted)
    arrive(feed, 12, delta("j", 1).replace(b'"attempt": "a"', b'"attempt": "b"'))
    first = await task
    second = feed.take()
    assert first is not None
    assert second is not None
    assert [first.attempt, first.seq, second.attempt, second.seq] == ["b", 0, "b", 1]
    assert pushed == []


async def test_feed_whose_call_raises_fails_alone() -> None:
    """The reader of all jobs goes on; the client's task gets the exception."""

    def write(_: bytes) -> None:
        raise ConnectionResetError("gone")

    feed = live()
    push = into([], write)
    task = await waiting(feed, push)
    arrive(feed, 11, delta("j", 1))
    with pytest.raises(ConnectionResetError):
        await task
    assert push.delivered.events == 0


async def test_feed_that_resumes_pushes_with_the_attempt_of_its_cursor() -> None:
    """Nothing of that attempt was taken before: the cursor's event is not delivered again."""
    behind = Cursor(3, 10, 0, attempt8("a"))
    mailbox = Mailbox("j", 3, 10, committed=10, cursor=behind)
    mailbox.replay(10, started("j"), Fate.FINAL)
    mailbox.join(tail=11, committed=11)
    feed = JobFeed(Owner(), mailbox, behind=behind)
    pushed: Pushed = []
    task = await waiting(feed, into(pushed))
    arrive(feed, 11, delta("j", 1))
    assert pushed == [(f"3.11.1.{attempt8('a')}".encode(), delta("j", 1))]
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_feed_loses_no_event_when_its_wait_is_cancelled() -> None:
    """And passes nothing by a call afterwards."""
    feed = live()
    pushed: Pushed = []
    task = await waiting(feed, into(pushed))
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    arrive(feed, 11, delta("j", 1))
    assert pushed == []
    event = await feed.next()
    assert event is not None
    assert event.seq == 1


async def test_feed_that_failed_raises_and_returns_nothing() -> None:
    """The first error stays."""
    feed = live()
    arrive(feed, 11, delta("j", 1))
    feed.fail(FeedLost("j"))
    feed.fail(ValueError())
    assert feed.take() is None
    with pytest.raises(FeedLost):
        await feed.next()
    with pytest.raises(FeedLost):
        await feed.changed()


def test_feed_refills_its_mailbox_when_it_is_replayed_and_has_room() -> None:
    """A live mailbox needs no refill."""
    owner = Owner()
    mailbox = Mailbox("j", 0, 0, committed=100, limit_bytes=1000)
    feed = JobFeed(owner, mailbox)
    mailbox.replay(0, started("j"), Fate.FINAL)
    mailbox.replay(1, delta("j", 1), Fate.FINAL)
    mailbox.passed(2)
    feed.take()
    feed.take()
    assert owner.refilled
    owner.refilled.clear()
    mailbox.join(tail=2, committed=100)
    arrive(feed, 2, delta("j", 2))
    feed.take()
    assert owner.refilled == []
    feed.close()
    assert owner.forgotten == [feed]
