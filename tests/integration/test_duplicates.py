"""Jobs that are submitted twice under one id, on Apache Kafka."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import RecordsToDelete

from streamworker.wire.job import RERUN
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from tests.integration.stage import InProcess, Stage


def _skipped(worker: InProcess) -> float | None:
    return worker.app.metrics.registry.get_sample_value("streamworker_duplicates_skipped_total")


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_job_submitted_twice_runs_once_also_when_another_worker_takes_over(
    apache: Stage, delivery: str
) -> None:
    """One upstream call and one ending for three records: two in a row, and one after the partition has moved."""
    await apache.open()
    async with apache.worker(worker__delivery=delivery) as first:
        await apache.submit("job", "practice?deltas=3")
        await apache.submit("job", "practice?deltas=3")
        await apache.submit("next", "practice?deltas=3")
        await apache.ended()
        assert _skipped(first) == 1
    async with apache.worker(worker__delivery=delivery) as second:
        await apache.submit("job", "practice?deltas=3")
        await apache.submit("last", "practice?deltas=3")
        await apache.ended()
        assert _skipped(second) == 1

    assert {job_id: len(apache.calls(job_id)) for job_id in ("job", "next", "last")} == {
        "job": 1,
        "next": 1,
        "last": 1,
    }
    assert apache.breaches() == []


@pytest.mark.parametrize(
    ("headers", "dedup_records"), [([(RERUN, b"1")], 1000), ([], 0)], ids=["rerun", "no-memory"]
)
async def test_job_submitted_twice_runs_twice_with_the_header_or_without_memory(
    apache: Stage, headers: list[tuple[str, bytes]], dedup_records: int
) -> None:
    """A new run has its own call and its own ending."""
    await apache.open()
    async with apache.worker(worker__dedup_records=dedup_records) as worker:
        await apache.submit("job", "practice?deltas=3")
        await apache.submit("job", "practice?deltas=3", headers=headers)
        await eventually(lambda: [event["type"] for event in apache.all_events("job")].count("usage") == 2)
        assert _skipped(worker) == 0

    assert len(apache.calls("job")) == 2


async def test_ids_are_read_back_from_a_log_that_begins_within_the_window(
    apache: Stage,
) -> None:
    """Retention deleted records of the window: the others are read, and a deleted one is not known."""
    await apache.open()
    async with apache.worker():
        await apache.submit_many([(f"job-{number}", "practice?deltas=1", 0) for number in range(30)])
        await apache.ended()
    at = KafkaTopicPartition(apache.jobs_topic, 0)
    await apache._admin.delete_records({at: RecordsToDelete(before_offset=10)})
    async with apache.worker(worker__dedup_records=25) as second:
        await apache.submit_many([(f"job-{number}", "practice?deltas=1", 0) for number in (9, 10, 29)])
        await apache.submit("last", "practice?deltas=1")
        await apache.ended("last")
        await eventually(lambda: len(apache.calls("job-9")) == 2)
        assert _skipped(second) == 2

    assert {len(apache.calls(f"job-{number}")) for number in (10, 29)} == {1}
