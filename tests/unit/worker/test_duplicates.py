"""Job records that repeat an id, in a whole worker over ports in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from streamworker.errors import KafkaUnavailable
from streamworker.model import CommitPoint
from streamworker.progress.offset_map import OffsetMap, encode_map
from streamworker.wire.job import RERUN
from streamworker.worker import duplicates
from tests.turnable import until
from tests.unit.worker.bench import JOBS, job, said, word
from tests.unit.worker.test_worker import Bench

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AGAIN = ((RERUN, b"1"),)


@pytest.fixture
async def benches() -> AsyncIterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for bench in made:
        await bench.stop()


@pytest.fixture
def make(benches: list[Bench]) -> Any:
    """Return a function that makes a worker which remembers ids."""

    def make(*scripts: Any, **limits: Any) -> Bench:
        benches.append(Bench(*scripts, **{"dedup_records": 100} | limits))
        return benches[-1]

    return make


def skipped(bench: Bench) -> list[tuple[str, int, int]]:
    """Return the id and both offsets of each skipped duplicate."""
    calls: list[tuple[Any, ...]] = bench.observer.all("duplicate_skipped")
    return [(job.job_id, job.source.offset, earlier) for job, earlier in calls]


async def passed(bench: Bench, offset: int) -> None:
    """Wait until everything before this offset is committed."""
    await until(lambda: JOBS in bench.broker.points and bench.broker.points[JOBS].offset == offset)


async def test_record_that_repeats_an_id_is_skipped_and_its_offset_committed(make: Any) -> None:
    """The job has one call and one ending; the duplicate is reported with both offsets."""
    bench: Bench = make()
    for job_id in ("j", "other", "j"):
        bench.source.put(JOBS, job(job_id))
    await bench.start(JOBS)
    await passed(bench, 3)

    assert len(bench.upstream.calls) == 2
    assert bench.ends() == {"j": "completed", "other": "completed"}
    assert skipped(bench) == [("j", 2, 0)]
    assert bench.observer.all("record_skipped") == []


async def test_duplicate_of_a_job_that_still_runs_is_skipped_before_the_job_ends(make: Any) -> None:
    """Its offset is in the map of the commit, so that the next owner skips it too."""
    gate = asyncio.Event()
    bench: Bench = make([word("a"), gate, *said("b")])
    bench.source.put(JOBS, job("j"))
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await until(lambda: skipped(bench))
    assert bench.ends() == {}
    gate.set()
    await passed(bench, 2)

    assert bench.ends() == {"j": "completed"}
    assert len(bench.upstream.calls) == 1


async def test_worker_that_remembers_no_ids_runs_each_record(make: Any) -> None:
    """`worker.dedup_records = 0` turns it off."""
    bench: Bench = make(dedup_records=0)
    bench.source.put(JOBS, job("j"))
    bench.source.put(JOBS, job("j"))
    await bench.start(JOBS)
    await passed(bench, 2)

    assert len(bench.upstream.calls) == 2


async def test_rerun_is_run_and_a_record_after_it_is_its_duplicate(make: Any) -> None:
    """The header asks for a new run; the new run is remembered like any other."""
    bench: Bench = make(dedup_records=1)
    for headers in ((), AGAIN, AGAIN, ()):
        bench.source.put(JOBS, job("j"), headers=headers)
    await bench.start(JOBS)
    await passed(bench, 4)

    assert len(bench.upstream.calls) == 3
    assert skipped(bench) == [("j", 3, 2)]


async def test_jobs_without_ids_are_all_run(make: Any) -> None:
    """Their ids come from their coordinates."""
    bench: Bench = make()
    for _ in range(3):
        bench.source.put(JOBS, job())
    await bench.start(JOBS)
    await passed(bench, 3)

    assert len(bench.upstream.calls) == 3


@pytest.mark.parametrize(
    "rejected",
    [{"upstream": "unknown"}, {"reply_to": "forbidden"}, {"stranger": 1}],
    ids=lambda it: next(iter(it)),
)
async def test_rejected_record_does_not_block_a_later_valid_one(make: Any, rejected: dict[str, Any]) -> None:
    """The sender may correct a job and submit it under its id, also after the partition has moved."""
    bench: Bench = make()
    bench.source.put(JOBS, job("j", **rejected))
    bench.source.put(JOBS, job("k", **rejected))
    await bench.start(JOBS)
    await passed(bench, 2)
    bench.source.put(JOBS, job("j"))
    await passed(bench, 3)
    bench.source.assign()
    bench.source.assign(JOBS)
    bench.source.put(JOBS, job("k"))
    await passed(bench, 4)

    assert len(bench.upstream.calls) == 2
    assert skipped(bench) == []


async def test_next_owner_reads_the_ids_back_and_skips_a_duplicate(make: Any) -> None:
    """A partition that moves keeps its memory, as far back as the setting says."""
    bench: Bench = make(dedup_records=3)
    for job_id in ("old", "j", "k", "l"):
        bench.source.put(JOBS, job(job_id))
    bench.broker.points[JOBS] = CommitPoint(4)
    await bench.start(JOBS)
    for job_id in ("j", "old"):
        bench.source.put(JOBS, job(job_id))
    await passed(bench, 6)

    assert skipped(bench) == [("j", 4, 1)]
    assert bench.ends() == {"old": "completed"}


async def test_finished_record_beyond_the_committed_offset_is_remembered(make: Any) -> None:
    """Its job ended under the former owner; a record that repeats its id is a duplicate."""
    bench: Bench = make()
    for job_id in ("open", "j", "j"):
        bench.source.put(JOBS, job(job_id))
    bench.broker.points[JOBS] = CommitPoint(0, encode_map(0, OffsetMap(frozenset({1}))))
    await bench.start(JOBS)
    await passed(bench, 3)

    assert bench.ends() == {"open": "completed"}
    assert skipped(bench) == [("j", 2, 1)]


async def test_duplicate_that_has_begun_under_a_former_owner_gets_its_ending(make: Any) -> None:
    """That owner did not know the earlier record and died; readers have the `started` of the second one."""
    bench: Bench = make()
    for _ in range(3):
        bench.source.put(JOBS, job("j"))
    bench.broker.points[JOBS] = CommitPoint(1, encode_map(1, OffsetMap(deliveries={1: 1})))
    await bench.start(JOBS)
    await passed(bench, 3)

    assert bench.ends() == {"j": "completed"}
    assert skipped(bench) == [("j", 2, 1)]


async def test_partition_whose_ids_cannot_be_read_opens_and_keeps_what_was_read(make: Any) -> None:
    """The failure is logged, and jobs run: a job is run twice rather than not at all."""
    bench: Bench = make()
    for job_id in ("j", "k"):
        bench.source.put(JOBS, job(job_id))
    bench.broker.points[JOBS] = CommitPoint(2)
    bench.source.read_back_errors.append(KafkaUnavailable("no broker"))
    with capture_logs() as lines:
        await bench.start(JOBS)
        for job_id in ("j", "k"):
            bench.source.put(JOBS, job(job_id))
        await passed(bench, 4)

    assert [line["reason"] for line in lines if line["event"] == "partition.ids_not_read"] == ["no broker"]
    assert bench.ends() == {"k": "completed"}
    assert skipped(bench) == [("j", 2, 0)]


async def test_partition_with_large_records_reads_back_a_bounded_number_of_bytes(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says so, and the partition opens."""
    monkeypatch.setattr(duplicates, "READ_BACK_BYTES", 150)
    bench: Bench = make()
    for job_id in ("j", "k"):
        bench.source.put(JOBS, job(job_id))
    bench.broker.points[JOBS] = CommitPoint(2)
    with capture_logs() as lines:
        await bench.start(JOBS)

    assert [line["reason"] for line in lines if line["event"] == "partition.ids_not_read"] == [
        "the records have more than 150 bytes"
    ]


