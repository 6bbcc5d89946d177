"""Test upstreams with limits beside others, on a broker: which jobs wait and which do not."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.practice import PracticeUpstream
from tests.integration.test_cancel import ENDLESS, cancel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.stage import InProcess, Stage

JOBS = 30


@pytest.fixture
async def other() -> AsyncIterator[PracticeUpstream]:
    """A second upstream."""
    async with PracticeUpstream() as upstream:
        yield upstream


def second(other: PracticeUpstream, **settings: object) -> dict[str, Any]:
    """Return settings that configure the second upstream as `other`."""
    given = {"base_url": other.base_url, "models": "none"} | settings
    return {f"upstreams__other__{name}": value for name, value in given.items()}


async def test_limited_upstream_delays_only_its_own_jobs(stage: Stage, other: PracticeUpstream) -> None:
    """Its jobs wait in memory, can be cancelled at once, and a drain returns them without a call."""
    await stage.open()
    async with stage.worker(
        upstreams__default__max_streams=2,
        **second(other),
        worker__max_in_flight=10,
        worker__drain_timeout_s=0.2,
    ) as worker:
        await stage.submit_many([(f"slow-{number}", ENDLESS, 0) for number in range(JOBS)])
        await stage.submit_many(
            [(f"other-{number}", "practice?deltas=2", 0) for number in range(JOBS)], upstream="other"
        )
        ends = await stage.ended(*(f"other-{number}" for number in range(JOBS)))
        assert {end["status"] for end in ends} == {"completed"}
        assert (stage.practice.open_streams, len(stage.practice.calls)) == (2, 2)
        _, detail = worker.app._readiness()
        assert detail["upstreams"]["default"]["jobs_waiting"] == JOBS - 2  # type: ignore[index]
        await cancel(stage, "slow-9", "slow-0", "slow-1")
        cancelled = await stage.ended("slow-9", "slow-0", "slow-1")
        await stage.until(lambda: stage.deltas("slow-2") and stage.deltas("slow-3"))
        await cancel(stage, "slow-2", "slow-3")
        await stage.ended("slow-2", "slow-3")
        await cancel(stage, *(f"slow-{number}" for number in range(4, 9)))
        await stage.ended(*(f"slow-{number}" for number in range(4, 9)))

    assert [end["tries"] for end in cancelled] == [0, 1, 1]
    assert stage.breaches() != []  # the other jobs have not ended: the drain returned them
    assert {len(stage.calls(f"slow-{number}")) for number in range(12, JOBS)} == {0}
    assert await stage.commit_breaches() == []


async def test_unavailable_upstream_is_not_called_and_its_jobs_fall_back(
    stage: Stage, other: PracticeUpstream
) -> None:
    """Each upstream gets an attempt of its own; while the circuit is open, jobs go to the fallback at once."""
    await stage.open()
    await other.stop()
    over: dict[str, object] = {
        "upstreams__default__base_url": "http://127.0.0.1:9/v1",
        "upstreams__default__fallback": "other",
        "upstreams__default__circuit_failure_threshold": 3,
        "upstreams__default__circuit_open_s": 60,
        "upstreams__default__max_tries": 2,
    }
    async with stage.worker(**over, **second(stage.practice, models="practice*")) as worker:
        for number in range(6):
            await stage.submit(f"job-{number}", "practice?deltas=2")
            await stage.ended(f"job-{number}")
        page = await _metrics(worker)

    ends = stage.terminals().values()
    assert {end["status"] for end in ends} == {"completed"}
    assert sorted(end["tries"] for end in ends) == [1, 1, 1, 1, 2, 3]
    assert [event["upstream"] for event in stage.all_events("job-0") if event["type"] == "started"] == [
        "default",
        "other",
    ]
    assert 'streamworker_upstream_circuit_state{upstream="default"} 2.0' in page
    assert 'streamworker_circuits_opened_total{upstream="default"} 1.0' in page
    assert stage.breaches() == []


async def test_waiting_job_whose_deadline_passes_ends_without_a_call(stage: Stage) -> None:
    """The waiting job expires, and the open stream continues."""
    await stage.open()
    async with stage.worker(upstreams__default__max_streams=1):
        await stage.submit("long", ENDLESS)
        await stage.until(lambda: stage.deltas("long"))
        await stage.submit("short", deadline=_in_a_second())
        [end] = await stage.ended("short")
        await cancel(stage, "long")
        await stage.ended("long")

    assert (end["status"], end["error"]["code"], end["tries"]) == ("expired", "deadline", 0)
    assert (end["usage"], end["usage_source"], stage.calls("short")) == (None, "none", [])
    assert stage.breaches() == []


async def test_cancelled_stream_is_read_for_its_usage_during_the_grace(stage: Stage) -> None:
    """No more deltas are published, and the usage is the report that the upstream sent."""
    await stage.open()
    async with stage.worker(upstreams__default__cancel_grace_s=20):
        await stage.submit("one", "practice?deltas=40&pace_ms=30")
        await stage.until(lambda: stage.deltas("one") > 3)
        await cancel(stage, "one")
        [end] = await stage.ended("one")
        await asyncio.wait_for(stage.practice.until(lambda: stage.practice.open_streams == 0), 1)
    [call] = stage.calls("one")

    assert (end["status"], end["usage_source"], end["usage"]) == ("cancelled", "upstream", call.usage_sent)
    assert stage.deltas("one") == end["observed"]["deltas"] < call.sent.deltas
    assert stage.breaches() == []


def _in_a_second() -> str:
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(seconds=1)).isoformat()


async def _metrics(worker: InProcess) -> str:
    from prometheus_client import generate_latest

    assert json.dumps(worker.app._readiness()[1])
    return generate_latest(worker.app.metrics.registry).decode()
