"""Commits that fail for long: no new call is started, and the worker is not ready."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.integration.stage import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.stage import Stage

_CLOCK = """
import pathlib, time
from aiokafka import AIOKafkaProducer
import streamworker.worker.committer as committer

wrong, send = pathlib.Path({flag!r}), AIOKafkaProducer.send

async def send_later(self, *arguments, **named):
    if wrong.exists():
        named["timestamp_ms"] = int(1000 * (time.time() + 7200))
    return await send(self, *arguments, **named)

AIOKafkaProducer.send = send_later
committer.STALLED_S = 1.0
"""


@pytest.mark.long
async def test_commits_that_are_refused_start_no_new_calls(apache: Stage, tmp_path: Path) -> None:
    """The clock of a worker is two hours ahead: readiness is withdrawn, and the log has the broker's reason."""
    flag = tmp_path / "wrong"
    apache.bug = _CLOCK.format(flag=str(flag))
    await apache.open()
    worker = await apache.process()
    [line] = await worker.logged("probes.listening")

    async def failing() -> list[str]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{line['port']}") as client:
            found: list[str] = (await client.get("/readyz")).json()["detail"].get("commits_failing", [])
            return found

    await apache.submit("before", "practice?deltas=2")
    await apache.ended("before")
    flag.touch()
    await apache.submit("refused", "practice?deltas=2")
    while not await failing():  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.1)
    await apache.submit_many([(f"later-{number}", "practice?deltas=2", 0) for number in range(10)])
    await asyncio.sleep(2)

    assert len(apache.practice.calls) == 2
    assert await failing() == [f"{apache.jobs_topic}-0"]
    reasons = [line["reason"] for line in worker.lines("commit.transaction_failed")]
    assert any("is this machine's clock right?" in reason for reason in reasons)
    flag.unlink()
    await apache.ended()
    await eventually(lambda: worker.lines("commit.recovered"))
    assert await failing() == []
    assert len(apache.practice.calls) == 12
    assert apache.breaches() == []


async def test_commit_that_the_topic_refuses_for_its_size_is_written_in_halves(apache: Stage) -> None:
    """The events topic accepts less than at the start: each record fits, and many terminal events at once do not."""
    await apache.open(events_partitions=1)
    worker = await apache.process()
    await worker.logged("worker.started")
    await apache.set_topic(apache.events_topic, max_message_bytes="2500")
    await apache.submit_many([(f"job-{number}", "practice?deltas=1", 0) for number in range(60)])
    ends = await apache.ended()

    assert {end["status"] for end in ends} == {"completed"}
    assert len(apache.practice.calls) == 60
    refused = [line["entries"] for line in worker.lines("commit.record_refused")]
    assert refused
    assert min(refused) > 1
    assert apache.breaches() == []
