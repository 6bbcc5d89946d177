"""Replays of the gateway, in memory: which parts of the log are read for clients that come one after the other."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.gateway import replays
from streamworker.gateway.log_options import LogOptions
from tests.properties.test_event_log import pause, settle
from tests.properties.test_handover import Log
from tests.properties.test_replays import Jobs, Restart, job, mixed

if TYPE_CHECKING:
    from streamworker.gateway.event_log import KafkaEventLog


def topic(deltas: int = 6) -> Jobs:
    """Return three jobs whose events take turns."""
    log, turns = Log(), count()
    mixed([job(log, f"j{number}", [], deltas) for number in range(3)], lambda jobs: next(turns) % jobs)
    return Jobs(log)


async def restarted(
    jobs: Jobs, *, length: int | None = None, batch: int = 2000, **options: Any
) -> tuple[Restart, KafkaEventLog, dict[int, asyncio.Event]]:
    """Return a replica that has just started, and the events that hold its scans."""
    world = Restart(
        jobs, len(jobs.log.entries) if length is None else length, batch, [1], LogOptions(**options)
    )
    return world, await world.begin(), world.scans.held


def with_open_transaction() -> Jobs:
    """Return a topic with the terminal event of a job at offset 6, whose transaction is open until offset 10."""
    log = Log()
    first, second = job(log, "a", [], 2), job(log, "b", [], 5)
    for step in [*second[:2], *first[:5], *second[2:5]]:
        step()
    return Jobs(log)


def end(jobs: Jobs, *, is_aborted: bool) -> None:
    """End that transaction. After a rollback, the job runs again."""
    log = jobs.log
    log.end("a", is_aborted=is_aborted)
    if is_aborted:
        event = {"job_id": "a", "attempt": "again"}
        log.write(type="started", seq=0, cause="redelivered", **event)
        log.write("a", type="usage", seq=1, status="completed", **event)
        log.end("a")
    log.write(type="delta", seq=4, job_id="b", attempt="b-0")


async def test_replays_stop_where_another_one_has_begun() -> None:
    """Before it has returned anything, too. Clients that come later find everything in memory."""
    jobs = topic()
    world, _, held = await restarted(jobs)
    first, last, stop = world.events()[4], world.events()[15], len(jobs.log.entries)
    held[last] = asyncio.Event()
    world.come(last)
    await settle(5)
    world.come(first)
    await settle(5)
    held[last].set()
    await settle(20)
    for offset in world.events()[4:]:
        world.come(offset)
    await world.finish()

    assert world.scans.ranges == [(last, stop), (first, last)]
    assert set(world.scans.returned.values()) == {1}


async def test_replays_that_come_further_back_each_time_read_only_what_is_new() -> None:
    """While two passes are under way, the next clients wait; each part is read once, and kept."""
    jobs = topic()
    world, _, held = await restarted(jobs)
    offsets = [world.events()[at] for at in (16, 12, 8, 4)]
    for offset in offsets:
        held[offset] = asyncio.Event()
        world.come(offset)
        await settle(5)
    assert len(world.scans.ranges) == replays.PASSES
    for offset in offsets:
        held[offset].set()
        await settle(20)
    await world.finish()

    assert set(world.scans.returned.values()) == {1}
    assert sorted(world.scans.ranges) == [
        (offsets[3], offsets[1]),
        (offsets[1], offsets[0]),
        (offsets[0], len(jobs.log.entries)),
    ]


async def test_replays_near_the_end_do_not_wait_for_a_search_from_far_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A partition has two passes. The one that is behind stops where the other one is, and its client goes on there."""
    monkeypatch.setattr(replays, "NEAR", 5)
    jobs = topic()
    world, _, held = await restarted(jobs, batch=2)
    first, last = world.events()[0], world.events()[-1]
    held[first] = asyncio.Event()
    world.come(first)
    await settle(5)
    world.come(last)
    await settle(20)
    world.take()
    assert [(events, expected) for _, events, expected in world.clients_of if events == expected]
    held[first].set()
    await world.finish()

    assert world.scans.ranges == [(first, len(jobs.log.entries)), (last, len(jobs.log.entries))]
    assert world.observer.records == world.kept == len(world.scans.returned)


async def test_replays_end_at_a_pass_that_they_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for what that pass is reading."""
    monkeypatch.setattr(replays, "NEAR", 5)
    jobs = topic()
    world, log, held = await restarted(jobs, batch=2)
    first, last = world.events()[0], world.events()[-6]
    held[last] = asyncio.Event()
    world.come(last)
    await settle(5)
    world.come(first)
    await settle(100)
    assert world.scans.ranges == [(last, len(jobs.log.entries)), (first, last)]
    assert [mailbox.position for mailbox in log._registry.replays._waiting[0]] == [last, last]
    assert list(log._registry.replays._passes[0].values()) == [last]
    held[last].set()
    await world.finish()
    assert len(world.scans.ranges) == 2
    assert set(world.scans.returned.values()) == {1}


async def test_replays_beyond_what_is_kept_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: nothing is kept far behind the tail, and a client that comes later gets its events all the same."""
    monkeypatch.setattr(replays, "_KEPT", 10)
    world, log, _ = await restarted(topic(), batch=5)
    for _ in range(2):
        world.come(world.events()[0])
        await settle(50)
    tail = log._followed.tail_position(0)
    assert all(block.begin >= tail - 10 for block in log._history)
    assert world.scans.returned[world.events()[3]] == 2
    await world.finish()


