"""One assignment of one partition: opened, running jobs, drained, released, returned."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from structlog.testing import capture_logs

from streamworker.errors import KafkaUnavailable
from streamworker.model import Coordinates, Job, ProducerRecord, TopicPartition
from streamworker.progress.offset_map import decode_map
from streamworker.testing import MemoryCommitStores
from streamworker.worker.committer import MAX_COMMIT_RECORDS, PartitionCommitter
from streamworker.worker.partition import AssignedPartition, Ownership
from tests.streams import make_job
from tests.turnable import quiet
from tests.unit.worker.bench import JOBS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine


class OpenDelivery(NamedTuple):
    """A job that has begun, still waits, or waits for its next try."""

    job: Job
    is_waiting: bool = False
    is_between_tries: bool = False


RECORD = ProducerRecord(TopicPartition("events", 0), b"k", b"v")


class Bench:
    """A partition, its broker, and what became of its jobs."""

    def __init__(self) -> None:
        self.broker = MemoryCommitStores()
        self.work = AssignedPartition(
            PartitionCommitter(JOBS, self.broker.store(JOBS), commit_id="me", lost=lambda _: None)
        )
        self.ended = 0
        self.cancellations = 0
        self.closing = asyncio.Event()
        self.closing.set()

    async def open(self) -> None:
        await self.work.open()
        self.work.committing = asyncio.create_task(self.work.committer.run())
        self.work.ownership = Ownership.OPEN

    def run(
        self,
        offset: int,
        work: Coroutine[Any, Any, None] | None = None,
        *,
        is_waiting: bool = False,
        is_between_tries: bool = False,
    ) -> None:
        self.work.committer.progress.begin(offset)
        if not is_waiting:
            self.work.committer.progress.count(offset)
        job = make_job(job_id=str(offset), source=Coordinates(*JOBS, offset))
        delivery = OpenDelivery(job, is_waiting, is_between_tries)
        self.work.run(delivery, work or self.forever(), ended=self.note_end)

    async def forever(self) -> None:
        """A job that takes its time to close what it holds."""
        try:
            await asyncio.Event().wait()
        finally:
            self.cancellations += 1
            await self.closing.wait()

    def note_end(self) -> None:
        self.ended += 1

    def deliveries(self) -> dict[int, int]:
        """Return what is on record with the broker."""
        return dict(decode_map(*self.broker.points[JOBS]).deliveries)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.work.release()


async def test_partition_open_retries_until_the_broker_is_available(bench: Bench) -> None:
    """Nothing of the partition may be read before it is open."""
    bench.broker.open_errors.extend([KafkaUnavailable("gone")] * 3)
    began = asyncio.get_running_loop().time()
    with capture_logs() as logs:
        assert await bench.work.open() == 0

    assert round(asyncio.get_running_loop().time() - began) == 3
    assert [entry["event"] for entry in logs] == ["partition.open_failed"] * 3


async def test_partition_has_room_only_while_it_is_open(bench: Bench) -> None:
    """No record is accepted before the partition is open or after it is gone."""
    assert not bench.work.has_room
    await bench.open()
    assert bench.work.has_room
    await bench.work.release()
    assert not bench.work.has_room


async def test_partition_with_a_large_backlog_has_no_room(bench: Bench) -> None:
    """Records that need no upstream must not pile up before a slow broker."""
    await bench.open()
    bench.broker.committing.clear()
    waiting = [bench.work.committer.start(RECORD) for _ in range(2 * MAX_COMMIT_RECORDS)]
    await quiet()
    assert not bench.work.has_room
    bench.broker.committing.set()
    await asyncio.gather(*waiting)

    assert bench.work.has_room


async def test_partition_job_that_ends_is_reported_and_removed(bench: Bench) -> None:
    """`ended` is called after a result and after an exception."""

    async def crash() -> None:
        raise RuntimeError("a bug")

    await bench.open()
    bench.run(0, asyncio.sleep(1))
    bench.run(1, crash())
    task = next(task for task in asyncio.all_tasks() if task.get_name() == "job 1")
    assert [job.job_id for job in bench.work.open_jobs] == ["0", "1"]
    await bench.work.idle()

    assert bench.ended == 2
    assert bench.work.open_jobs == []
    assert str(task.exception()) == "a bug"


async def test_partition_idle_waits_for_the_last_job(bench: Bench) -> None:
    """Jobs that begin during the wait are waited for too."""
    await bench.open()
    bench.run(0, asyncio.sleep(5))
    idle = asyncio.create_task(bench.work.idle())
    await asyncio.sleep(1)
    bench.run(1, asyncio.sleep(20))
    began = asyncio.get_running_loop().time()
    await idle

    assert round(asyncio.get_running_loop().time() - began) == 20


async def test_partition_released_cancels_jobs_waits_for_them_and_closes(bench: Bench) -> None:
    """Upstream calls are closed at once; nothing is written."""
    await bench.open()
    bench.run(0)
    bench.run(1)
    await quiet()
    jobs = await bench.work.release()

    assert [job.job_id for job in jobs] == ["0", "1"]
    assert bench.ended == 2
    assert bench.work.ownership is Ownership.GONE
    assert bench.broker.closed == [JOBS]
    assert bench.broker.commits == []


async def test_partition_released_twice_at_once_cancels_each_job_once(bench: Bench) -> None:
    """A partition may be fenced and revoked at once; a second cancellation would interrupt the closing of a job's resources."""
    await bench.open()
    bench.run(0)
    bench.closing.clear()
    await quiet()
    first = asyncio.create_task(bench.work.release())
    await quiet()
    second = asyncio.create_task(bench.work.release())
    await quiet()
    assert not first.done()
    assert not second.done()
    assert bench.ended == 0
    bench.closing.set()

    assert [job.job_id for job in await first] == ["0"]
    assert await second == []
    assert (bench.ended, bench.cancellations) == (1, 1)


