"""Test `worker.ordering = "key"`: jobs of one record key run one after another, jobs of other keys in parallel."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.stage import Stage

KEYS = ("blue", "green", "red")
JOBS_PER_KEY = 4


async def submit_keyed(stage: Stage, model: str, partitions: int = 1) -> list[str]:
    """Write jobs of three keys in turn; return their ids."""
    job_ids = []
    for number in range(JOBS_PER_KEY):
        for place, key in enumerate(KEYS):
            job_id = f"{key}-{number}"
            request = {"model": model, "messages": stage.message(job_id)}
            value = json.dumps({"job_id": job_id, "request": request}).encode()
            await stage.submit_bytes(value, key=key.encode(), partition=place % partitions)
            job_ids.append(job_id)
    return job_ids


def overlaps(stage: Stage) -> list[str]:
    """Return the jobs whose first call started before the last call of the previous job of their key ended."""
    found = []
    for key in KEYS:
        for number in range(1, JOBS_PER_KEY):
            before, after = stage.calls(f"{key}-{number - 1}"), stage.calls(f"{key}-{number}")
            ends = [call.ended_at for call in before]
            if None in ends or min(call.started_at for call in after) < max(
                end for end in ends if end is not None
            ):
                found.append(f"{key}-{number}")
    return found


async def test_jobs_of_one_key_run_in_order_and_keys_in_parallel(stage: Stage) -> None:
    """Jobs of one key do not overlap; one job per key runs at a time."""
    await stage.open()
    async with stage.worker(worker__ordering="key"):
        job_ids = await submit_keyed(stage, "practice?deltas=5&pace_ms=10")
        ends = await stage.ended(*job_ids)

    assert {end["status"] for end in ends} == {"completed"}
    assert overlaps(stage) == []
    assert stage.practice.max_open == len(KEYS)


async def test_order_of_a_key_holds_through_a_rebalance(apache: Stage) -> None:
    """The next owner of a partition starts with the first unfinished job of each key, and repeats none."""
    await apache.open(partitions=3)
    async with apache.worker(worker__ordering="key", worker__session_timeout_s=6):
        job_ids = await submit_keyed(apache, "practice?deltas=10&pace_ms=80", partitions=3)
        await apache.until(
            lambda: apache.deltas("blue-0") and apache.deltas("green-0") and apache.deltas("red-0")
        )
        async with apache.worker(worker__ordering="key", worker__session_timeout_s=6) as second:
            ends = await apache.ended(*job_ids)
            moved = second.app.metrics.registry.get_sample_value("streamworker_partitions_owned")

    assert {end["status"] for end in ends} == {"completed"}
    assert overlaps(apache) == []
    assert sum(len(apache.calls(job_id)) for job_id in job_ids) == len(job_ids)
    assert moved, "no partition moved"


async def test_jobs_that_wait_at_a_drain_are_returned_without_a_delivery(apache: Stage) -> None:
    """A returned job does not count as delivered: with `max_deliveries` 1 the next worker completes it."""
    await apache.open()
    async with apache.worker(worker__ordering="key", worker__max_deliveries=1):
        job_ids = await submit_keyed(apache, "practice?deltas=20&pace_ms=20")
        await apache.until(lambda: apache.deltas("blue-0"))
    assert len(apache.terminals()) < len(job_ids)
    async with apache.worker(worker__ordering="key", worker__max_deliveries=1):
        ends = await apache.ended(*job_ids)

    assert {end["status"] for end in ends} == {"completed"}
    assert all(len(apache.calls(job_id)) == 1 for job_id in job_ids)
