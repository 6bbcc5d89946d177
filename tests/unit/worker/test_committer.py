"""The partition committer: which entries go into a commit together."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
from streamworker.progress.offset_map import OffsetMap, decode_map, encode_map
from streamworker.testing import Commit, MemoryCommitStores, MemoryObserver
from streamworker.worker.committer import MAX_COMMIT_BYTES, MAX_COMMIT_RECORDS, PartitionCommitter
from tests.turnable import quiet, run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

JOBS = TopicPartition("jobs", 0)
EVENTS = TopicPartition("events", 1)


def record(text: str) -> ProducerRecord:
    return ProducerRecord(EVENTS, b"key", text.encode())


def texts(records: Sequence[ProducerRecord]) -> list[str]:
    return [(record.value or b"").decode() for record in records]


def finished_by(point: CommitPoint, offset: int) -> bool:
    """Whether a restart at this point would not run the offset again."""
    return offset < point.offset or offset in decode_map(*point).finished


class Bench:
    """An open committer, its broker, and whether the partition was lost."""

    def __init__(self) -> None:
        self.broker = MemoryCommitStores()
        self.lost: list[str] = []
        self.committer = PartitionCommitter(
            JOBS, self.broker.store(JOBS), commit_id="me", lost=self.lost.append
        )
        self._task: asyncio.Task[None] | None = None

    async def open(self, *offsets: int) -> None:
        """Open the committer and accept these offsets."""
        await self.committer.open()
        for offset in offsets:
            self.committer.progress.begin(offset)
            self.committer.progress.count(offset)
        self._task = asyncio.create_task(self.committer.run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self.committer.close()

    @property
    def has_ended(self) -> bool:
        return self._task is not None and self._task.done()

    def only(self) -> Commit:
        (commit,) = self.broker.commits
        return commit


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.close()


async def test_committer_opened_returns_the_committed_offset_and_knows_what_is_finished(bench: Bench) -> None:
    """Offsets that the former owner finished beyond the committed one are not run again."""
    bench.broker.points[JOBS] = CommitPoint(5, encode_map(5, OffsetMap(frozenset({7}), {5: 2})))

    assert await bench.committer.open() == 5
    assert [bench.committer.progress.begin(offset) for offset in (5, 6, 7)] == [3, 1, 0]


async def test_committer_opened_on_unreadable_metadata_logs_it_and_starts_without_a_map(bench: Bench) -> None:
    """A map that cannot be read repeats finished jobs, and loses none."""
    bench.broker.points[JOBS] = CommitPoint(5, "someone else's")

    with capture_logs() as logs:
        assert await bench.committer.open() == 5

    assert [entry["event"] for entry in logs] == ["commit.offset_map_ignored"]
    assert bench.committer.progress.begin(5) == 1


async def test_committer_start_writes_the_event_and_the_delivery_but_no_progress(bench: Bench) -> None:
    """The delivery count is committed with `started`; the offset is not."""
    await bench.open(0)
    await bench.committer.start(record("started"))

    commit = bench.only()
    assert texts(commit.records) == ["started"]
    assert commit.point.offset == 0
    assert dict(decode_map(*commit.point).deliveries) == {0: 1}


async def test_committer_start_returns_the_offset_of_its_own_record(bench: Bench) -> None:
    """Also where the entries of other jobs are in the same commit."""
    await bench.open(0, 1, 2)
    done = [
        bench.committer.start(record("started 0")),
        bench.committer.finish(1, [record("usage 1"), record("result 1")]),
        bench.committer.touch(),
        bench.committer.start(record("started 2")),
    ]

    assert await asyncio.gather(*done) == [0, 1, None, 3]
    bench.only()


async def test_committer_finish_commits_the_offset_with_the_terminal_event(bench: Bench) -> None:
    """Terminal event and offset are in one commit."""
    await bench.open(0)
    await bench.committer.finish(0, [record("usage")])

    commit = bench.only()
    assert texts(commit.records) == ["usage"]
    assert commit.point.offset == 1


async def test_committer_entries_that_wait_together_go_in_one_commit(bench: Bench) -> None:
    """A commit holds all waiting entries, in their order."""
    await bench.open(0, 1, 2)
    done = [
        bench.committer.finish(0, [record("usage 0")]),
        bench.committer.start(record("started 2")),
        bench.committer.finish(1, [record("letter 1"), record("usage 1")]),
    ]
    await asyncio.gather(*done)

    commit = bench.only()
    assert texts(commit.records) == ["usage 0", "started 2", "letter 1", "usage 1"]
    assert commit.point.offset == 2


async def test_committer_entry_that_arrives_during_a_commit_is_in_the_next_one(bench: Bench) -> None:
    """Its offset is not in the commit that is in progress, which does not hold its records."""
    await bench.open(0, 1, 2)
    bench.broker.committing.clear()
    first = bench.committer.finish(0, [record("usage 0")])
    await quiet()
    second = bench.committer.finish(1, [record("usage 1")])
    await quiet()
    assert [commit.point.offset for commit in bench.broker.under_way] == [1]
    bench.broker.committing.set()
    await first
    assert not second.done()
    await second

    assert [(texts(commit.records), commit.point.offset) for commit in bench.broker.commits] == [
        (["usage 0"], 1),
        (["usage 1"], 2),
    ]


async def test_committer_future_is_done_only_once_the_commit_is_durable(bench: Bench) -> None:
    """Deltas and `job_ended` wait for the future."""
    await bench.open(0)
    bench.broker.committing.clear()
    done = bench.committer.start(record("started"))
    await asyncio.sleep(60)
    assert not done.done()
    bench.broker.committing.set()
    await done

    assert texts(bench.broker.records()) == ["started"]


async def test_committer_touch_commits_without_records(bench: Bench) -> None:
    """Progress alone can be committed, and no two commit points are equal."""
    await bench.open()
    await bench.committer.touch()
    await bench.committer.touch()

    first, second = bench.broker.commits
    assert first.records == second.records == ()
    assert first.point != second.point


async def test_committer_with_much_waiting_commits_in_portions(bench: Bench) -> None:
    """A transaction stays short, because it blocks read_committed readers."""
    await bench.open()
    waiting = [bench.committer.start(record(str(number))) for number in range(2 * MAX_COMMIT_RECORDS + 1)]
    assert bench.committer.backlog == len(waiting)
    await asyncio.gather(*waiting)

    assert [len(commit.records) for commit in bench.broker.commits] == [500, 500, 1]
    assert bench.committer.backlog == 0


async def test_committer_with_many_finished_jobs_commits_only_the_offsets_of_the_portion(
    bench: Bench,
) -> None:
    """An offset is committed with its records, however many entries wait."""
    offsets = range(MAX_COMMIT_RECORDS + 10)
    await bench.open(*offsets)
    await asyncio.gather(*(bench.committer.finish(offset, [record(str(offset))]) for offset in offsets))

    assert [commit.point.offset for commit in bench.broker.commits] == [500, 510]


async def test_committer_refused_for_size_writes_the_fallback(bench: Bench) -> None:
    """A dead letter that is too large is written without its value; the other entries stay as they were."""
    await bench.open(0, 1)
    bench.broker.max_record_bytes = 100
    done = bench.committer.finish(0, [record("x" * 200), record("usage 0")], fallback=[record("usage 0")])
    other = bench.committer.finish(1, [record("usage 1")])
    with capture_logs() as logs:
        await asyncio.gather(done, other)

    assert [(texts(commit.records), commit.point.offset) for commit in bench.broker.commits] == [
        (["usage 0"], 1),
        (["usage 1"], 2),
    ]
    refusals = [(entry["event"], entry["entries"]) for entry in logs]
    assert refusals == [("commit.record_refused", 2), ("commit.record_refused", 1)]
    assert bench.lost == []


async def test_committer_refused_for_size_replaces_only_what_is_refused_alone(bench: Bench) -> None:
    """A dead letter that fits keeps its value when another one does not fit."""
    await bench.open(0, 1, 2)
    bench.broker.max_record_bytes = 100
    done = [
        bench.committer.finish(offset, [record(str(offset) * size)], fallback=[record(f"emptied {offset}")])
        for offset, size in ((0, 50), (1, 300), (2, 200))
    ]
    await asyncio.gather(*done)

    assert texts(bench.broker.records()) == ["0" * 50, "emptied 1", "emptied 2"]


async def test_committer_whose_whole_commit_is_too_large_halves_it(bench: Bench) -> None:
    """The topic accepts each record but not all of them in one batch: none is replaced, and none is written twice."""
    await bench.open(*range(8))
    bench.broker.max_commit_bytes = 3 * record("x" * 50).size
    entries = [
        bench.committer.finish(offset, [record(str(offset) * 50)], fallback=[record("emptied")])
        for offset in range(8)
    ]
    await asyncio.gather(*entries)

    assert [len(commit.records) for commit in bench.broker.commits] == [2, 2, 2, 2]
    assert texts(bench.broker.records()) == [str(offset) * 50 for offset in range(8)]
    assert [commit.point.offset for commit in bench.broker.commits] == [2, 4, 6, 8]


async def test_committer_half_of_a_refused_commit_finishes_only_its_own_offsets(bench: Bench) -> None:
    """A worker that dies between the halves repeats the jobs of the second one, and no other job."""
    await bench.open(0, 1, 2, 3)
    bench.broker.max_commit_bytes = 2 * record("x" * 50).size
    done = [bench.committer.finish(offset, [record(str(offset) * 50)]) for offset in (1, 3, 0, 2)]
    await asyncio.gather(*done)

    first, second = [commit.point for commit in bench.broker.commits]
    assert [finished_by(first, offset) for offset in range(4)] == [False, True, False, True]
    assert second.offset == 4


async def test_committer_refused_entry_without_fallback_delays_no_entry_before_it(bench: Bench) -> None:
    """The entries before the refused one are committed, and their jobs end, while it waits for a higher limit."""
    await bench.open(0, 1)
    bench.broker.max_record_bytes = 100
    before = bench.committer.finish(0, [record("usage 0")])
    refused = bench.committer.finish(1, [record("x" * 200)])
    await before
    assert not refused.done()
    assert bench.committer.progress.position == 1
    bench.broker.max_record_bytes = 1000
    await refused

    assert [commit.point.offset for commit in bench.broker.commits] == [1, 2]


async def test_committer_refused_for_size_repeats_the_commit_with_the_same_entries(bench: Bench) -> None:
    """The offset of an entry that arrived in between is not committed: its records are in another commit."""
    await bench.open(0, 1)
    bench.broker.max_record_bytes = 100
    bench.broker.committing.clear()
    first = bench.committer.finish(0, [record("x" * 200)], fallback=[record("emptied")])
    await quiet()
    second = bench.committer.finish(1, [record("usage 1")])
    bench.broker.committing.set()
    await asyncio.gather(first, second)

    assert [(texts(commit.records), commit.point.offset) for commit in bench.broker.commits] == [
        (["emptied"], 1),
        (["usage 1"], 2),
    ]


async def test_committer_refused_for_size_without_fallback_waits_for_the_topic(
    bench: Bench,
) -> None:
    """Nothing is skipped, and no job is run again, which would be paid for again."""
    await bench.open(0)
    bench.broker.max_record_bytes = 10
    done = bench.committer.finish(0, [record("x" * 200)])
    await asyncio.sleep(60)
    assert (bench.lost, done.done(), bench.broker.commits) == ([], False, [])

    bench.broker.max_record_bytes = 1000
    await done

    assert bench.only().point.offset == 1


async def test_committer_fenced_is_lost_once_and_writes_nothing_more(bench: Bench) -> None:
    """The broker reports that another worker owns the partition."""
    await bench.open(0, 1)
    bench.broker.seize(JOBS)
    done = bench.committer.finish(0, [record("usage 0")])
    await quiet()
    bench.committer.finish(1, [record("usage 1")])
    await quiet()

    assert bench.lost == ["jobs-0 is another's"]
    assert bench.has_ended
    assert not done.done()
    assert bench.broker.commits == []


async def test_committer_closed_cancels_the_entries_that_wait(bench: Bench) -> None:
    """No job waits forever for a committer that is closed."""
    await bench.committer.open()
    waiting = bench.committer.start(record("started"))
    await bench.committer.close()

    assert waiting.cancelled()
    assert bench.broker.closed == [JOBS]
    assert bench.broker.commits == []


async def test_committer_whose_waiter_was_cancelled_commits_the_entry(bench: Bench) -> None:
    """A job that stops waiting removes nothing from a commit."""
    await bench.open(0)
    bench.committer.finish(0, [record("usage")]).cancel()
    await bench.committer.touch()

    assert texts(bench.only().records) == ["usage"]
    assert bench.lost == []


@pytest.mark.parametrize("error", [KafkaUnavailable("gone"), KafkaRefused("no")])
async def test_committer_open_with_a_broker_that_fails_raises(bench: Bench, error: Any) -> None:
    """The partition decides whether to retry."""
    bench.broker.open_errors.append(error)

    with pytest.raises(type(error)):
        await bench.committer.open()


async def test_committer_with_a_map_over_the_limit_commits_without_it_and_logs_it(bench: Bench) -> None:
    """The broker would refuse the metadata, and every later commit of the partition with it."""
    far_apart = [offset * offset for offset in range(6000)]
    await bench.open(*far_apart)
    for offset in far_apart[1::2]:
        bench.committer.progress.finish(offset)
    with capture_logs() as logs:
        await bench.committer.touch()

    assert len(bench.only().point.metadata) <= 4096
    assert [entry["event"] for entry in logs] == ["commit.offset_map_cut"]


class Chance:
    """A committer driven at random, and its main property checked at each commit."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.next = 0
        self.taken: set[int] = set()
        self.open: list[int] = []

    async def play(self, moves: list[tuple[str, int]]) -> None:
        await self.bench.open()
        for move, number in moves:
            await getattr(self, move)(number)
        self.bench.broker.committing.set()
        await quiet()
        await self.bench.close()
        self.check()

    async def take(self, gap: int) -> None:
        offset = self.next + gap % 3
        self.next = offset + 1
        assert self.bench.committer.progress.begin(offset) == 1
        self.bench.committer.progress.count(offset)
        self.open.append(offset)
        self.taken.add(offset)
        self.bench.committer.start(record(f"started {offset}"))

    async def finish(self, number: int) -> None:
        if self.open:
            offset = self.open.pop(number % len(self.open))
            self.bench.committer.finish(
                offset,
                [record(f"end {offset} " + number % 5 * "x" * 100)],
                fallback=[record(f"end {offset}")],
            )

    async def gate(self, number: int) -> None:
        gate = self.bench.broker.committing
        if number % 2:
            gate.set()
        else:
            gate.clear()

    async def limit(self, number: int) -> None:
        self.bench.broker.max_record_bytes = 100 + 200 * (number % 3)

    async def seize(self, number: int) -> None:
        if number == 0:
            self.bench.broker.seize(JOBS)

    async def rest(self, number: int) -> None:
        for _ in range(number % 4):
            await asyncio.sleep(0)

    def check(self) -> None:
        written: set[int] = set()
        for commit in self.bench.broker.commits:
            words = [text.split() for text in texts(commit.records)]
            written |= {int(offset) for kind, offset, *_ in words if kind == "end"}
            declared = {offset for offset in self.taken if finished_by(commit.point, offset)}
            assert declared == written


