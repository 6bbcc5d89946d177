"""Upstreams that fail at first: tries before the first delta, new attempts after a break."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.practice import expected_text
from tests.integration.checker import text_of

if TYPE_CHECKING:
    from tests.integration.stage import Stage


async def test_upstream_that_recovers_is_called_until_it_answers(stage: Stage) -> None:
    """Two refusals and one stream are one attempt with three tries; the delay is the upstream's."""
    await stage.open()
    model = "practice?deltas=5&status=503&times=2&retry_after_ms=20"
    async with stage.worker():
        job = await stage.submit("one", model)
        [end] = await stage.ended("one")

    assert (end["status"], end["error"], end["tries"]) == ("completed", None, 3)
    assert [text_of(stage.events("one"), 0)] == expected_text(model, job.messages)
    assert stage.breaches() == []


async def test_upstream_that_wants_no_other_try_gets_none(stage: Stage) -> None:
    """An empty account is a 429 that patience does not fill."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", "practice?status=429&code=insufficient_quota")
        [end] = await stage.ended("one")

    assert (end["status"], end["error"]["code"], end["tries"]) == ("failed", "quota", 1)
    assert end["error"]["retriable"] is False


async def test_break_restarts_the_job_that_asks_for_it(stage: Stage) -> None:
    """A new attempt with `cause` restart supersedes the half one; tries count both."""
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


async def test_break_ends_the_job_that_does_not_ask(stage: Stage) -> None:
    """Half an answer is kept and told as such."""
    await stage.open()
    async with stage.worker():
        await stage.submit("one", "practice?deltas=8&break_after=3")
        [end] = await stage.ended("one")

    assert (end["status"], end["error"]["code"], end["tries"]) == ("interrupted", "truncated", 1)