async def test_partition_with_large_records_knows_the_ids_of_its_last_ones(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry repeats one of the last records, so their ids are read and not those of the first ones alone."""
    monkeypatch.setattr(duplicates, "READ_BACK_BYTES", 3 * len(job("a")))
    bench: Bench = make()
    for job_id in "abcdef":
        bench.source.put(JOBS, job(job_id))
    bench.source.put(JOBS, job("f"))
    bench.broker.points[JOBS] = CommitPoint(6)
    await bench.start(JOBS)
    await passed(bench, 7)

    assert skipped(bench)
    assert bench.sink.records == []


async def test_job_given_back_is_run_although_its_duplicate_was_skipped(make: Any) -> None:
    """A partition that is promised and stays delivers the same offset again, which is not a duplicate."""
    gate = asyncio.Event()
    bench: Bench = make([word("a"), gate, *said("b")], said("c"), in_key_order=True)
    for job_id in ("first", "j", "j"):
        bench.source.put(JOBS, job(job_id), key=b"k")
    await bench.start(JOBS)
    await until(lambda: bench.sink.records and skipped(bench))
    bench.source.assign(JOBS, promised=[JOBS])
    await until(lambda: bench.observer.all("job_abandoned"))
    bench.source.assign(JOBS)
    gate.set()
    await passed(bench, 3)

    assert bench.ends() == {"first": "completed", "j": "completed"}
    assert len(bench.upstream.calls) == 2
    assert skipped(bench) == [("j", 2, 1)]