async def test_partition_released_while_being_opened_cancels_the_opening(bench: Bench) -> None:
    """An opening that goes on would fence the next owner."""
    bench.broker.opening.clear()
    bench.work.opening = asyncio.create_task(_ignore(bench.work.open()))
    await quiet()
    await bench.work.release()
    bench.broker.opening.set()
    bench.broker.points.clear()
    await quiet()

    assert bench.work.opening.cancelled()
    assert bench.broker.closed == [JOBS]


async def test_partition_released_during_a_commit_cancels_it(bench: Bench) -> None:
    """A commit that hangs does not delay the release."""
    await bench.open()
    bench.broker.committing.clear()
    bench.work.committer.start(RECORD)
    await quiet()
    assert len(bench.broker.under_way) == 1
    await bench.work.release()
    bench.broker.committing.set()
    await quiet()

    assert bench.broker.under_way == []
    assert bench.broker.commits == []


async def test_partition_returned_undoes_the_delivery_count(bench: Bench) -> None:
    """A delivery that the worker itself ended does not count."""
    await bench.open()
    for offset in (0, 1):
        bench.run(offset)
    await bench.work.committer.start(RECORD)
    assert bench.deliveries() == {0: 1, 1: 1}
    jobs = await bench.work.return_jobs()

    assert [job.job_id for job in jobs] == ["0", "1"]
    assert bench.deliveries() == {}
    assert bench.broker.points[JOBS].offset == 0
    assert bench.broker.closed == [JOBS]


async def test_partition_returned_keeps_the_count_of_earlier_deliveries(bench: Bench) -> None:
    """Only this worker's delivery is undone."""
    await bench.open()
    bench.run(0)
    await bench.work.committer.touch()
    again = AssignedPartition(
        PartitionCommitter(JOBS, bench.broker.store(JOBS), commit_id="next", lost=lambda _: None)
    )
    await bench.work.release()
    bench.work = again
    await bench.open()
    bench.run(0)
    await bench.work.committer.touch()
    assert bench.deliveries() == {0: 2}
    await bench.work.return_jobs()

    assert bench.deliveries() == {0: 1}


async def ended_by(bench: Bench, offset: int) -> None:
    await bench.work.committer.finish(offset, [RECORD])


async def test_partition_returned_while_a_terminal_event_waits_writes_it(bench: Bench) -> None:
    """A terminal event that waits for its commit is not dropped, and its job is not run again."""
    await bench.open()
    bench.broker.committing.clear()
    bench.work.committer.start(RECORD)
    await quiet()
    bench.run(0, ended_by(bench, 0))
    bench.run(1)
    await quiet()
    handing_back = asyncio.create_task(bench.work.return_jobs())
    await quiet()
    bench.broker.committing.set()
    await handing_back

    assert bench.broker.points[JOBS].offset == 1
    assert bench.deliveries() == {}
    assert len(bench.broker.records()) == 2


async def test_partition_returned_while_a_terminal_event_is_committed_succeeds(bench: Bench) -> None:
    """A job may end in the moment in which the drain times out."""
    await bench.open()
    bench.broker.committing.clear()
    bench.run(0, ended_by(bench, 0))
    bench.run(1)
    await quiet()
    assert len(bench.broker.under_way) == 1
    handing_back = asyncio.create_task(bench.work.return_jobs())
    await quiet()
    bench.broker.committing.set()
    await handing_back

    assert bench.broker.points[JOBS].offset == 1
    assert bench.deliveries() == {}


async def test_partition_returned_to_a_broker_that_hangs_gives_up(bench: Bench) -> None:
    """The last commit is bounded in time, so that it does not delay the shutdown."""
    await bench.open()
    bench.run(0)
    await quiet()
    bench.broker.committing.clear()
    began = asyncio.get_running_loop().time()
    await bench.work.return_jobs()

    assert round(asyncio.get_running_loop().time() - began) == 5
    assert bench.broker.closed == [JOBS]


