"""The records of the two readers, on their way to the feeds of their jobs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.distributor import WRITTEN_BYTES
from streamworker.gateway.feeds import JobSnapshot, Push, Tally
from tests.integration.events import delta, ended, started
from tests.unit.gateway.log_parts import Parts, record, taken


class Kept:
    """A framing that keeps the values that are pushed, by the feed's name."""

    def __init__(self, pushed: list[tuple[str, bytes, bytes]], name: str) -> None:
        self._pushed, self._name = pushed, name

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        self._pushed.append((self._name, cursor, value))
        return b""


def snapshot(job_id: str) -> JobSnapshot:
    return JobSnapshot(
        job_id=job_id,
        status="completed",
        attempt="a",
        attempts_seen=1,
        model="m",
        cursor="0.1.1.e8b7be43.end",
        choices=[],
        ending={},
        ending_value=b"{}",
    )


async def test_distributor_passes_records_to_the_live_feeds_of_their_job() -> None:
    """In the order of the log. Records of other jobs, and those without a value, are passed to no feed."""
    parts = Parts()
    first, second, other = parts.feed("j"), parts.feed("j"), parts.feed("other")
    parts.tail(
        record("j", 0, started("j")),
        record("stranger", 1, started("stranger")),
        record("j", 2, None),
        record("j", 3, delta("j", 1)),
        record("j", 4, b"not an event"),
        record("j", 5, delta("j", 2)),
    )
    assert taken(first) == taken(second) == [("started", 0), ("delta", 1), ("delta", 2)]
    assert taken(other) == []


async def test_distributor_keeps_records_of_a_key_in_the_feeds_partition_only() -> None:
    """The job's events are in one partition; another one may hold records with its key, from before partitions were added."""
    parts = Parts()
    feed = parts.feed("j", partition=1)
    parts.tail(record("j", 0, started("j")), partition=0)
    parts.commit(record("j", 1, ended("j", 1)), partition=0)
    assert taken(feed) == []
    parts.tail(record("j", 0, started("j"), 1), partition=1)
    assert taken(feed) == [("started", 0)]


async def test_distributor_pushes_deltas_to_clients_that_take_them_by_a_call() -> None:
    """Several feeds of a job share one cursor; a terminal event is not pushed, and ends the pushing."""
    parts = Parts()
    pushed: list[tuple[str, bytes, bytes]] = []
    feeds = {name: parts.feed("j") for name in ("one", "two")}
    parts.tail(record("j", 0, started("j")))
    waiting = []
    for name, feed in feeds.items():
        assert taken(feed) == [("started", 0)]
        push = Push(Kept(pushed, name), len, Tally())
        waiting.append(asyncio.create_task(feed.next(push)))
    await asyncio.sleep(0)
    parts.tail(record("j", 1, delta("j", 1)), record("j", 2, ended("j", 2)), record("j", 3, delta("j", 3)))
    assert [(name, value) for name, _, value in pushed] == [(name, delta("j", 1)) for name in feeds]
    assert pushed[0][1] is pushed[1][1]
    assert not any(task.done() for task in waiting)
    parts.commit(record("j", 2, ended("j", 2)))
    events = await asyncio.gather(*waiting)
    assert [(event.kind, event.seq) for event in events if event is not None] == [("usage", 2)] * 2


@pytest.mark.parametrize("is_committed_first", [False, True])
async def test_distributor_delivers_a_terminal_event_when_both_readers_have_returned_it(
    *, is_committed_first: bool
) -> None:
    """Whichever of them is ahead."""
    parts = Parts()
    feed = parts.feed("j")
    parts.tail(record("j", 0, started("j")))
    ending = record("j", 1, ended("j", 1))
    readers = [parts.commit, parts.tail] if is_committed_first else [parts.tail, parts.commit]
    readers[0](ending)
    assert taken(feed) == [("started", 0)]
    readers[1](ending)
    assert taken(feed) == [("usage", 1)]
    assert feed.is_over
    parts.assert_released()


async def test_distributor_delivers_no_terminal_event_of_a_transaction_that_was_rolled_back() -> None:
    """The committed reader has passed it without a report; what follows belongs to the next attempt."""
    parts = Parts()
    feed = parts.feed("j")
    parts.tail(record("j", 0, started("j")), record("j", 1, ended("j", 1)))
    parts.commit(end=3)
    again = started("j").replace(b'"attempt": "a"', b'"attempt": "b"')
    parts.tail(record("j", 3, again))
    assert taken(feed) == [("started", 0), ("started", 0)]
    assert not feed.is_over


async def test_distributor_releases_what_waits_by_the_position_of_the_committed_reader_alone() -> None:
    """Behind a terminal event that was rolled back, for each feed of the partition."""
    parts = Parts()
    feeds = [parts.feed("j") for _ in range(2)]
    parts.tail(record("j", 0, started("j")), record("j", 1, ended("j", 1)), record("j", 2, delta("j", 1)))
    assert [taken(feed) for feed in feeds] == [[("started", 0)]] * 2
    parts.commit(end=9, partition=1)
    assert [taken(feed) for feed in feeds] == [[]] * 2
    parts.commit(end=9)
    assert [taken(feed) for feed in feeds] == [[("delta", 1)]] * 2


