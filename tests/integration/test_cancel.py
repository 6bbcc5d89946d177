"""A control record ends a job wherever it is."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from streamworker.wire.control import write_cancel

if TYPE_CHECKING:
    from tests.integration.stage import Stage

ENDLESS = "practice?deltas=5000&pace_ms=20"


async def cancel(stage: Stage, *job_ids: str, reason: str = "no longer wanted") -> None:
    """Write control records, as `streamworker cancel` does."""
    for job_id in job_ids:
        await stage._producer.send_and_wait(
            stage.control_topic, write_cancel(job_id, reason), key=job_id.encode()
        )


async def test_cancel_ends_a_stream_within_a_second_and_keeps_what_came(stage: Stage) -> None:
    """The upstream's connection is closed, the reason told, the usage so far an estimate."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", ENDLESS)
        await stage.until(lambda: stage.deltas("one") > 3)
        begun = time.monotonic()
        await cancel(stage, "one", "unknown")
        [end] = await stage.ended("one")
        took_s = time.monotonic() - begun
        await asyncio.wait_for(stage.practice.until(lambda: stage.practice.open_streams == 0), 1)

    assert took_s < 1.5
    assert (end["status"], end["error"]["code"], end["error"]["message"]) == (
        "cancelled",
        "cancelled",
        "no longer wanted",
    )
    assert end["usage_source"] == "estimated"
    assert stage.breaches() == []


async def test_cancel_ends_a_job_that_waits_for_its_next_try(stage: Stage) -> None:
    """Backing off is no hiding place."""
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


async def test_cancel_that_comes_before_the_job_is_fetched_ends_it_without_a_call(stage: Stage) -> None:
    """A worker that starts late reads the cancellations that were before it."""
    await stage.open()
    await stage.submit("one", ENDLESS)
    await cancel(stage, "one")
    async with stage.worker():
        [end] = await stage.ended("one")

    assert (end["status"], end["tries"], len(stage.calls("one"))) == ("cancelled", 0, 0)
    assert stage.breaches() == []


async def test_cancel_spares_a_job_that_is_submitted_later_under_the_same_id(stage: Stage) -> None:
    """Ids may be used again."""
    await stage.open()
    await cancel(stage, "one")
    await asyncio.sleep(0.002)  # record timestamps are milliseconds
    async with stage.worker():
        await stage.submit("one", "practice?deltas=3")
        [end] = await stage.ended("one")

    assert end["status"] == "completed"