MOVES = st.tuples(
    st.sampled_from(
        ["take", "take", "take", "finish", "finish", "finish", "gate", "limit", "rest", "rest", "seize"]
    ),
    st.integers(0, 20),
)


@settings(max_examples=150)
@given(moves=st.lists(MOVES, min_size=10, max_size=80))
def test_committer_of_any_history_commits_no_offset_before_its_records(
    moves: list[tuple[str, int]],
) -> None:
    """At every commit, exactly the offsets whose records are in this or an earlier commit count as finished."""
    run(Chance().play(moves))


async def test_committer_with_large_records_commits_in_portions_of_bytes(bench: Bench) -> None:
    """A commit has at most `MAX_COMMIT_BYTES`, and at least one entry."""
    await bench.open(*range(5))
    bench.broker.committing.clear()
    first = bench.committer.touch()
    await quiet()
    sizes = [2 * MAX_COMMIT_BYTES, *[MAX_COMMIT_BYTES // 2 - 100] * 4]
    waiting = [bench.committer.finish(offset, [record("x" * size)]) for offset, size in enumerate(sizes)]
    bench.broker.committing.set()
    await asyncio.gather(first, *waiting)

    assert [len(commit.records) for commit in bench.broker.commits] == [0, 1, 2, 2]
    assert [commit.point.offset for commit in bench.broker.commits] == [0, 1, 3, 5]


async def test_committer_whose_observer_raises_goes_on(bench: Bench) -> None:
    """The commit is durable; telemetry must not end the worker."""

    class Observer(MemoryObserver):
        def committed(self, *_: object) -> None:
            raise ZeroDivisionError("a bug")

    observer = bench.committer._observer = Observer()
    await bench.open(0, 1)
    with capture_logs() as logs:
        await bench.committer.finish(0, [record("first")])
        await bench.committer.finish(1, [record("second")])

    assert len(bench.broker.commits) == 2
    assert [entry["event"] for entry in logs] == ["telemetry.failed"] * 2
    assert observer.all("telemetry_failed") == [()] * 2


async def test_committer_whose_observer_raises_also_when_that_is_counted_goes_on(bench: Bench) -> None:
    """The metric of the failure may be what is broken."""

    class Observer(MemoryObserver):
        def committed(self, *_: object) -> None:
            raise ZeroDivisionError("a bug")

        def telemetry_failed(self) -> None:
            raise ZeroDivisionError("the same bug")

    bench.committer._observer = Observer()
    await bench.open(0)
    await bench.committer.finish(0, [record("first")])

    assert len(bench.broker.commits) == 1
    assert not bench.has_ended


async def test_committer_refused_for_its_metadata_halves_the_limit_until_it_fits(bench: Bench) -> None:
    """The broker's limit cannot be read without a permission. The records are written once, with a shorter map."""
    bench.broker.metadata_limit = 80
    await bench.open(*range(2000))
    ended = Random(1).sample(range(1, 2000), 400)  # in no pattern, which a map would shorten
    with capture_logs() as logs:
        await asyncio.gather(*(bench.committer.finish(offset, [record(str(offset))]) for offset in ended))

    commit = bench.only()
    assert commit.point.offset == 0
    assert len(commit.point.metadata) <= 80
    limits = [entry["limit"] for entry in logs if entry["event"] == "commit.metadata_refused"]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > 80
    assert texts(commit.records) == [str(offset) for offset in ended]
    assert not bench.has_ended


async def test_committer_whose_commit_takes_long_is_stalled_until_it_succeeds(bench: Bench) -> None:
    """A call that begins meanwhile would be paid and could not be recorded."""
    from streamworker.worker.committer import STALLED_S

    await bench.committer.flowing()
    bench.committer._busy_since = asyncio.get_running_loop().time() - STALLED_S - 1
    assert bench.committer.is_stalled
    waiting = asyncio.ensure_future(bench.committer.flowing())
    await asyncio.sleep(0.01)
    assert not waiting.done()

    bench.committer._busy_since = None
    bench.committer._succeeded.set()
    await waiting