@pytest.mark.parametrize("is_aborted", [False, True])
async def test_replays_read_what_is_not_committed_once(*, is_aborted: bool) -> None:
    """While a transaction is open. What became of it is known when the committed reader has passed its end."""
    jobs = with_open_transaction()
    length = len(jobs.log.entries)
    end(jobs, is_aborted=is_aborted)
    world, log, _ = await restarted(jobs, length=length)
    for offset in (4, 5, 0, 7, 2):
        world.come(offset)
        await settle(20)
        world.take()
    assert log._followed.committed_position(0) == 6
    assert [kind for _, events, _ in world.clients_of for kind, _ in events if kind == "usage"] == []
    jobs.length = len(jobs.log.entries)
    world.read("committed", 1000)
    world.come(4)
    await world.finish()

    assert max(world.scans.returned.values()) == 1
    assert world.observer.records + world.tail_records == world.kept


@pytest.mark.parametrize("is_aborted", [False, True])
async def test_replays_read_an_ending_again_that_was_decided_while_it_was_read(*, is_aborted: bool) -> None:
    """The committed reader has reported it, or not, before its record was there: nothing else is read again."""
    jobs = with_open_transaction()
    length = len(jobs.log.entries)
    end(jobs, is_aborted=is_aborted)
    world, log, held = await restarted(jobs, length=length)
    held[6] = asyncio.Event()
    world.come(4)
    world.come(8)
    await settle(20)
    assert (6, length) in world.scans.ranges
    jobs.length = len(jobs.log.entries)
    world.read("committed", 1000)
    assert log._followed.committed_position(0) > length
    held.pop(6).set()
    await world.finish()

    assert world.scans.ranges[-1] == (6, length)
    assert world.observer.records + world.tail_records == world.kept


async def test_replays_leave_what_the_tail_has_not_read_to_the_tail() -> None:
    """A cursor from another replica may be ahead of it."""
    jobs = topic()
    world, log, _ = await restarted(jobs, length=6, reads_all=True)
    jobs.length = 12
    for offset in (8, 9, 1):
        world.come(offset)
    await settle(20)
    assert log._registry.replays._passes[0] == {}
    assert len(world.clients_of) == 1
    world.read("tail", 3)
    await settle(5)
    assert len(world.clients_of) == 2
    await world.finish()
    assert world.scans.ranges == [(1, 6)]
    assert log._registry.replays._waiting[0] == {}


async def test_replays_keep_ranges_without_records() -> None:
    """The marker of a transaction is at the end of many ranges: no later client needs a scan for it."""
    world, _, _ = await restarted(topic(), length=6)
    for offset in (2, 1, 0, 2):
        world.come(offset)
        await settle(20)
    assert world.scans.ranges == [(2, 6), (1, 2), (0, 1)]
    await world.finish()


async def test_replays_keep_nothing_undecided_of_a_partition_that_was_paused() -> None:
    """The committed reader will not report it: it begins later when the partition is read again."""
    jobs = with_open_transaction()
    length = len(jobs.log.entries)
    end(jobs, is_aborted=False)
    world, log, held = await restarted(jobs, length=length)
    held[6] = asyncio.Event()
    world.come(4)
    await settle(20)
    world.clients_of.pop()[0].close()
    pause(log)
    held.pop(6).set()
    await settle(20)
    assert [block.end for block in log._history] == [6]
    assert log._registry.replays._passes[0] == {}
    jobs.length = len(jobs.log.entries)
    world.come(4)
    await world.finish()


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.long) if n > 2 else n for n in range(8)])
async def test_replays_for_hundreds_of_reconnects_read_each_record_once(seed: int) -> None:
    """Gateways were killed; the clients of all jobs come back in any order, over some time, and the tail is live."""
    chance = random.Random(seed)
    log = Log()
    mixed([job(log, f"j{number}", [], 24) for number in range(12)], chance.randrange)
    jobs = Jobs(log)
    jobs.length = len(log.entries) // 2
    world = Restart(jobs, jobs.length, 2000, [1, 40, 5])
    last = {jobs.key(log.entries[offset]): offset for offset in world.events()}
    length = jobs.length = len(log.entries) * 9 // 10
    await world.begin()
    acts = [partial(world.come, chance.choice(list(last.values()))) for _ in range(200)]
    acts += [partial(world.read, "tail", 1000)] * 50 + [partial(world.read, "committed", 1000)] * 20
    chance.shuffle(acts)
    for act in acts:
        act()
        await settle(chance.randrange(10))
        jobs.length = min(len(log.entries), jobs.length + (chance.random() < 0.1))
    await world.finish()

    lowest = min(start for start, _ in world.scans.ranges)
    assert world.observer.records == len(jobs.records(lowest, length, with_aborted=True))
    assert world.observer.records + world.tail_records == world.kept
