"""Test that a control record ends a job in any state."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.wire.control import write_cancel

if TYPE_CHECKING:
    from tests.integration.stage import Stage

ENDLESS = "practice?deltas=5000&pace_ms=20"
PACE_S = 0.02


async def cancel(stage: Stage, *job_ids: str, reason: str = "no longer wanted") -> None:
    """Write control records, as `streamworker cancel` does."""
    for job_id in job_ids:
        await stage._producer.send_and_wait(
            stage.control_topic, write_cancel(job_id, reason), key=job_id.encode()
        )


async def test_cancel_ends_a_stream_within_a_second_and_keeps_its_deltas(stage: Stage) -> None:
    """The upstream's connection is closed, the terminal event has the reason, and the usage is an estimate."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", ENDLESS)
        await stage.until(lambda: stage.deltas("one") > 3)
        await cancel(stage, "one", "unknown")
        before = stage.deltas("one")
        [end] = await stage.ended("one")
        await asyncio.wait_for(stage.practice.until(lambda: stage.practice.open_streams == 0), 1)

    assert (
        end["observed"]["deltas"] - before < 1.5 / PACE_S
    )  # in deltas, because a slow machine slows them too
    assert (end["status"], end["error"]["code"], end["error"]["message"]) == (
        "cancelled",
        "cancelled",
        "no longer wanted",
    )
    assert end["usage_source"] == "estimated"
    assert stage.breaches() == []


async def test_cancel_ends_a_job_that_waits_for_its_next_try(stage: Stage) -> None:
    """A cancellation ends the backoff between two tries."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", "practice?status=503&retry_after=60")
        await stage.until(lambda: stage.all_events("one"))
        await stage.practice.until(
            lambda: [call.ended_at is not None for call in stage.calls("one")] == [True]
        )
        await cancel(stage, "one")
        [end] = await stage.ended("one")

    assert (end["status"], end["tries"]) == ("cancelled", 1)


async def test_cancel_before_the_job_is_fetched_ends_it_without_a_call(stage: Stage) -> None:
    """A worker reads the cancellations that were written before it started."""
    await stage.open()
    await stage.submit("one", ENDLESS)
    await cancel(stage, "one")
    async with stage.worker():
        [end] = await stage.ended("one")

    assert (end["status"], end["tries"], len(stage.calls("one"))) == ("cancelled", 0, 0)
    assert stage.breaches() == []


async def test_cancel_does_not_end_a_later_job_of_the_same_id(stage: Stage) -> None:
    """A cancellation applies only to jobs that were submitted before it, also where they have ended."""
    await stage.open()
    async with stage.worker(worker__dedup_records=0):
        await stage.submit("one", "practice?deltas=3")
        await stage.ended("one")
        await cancel(stage, "one")
        await asyncio.sleep(0.002)  # record timestamps are milliseconds
        await stage.submit("one", "practice?deltas=3")
        await stage.until(lambda: len(stage.calls("one")) == 2)
        await stage.until(lambda: stage.calls("one")[1].outcome is not None)

    assert [call.outcome for call in stage.calls("one")] == ["completed", "completed"]
