"""Partitions move between workers under continuous load on Apache Kafka, and no upstream is called twice."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from tests.integration.stage import InProcess, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.long

PARTITIONS = 6
JOB_S = 3.0
MODEL = "practice?deltas=30&pace_ms=100"  # takes JOB_S
SLACK_S = 5.0
"""How much longer than its longest stream a partition may need to move."""


class Fleet(AsyncExitStack):
    """Workers of one group in this process. The test starts and drains them while jobs are submitted."""

    def __init__(self, stage: Stage, *, is_static: bool, **settings: object) -> None:
        super().__init__()
        self._stage = stage
        self._is_static = is_static
        self._settings = settings
        self.workers: dict[str, InProcess] = {}

    async def join(self, *names: str) -> None:
        """Start workers at once, and wait until all of them are ready."""
        for name in names:
            static = {"worker__group_instance_id": name} if self._is_static else {}
            worker = self._stage.worker(**static, **self._settings)
            self.workers[name] = await self.enter_async_context(worker)
        await eventually(lambda: all(self.details(name).get("joined") for name in names))

    async def leave(self, name: str) -> None:
        """Drain a worker to its end."""
        await self.workers.pop(name).drained()

    async def restart(self, name: str) -> None:
        """Replace a worker as a rolling restart does: the next process starts when the former one has ended."""
        await self.leave(name)
        await self.join(name)

    async def settle(self) -> None:
        """Wait until every partition has an owner and none is promised."""
        await eventually(self._is_settled, what=lambda: {name: self.details(name) for name in self.workers})

    def details(self, name: str) -> dict[str, Any]:
        """Return what `/readyz` of a worker shows."""
        return self.workers[name].app._readiness()[1]

    def _is_settled(self) -> bool:
        states = [self.details(name) for name in self.workers]
        counts = [state.get("partitions", 0) for state in states]
        is_moving = any(
            state.get("partitions_promised") or state.get("partitions_opening") for state in states
        )
        return sum(counts) == PARTITIONS and max(counts) - min(counts) <= 1 and not is_moving


@asynccontextmanager
async def load(stage: Stage, *, every_s: float = 0.15, model: str = MODEL) -> AsyncIterator[None]:
    """Submit jobs to all partitions in turn until the block ends, then wait for all of them."""

    async def submit() -> None:
        number = 0
        while True:
            await stage.submit(f"job-{number}", model, partition=number % PARTITIONS)
            number += 1
            await asyncio.sleep(every_s)

    submitting = asyncio.create_task(submit())
    try:
        yield
    finally:
        submitting.cancel()
        await asyncio.wait([submitting])
    await stage.ended()


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


def moves(logs: list[Any]) -> list[Any]:
    return [line for line in logs if line["event"] == "partition.moved"]


def cuts(logs: list[Any]) -> list[Any]:
    return [line for line in logs if line["event"] == "partition.streams_cut"]


def calls_of(stage: Stage) -> dict[str, int]:
    """Return the number of calls of each job that does not have exactly one."""
    counts = {job.job_id: len(stage.calls(job.job_id)) for job in stage.jobs}
    return {job_id: count for job_id, count in counts.items() if count != 1}


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_rolling_restart_under_load_calls_the_upstream_once_per_job(
    apache: Stage, logs: list[Any], delivery: str, *, is_static: bool
) -> None:
    """Every worker drains for longer than a job, and its successor joins when it has ended."""
    await apache.open(partitions=PARTITIONS)
    async with Fleet(apache, is_static=is_static, worker__delivery=delivery) as fleet:
        await fleet.join("a", "b", "c")
        await fleet.settle()
        async with load(apache):
            await asyncio.sleep(JOB_S)
            for name in ("a", "b", "c"):
                await fleet.restart(name)
            await fleet.settle()

    assert calls_of(apache) == {}
    assert cuts(logs) == []
    assert apache.breaches() == []
    assert all(line["waited_s"] < JOB_S + SLACK_S for line in moves(logs))


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_scaling_out_and_in_under_load_calls_the_upstream_once_per_job(
    apache: Stage, logs: list[Any], delivery: str
) -> None:
    """One worker, three, six, then two."""
    await apache.open(partitions=PARTITIONS)
    async with Fleet(apache, is_static=False, worker__delivery=delivery) as fleet:
        await fleet.join("a")
        await fleet.settle()
        async with load(apache):
            await asyncio.sleep(JOB_S)
            await fleet.join("b", "c")
            await fleet.settle()
            await fleet.join("d", "e", "f")
            await fleet.settle()
            await asyncio.gather(*(fleet.leave(name) for name in "abef"))
            await fleet.settle()

    assert calls_of(apache) == {}
    assert cuts(logs) == []
    assert apache.breaches() == []
    assert len(moves(logs)) >= 5
    assert all(line["waited_s"] < JOB_S + SLACK_S for line in moves(logs))


async def test_worker_that_joins_and_leaves_again_and_again_costs_no_call(
    apache: Stage, logs: list[Any]
) -> None:
    """As an autoscaler does that changes its mind."""
    await apache.open(partitions=PARTITIONS)
    async with Fleet(apache, is_static=False) as fleet:
        await fleet.join("a")
        await fleet.settle()
        async with load(apache):
            for _ in range(3):
                await fleet.join("b")
                await asyncio.sleep(JOB_S)
                await fleet.leave("b")
            await fleet.settle()

    assert calls_of(apache) == {}
    assert cuts(logs) == []
    assert apache.breaches() == []


async def test_job_longer_than_the_move_timeout_is_cut_and_no_other(apache: Stage, logs: list[Any]) -> None:
    """Its partition moves with it; the next owner runs it again."""
    await apache.open(partitions=PARTITIONS)
    async with Fleet(apache, is_static=False, worker__move_timeout_s=4) as fleet:
        await fleet.join("a")
        await fleet.settle()
        long = await apache.submit("long", "practice?deltas=150&pace_ms=100", partition=0)
        async with load(apache):
            await asyncio.sleep(JOB_S)
            await fleet.join("b")
            await fleet.settle()

    assert calls_of(apache) == {long.job_id: 2}
    assert [(line["partition"], line["streams"]) for line in cuts(logs)] == [(f"{apache.jobs_topic}-0", 1)]
    assert apache.breaches() == []


async def test_new_job_of_a_draining_worker_starts_elsewhere_within_seconds(apache: Stage) -> None:
    """Its idle partitions move at once, although a stream of another one keeps it busy."""
    await apache.open(partitions=PARTITIONS)
    async with Fleet(apache, is_static=False) as fleet:
        await fleet.join("a")
        await fleet.settle()
        await apache.submit("long", "practice?deltas=100&pace_ms=100", partition=0)
        await apache.until(lambda: apache.deltas("long"))
        await fleet.join("b")
        await eventually(lambda: fleet.details("b").get("partitions") == PARTITIONS // 2)
        leaving = asyncio.create_task(fleet.leave("a"))
        await asyncio.sleep(0.1)
        await apache.submit_many([(f"job-{number}", "practice", number) for number in range(1, PARTITIONS)])
        await apache.ended(*(f"job-{number}" for number in range(1, PARTITIONS)), limit_s=6)
        assert not leaving.done()
        await apache.ended("long")
        await leaving

    assert calls_of(apache) == {}
