"""Test upstreams that fail at first: further tries before the first delta, restarts after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.practice import expected_text
from tests.integration.checker import text_of

if TYPE_CHECKING:
    from tests.integration.stage import Stage


async def test_upstream_that_recovers_is_called_until_it_answers(stage: Stage) -> None:
    """Two errors and one stream are one attempt with three tries, after the delay that the upstream asks for."""
    await stage.open()
    model = "practice?deltas=5&status=503&times=2&retry_after_ms=20"
    async with stage.worker():
        job = await stage.submit("one", model)
        [end] = await stage.ended("one")

    assert (end["status"], end["error"], end["tries"]) == ("completed", None, 3)
    assert [text_of(stage.events("one"), 0)] == expected_text(model, job.messages)
    assert stage.breaches() == []


async def test_empty_account_ends_the_job_after_one_call(stage: Stage) -> None:
    """A 429 for an empty account ends with code quota and is not retriable."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", "practice?status=429&code=insufficient_quota")
        [end] = await stage.ended("one")

    assert (end["status"], end["error"]["code"], end["tries"]) == ("failed", "quota", 1)
    assert end["error"]["retriable"] is False


async def test_broken_stream_restarts_with_on_break_restart(stage: Stage) -> None:
    """A new attempt with `cause` restart voids the broken one; `tries` counts the calls of both."""
    await stage.open()
    model = "practice?deltas=8&break_after=3&times=1"
    async with stage.worker():
        job = await stage.submit("one", model, on_break="restart")
        [end] = await stage.ended("one")
    events = stage.events("one")

    assert [event["cause"] for event in stage.all_events("one") if event["type"] == "started"] == [
        "new",
        "restart",
    ]
    assert (end["status"], end["tries"]) == ("completed", 2)
    assert [text_of(events, 0)] == expected_text(model, job.messages)
    assert stage.breaches() == []


async def test_broken_stream_ends_the_job_by_default(stage: Stage) -> None:
    """The job ends interrupted and keeps the deltas that were published."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", "practice?deltas=8&break_after=3")
        [end] = await stage.ended("one")

    assert (end["status"], end["error"]["code"], end["tries"]) == ("interrupted", "truncated", 1)
