"""Static members of the group (KIP-345), as the pods of the chart's StatefulSet are."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest

from streamworker.telemetry.metrics import PREFIX
from tests.integration.stage import InProcess, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import Callable


def shown(worker: InProcess, name: str) -> float:
    return worker.app.metrics.registry.get_sample_value(PREFIX + name) or 0.0


def owns(worker: InProcess, count: int) -> Callable[[], bool]:
    return lambda: shown(worker, "partitions_owned") == count and shown(worker, "ready") == 1


async def test_static_member_that_comes_back_in_time_causes_no_rebalance(apache: Stage) -> None:
    """Its successor with the same instance id is assigned the same partition, and the other member does not rebalance."""
    await apache.open(partitions=2)
    session = {"worker__session_timeout_s": 20}
    async with apache.worker(worker__group_instance_id="ns.w-0", **session) as first:
        await eventually(owns(first, 2))
        async with apache.worker(worker__group_instance_id="ns.w-1", **session) as second:
            await eventually(owns(second, 1))
            await eventually(owns(first, 1))
            before = shown(first, "rebalances_total")
        async with apache.worker(worker__group_instance_id="ns.w-1", **session) as successor:
            await eventually(owns(successor, 1))
            for partition in (0, 1):
                await apache.submit(f"j{partition}", "practice?deltas=3", partition=partition)
            await apache.ended()
            assert shown(first, "rebalances_total") == before
    assert apache.breaches() == []


async def test_static_member_that_stops_while_partitions_move_leaves_the_group(apache: Stage) -> None:
    """What was promised to it accepts jobs again at once. The group would otherwise wait for it, for up to a session."""
    await apache.open(partitions=2)
    session = {"worker__session_timeout_s": 20}
    async with apache.worker(worker__group_instance_id="ns.w-0", **session) as first:
        await eventually(owns(first, 2))
        jobs = [f"j{partition}" for partition in (0, 1)]
        await apache.submit_many(
            [(job_id, "practice?deltas=100&pace_ms=50", number) for number, job_id in enumerate(jobs)]
        )
        await apache.until(lambda: all(apache.deltas(job_id) for job_id in jobs))
        async with apache.worker(worker__group_instance_id="ns.w-1", **session):
            await eventually(lambda: shown(first, "moves_waiting") == 1)
        await eventually(lambda: shown(first, "moves_waiting") == 0, 4)
        assert shown(first, "partitions_owned") == 2
        await apache.submit_many([(f"more-{number}", "practice?deltas=2", number) for number in (0, 1)])
        await apache.ended("more-0", "more-1", limit_s=4)
        assert not set(jobs) & apache.terminals().keys()  # it was not the end of the jobs that made it so
    assert apache.breaches() == []


@pytest.mark.long
async def test_worker_that_is_fenced_by_its_instance_id_ends_and_the_other_one_continues(
    apache: Stage,
) -> None:
    """Two workers with one id: the first one closes its streams and names the id; it does not join again (KIP-345)."""
    await apache.open(partitions=2)
    first = await apache.process(worker__group_instance_id="twin", worker__session_timeout_s=20)
    jobs = [(f"job-{number}", "practice?deltas=110&pace_ms=100", number % 2) for number in range(8)]
    await apache.submit_many(jobs)
    await apache.until(lambda: all(apache.deltas(job_id) > 2 for job_id, *_ in jobs))
    second = await apache.process(worker__group_instance_id="twin", worker__session_timeout_s=20)

    assert await first.exit_code() == 1
    assert "worker.group_instance_id twin (FENCED_INSTANCE_ID)" in first.tail()
    await apache.submit_many([(f"more-{number}", "practice?deltas=2", number % 2) for number in range(4)])
    await apache.ended()
    assert second.is_running
    assert len(apache.practice.calls) == 8 + 8 + 4  # the jobs in flight at that moment once more
    assert apache.breaches() == []


@pytest.mark.long
async def test_static_member_whose_session_expired_joins_again(apache: Stage) -> None:
    """It was suspended, and no other process took its id, so it must not end."""
    await apache.open()
    worker = await apache.process(worker__group_instance_id="alone")
    await apache.submit("before", "practice?deltas=2")
    await apache.ended("before")
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(8)  # longer than the session
    worker.signal(signal.SIGCONT)
    await apache.submit("after", "practice?deltas=2")
    await apache.ended("after")

    assert worker.is_running


@pytest.mark.long
async def test_workers_that_start_at_once_keep_their_member_ids(apache: Stage) -> None:
    """Partitions open while others join. A member that gave up its id would hold up the group for a whole session."""
    await apache.open(partitions=16)
    workers = [await apache.process(worker__session_timeout_s=20) for _ in range(5)]

    def is_settled() -> bool:
        changes = [worker.lines("partitions.changed") for worker in workers]
        return all(changes) and sum(lines[-1]["owned"] for lines in changes) == 16

    await eventually(is_settled, 15)
    messages = [str(line["message"]) for worker in workers for line in worker.lines("library.logged")]
    assert [text for text in messages if "not recognized" in text or "not  current" in text] == []