async def test_distributor_feed_that_is_closed_meanwhile_gets_nothing() -> None:
    """Records are distributed to the feeds that a job had before; the other feed goes on."""
    parts = Parts()
    first, second = parts.feed("j"), parts.feed("j")
    parts.tail(record("j", 0, started("j")))
    assert taken(first) == taken(second) == [("started", 0)]
    pushed: list[tuple[str, bytes, bytes]] = []

    class Closing(Kept):
        def delta(self, cursor: bytes, value: bytes) -> bytes:
            second.close()
            return super().delta(cursor, value)

    task = asyncio.create_task(first.next(Push(Closing(pushed, "first"), len, Tally())))
    await asyncio.sleep(0)
    parts.tail(record("j", 1, delta("j", 1)), record("j", 2, delta("j", 2)))
    assert [value for _, _, value in pushed] == [delta("j", 1), delta("j", 2)]
    assert parts.registry.by_key == {b"j": (first,)}
    assert not task.done()
    task.cancel()


class Values:
    """A framing that changes nothing."""

    def delta(self, _: bytes, value: bytes) -> bytes:
        return value


async def pushing(parts: Parts, job_id: str, partition: int, written: list[bytes]) -> asyncio.Task[Any]:
    """Return a task that waits for events of a running job, whose deltas are written to `written`."""
    feed = parts.feed(job_id, partition=partition)
    parts.tail(record(job_id, 0, started(job_id), partition), partition=partition)
    assert taken(feed) == [("started", 0)]
    task = asyncio.create_task(feed.next(Push(Values(), written.append, Tally())))
    await asyncio.sleep(0)
    return task


async def test_distributor_writes_the_deltas_of_all_partitions_of_a_read_behind_it() -> None:
    """In the order in which they came, and each once."""
    parts = Parts()
    written: list[bytes] = []
    tasks = [await pushing(parts, f"j{number}", number, written) for number in range(2)]
    for number in range(2):
        parts.distributor.read_tail(number, [record(f"j{number}", 1, delta(f"j{number}", 1), number)], 1, 2)
        assert written == []
    for _ in range(2):
        parts.distributor.write()
        assert written == [delta("j0", 1), delta("j1", 1)]
    for task in tasks:
        assert not task.done()
        task.cancel()


async def test_distributor_client_that_becomes_full_gets_the_rest_of_a_read_and_then_nothing_pushed() -> None:
    """What was collected before is written in its order; later deltas are returned to the client's task, each once."""
    parts = Parts()
    feed = parts.feed("j")
    parts.tail(record("j", 0, started("j")))
    assert taken(feed) == [("started", 0)]
    written: list[bytes] = []

    def write(data: bytes) -> None:
        written.append(data)
        feed.hold()

    task = asyncio.create_task(feed.next(Push(Values(), write, Tally())))
    await asyncio.sleep(0)
    parts.tail(*(record("j", seq, delta("j", seq)) for seq in (1, 2, 3)))
    parts.tail(*(record("j", seq, delta("j", seq)) for seq in (4, 5)))
    event = await task
    assert written == [delta("j", seq) for seq in (1, 2, 3)]
    assert event is not None
    assert (event.seq, taken(feed)) == (4, [("delta", 5)])


async def test_distributor_writes_a_long_read_in_parts() -> None:
    """What waits is bounded, over all partitions of the read: a client that becomes full gets no more than that."""
    parts = Parts()
    written: list[bytes] = []
    tasks = [await pushing(parts, f"j{number}", number, written) for number in range(2)]
    values = {number: [delta(f"j{number}", seq, "x" * 1000) for seq in range(1, 101)] for number in range(2)}
    collected = 0
    for number, of_job in values.items():
        for offset, value in enumerate(of_job, 1):
            one = record(f"j{number}", offset, value, number)
            parts.distributor.read_tail(number, [one], offset, offset + 1)
            collected += len(value)
            assert collected - sum(map(len, written)) <= WRITTEN_BYTES
    assert len(written) > 150
    parts.distributor.write()
    assert written == values[0] + values[1]
    for task in tasks:
        assert not task.done()
        task.cancel()


async def test_distributor_remembers_where_jobs_begin_and_forgets_how_they_ended() -> None:
    """A job that is run again has another ending; a delta whose text looks like a `started` is not one."""
    parts = Parts()
    parts.ended.add(b"j", snapshot("j"), now=0)
    parts.ended.add(b"other", snapshot("other"), now=0)
    parts.tail(
        record("j", 1, started("j")),
        record("other", 2, delta("other", 1, '"started"')),
        record(None, 3, started("keyless")),
        record("j", 4, started("j")),
        record("bad", 5, b'"started"'),
    )
    assert parts.known.get(b"j") == (0, 1)
    assert len(parts.known) == 1
    assert parts.ended.get(b"j", now=0) is None
    assert parts.ended.get(b"other", now=0) is not None


async def test_distributor_reports_the_size_of_the_history_in_steps() -> None:
    """Of a mebibyte: not with every batch."""
    parts = Parts()
    for offset in range(25):
        parts.tail(record("j", offset, delta("j", offset, "x" * 100_000)))
    assert len(parts.observer.sizes) == 2
    assert parts.observer.sizes[0] > 1 << 20
    assert parts.history.size > parts.observer.sizes[-1]


async def test_distributor_serves_replays_that_wait_for_the_tail() -> None:
    """A cursor names a record that the tail has not returned yet."""
    parts = Parts()
    parts.followed.tail[0] = parts.followed.committed[0] = 1
    feed = parts.feed("j", 1, behind=Cursor(0, 1, 1, attempt8("a")))
    assert not feed.mailbox.is_live
    parts.tail(record("j", 1, delta("j", 1)), record("j", 2, delta("j", 2)))
    assert feed.mailbox.is_live
    assert taken(feed) == [("delta", 2)]