async def test_partition_turn_comes_when_the_earlier_jobs_of_the_key_have_ended(bench: Bench) -> None:
    """Jobs of other keys do not wait."""
    await bench.open()
    begun: list[str] = []
    waited: list[str] = []
    queues = {name: asyncio.Event() for name in ("a1", "a2", "a3", "b1")}

    async def take_turn(name: str, key: bytes) -> None:
        async with bench.work.turn(key, waits=lambda: waited.append(name)):
            begun.append(name)
            await queues[name].wait()

    for name in ("a1", "a2", "b1", "a3"):
        bench.run(len(bench.work.open_jobs), take_turn(name, name[:1].encode()))
    await quiet()
    assert begun == ["a1", "b1"]
    assert waited == ["a2", "a3"]
    queues["a1"].set()
    await quiet()
    assert begun == ["a1", "b1", "a2"]
    queues["a2"].set()
    await quiet()

    assert begun == ["a1", "b1", "a2", "a3"]


@pytest.mark.parametrize("leaves_at_once", [False, True])
async def test_partition_turn_of_a_cancelled_job_goes_to_the_next(bench: Bench, leaves_at_once: bool) -> None:
    """A job may be cancelled in the moment in which its turn comes."""
    await bench.open()
    begun: list[str] = []
    gate = asyncio.Event()

    async def take_turn(name: str) -> None:
        async with bench.work.turn(b"k", waits=lambda: None):
            begun.append(name)
            await gate.wait()

    tasks = [asyncio.create_task(take_turn(name)) for name in ("first", "second", "third")]
    await quiet()
    if leaves_at_once:
        gate.set()
        await asyncio.sleep(0)
    tasks[1].cancel()
    await quiet()
    gate.set()
    await asyncio.wait(tasks)

    assert begun == ["first", "third"]
    assert bench.work._order._queues == {}


async def test_partition_drained_cancels_jobs_that_have_not_begun(bench: Bench) -> None:
    """Their deliveries do not count, and the next owner begins them."""
    await bench.open()
    bench.run(0)
    bench.run(1, is_waiting=True)
    await quiet()
    assert [job.job_id for job in bench.work.drain()] == ["1"]
    await quiet()
    assert [job.job_id for job in bench.work.open_jobs] == ["0"]
    await bench.work.committer.touch()
    assert bench.deliveries() == {0: 1}
    jobs = await bench.work.return_jobs()

    assert [job.job_id for job in jobs] == ["0"]
    assert bench.deliveries() == {}


async def test_partition_drained_returns_jobs_between_two_tries_once(bench: Bench) -> None:
    """Their deliveries do not count, also where they were forgiven before; each job is reported once."""
    await bench.open()
    for offset in range(2):
        bench.run(offset, is_between_tries=True)
    bench.run(2)
    await quiet()
    bench.work.forgive()
    assert [job.job_id for job in bench.work.drain()] == ["0", "1"]
    assert bench.work.return_between_tries() == []
    bench.work.count_again()
    await quiet()
    await bench.work.committer.touch()

    assert [job.job_id for job in bench.work.open_jobs] == ["2"]
    assert bench.deliveries() == {2: 1}
    assert [job.job_id for job in await bench.work.return_jobs()] == ["2"]
    assert bench.deliveries() == {}


async def test_partition_returned_at_once_undoes_a_delivery_between_two_tries_once(bench: Bench) -> None:
    """The deliveries of former owners, which died, stay counted."""
    await bench.open()
    bench.run(0, is_between_tries=True)
    bench.work.committer.progress.count(0)
    await quiet()
    jobs = await bench.work.return_jobs()

    assert [job.job_id for job in jobs] == ["0"]
    assert bench.deliveries() == {0: 1}


async def test_partition_that_does_not_drain_returns_no_job_between_two_tries(bench: Bench) -> None:
    """It is tried again here."""
    await bench.open()
    bench.run(0, is_between_tries=True)
    await quiet()

    assert bench.work.return_between_tries() == []
    assert len(bench.work.open_jobs) == 1


async def test_partition_returned_undoes_no_delivery_of_a_job_that_waited(bench: Bench) -> None:
    """The count of earlier owners stays."""
    await bench.open()
    bench.run(0)
    await bench.work.committer.touch()
    again = AssignedPartition(
        PartitionCommitter(JOBS, bench.broker.store(JOBS), commit_id="next", lost=lambda _: None)
    )
    await bench.work.release()
    bench.work = again
    await bench.open()
    bench.run(0, is_waiting=True)
    await quiet()
    jobs = await bench.work.return_jobs()

    assert [job.job_id for job in jobs] == ["0"]
    assert bench.deliveries() == {0: 1}


async def test_partition_returned_before_it_was_open_is_only_released(bench: Bench) -> None:
    """Nothing is committed to a partition that was not open."""
    await bench.work.return_jobs()

    assert bench.broker.commits == []
    assert bench.broker.closed == [JOBS]


async def _ignore(work: Coroutine[Any, Any, int]) -> None:
    await work
