"""A broker that hangs: its connections stay open, and no request is answered."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest
from structlog.testing import capture_logs

from streamworker.kafka import compat
from streamworker.kafka.answers import SilentBrokers
from tests.integration.gateway_here import Gateway
from tests.integration.stage import Stage, eventually
from tests.integration.test_cli import Cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from structlog.typing import EventDict

    from tests.brokers.apache import ApacheKafka


@pytest.fixture(autouse=True)
def _no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the outages of other tests."""
    monkeypatch.setattr(compat, "_silent", SilentBrokers())


@pytest.fixture
def hanging(apache_kafka: ApacheKafka) -> Iterator[ApacheKafka]:
    """A broker that is resumed after the test."""
    yield apache_kafka
    apache_kafka.resume()


def outages(logs: list[EventDict]) -> list[str]:
    """Return the events about brokers that do not answer."""
    return [line["event"] for line in logs if line["event"] in {"kafka.not_answering", "kafka.answering"}]


@pytest.mark.parametrize("kind", ["worker", "gateway"])
async def test_broker_that_hangs_is_reported_within_three_seconds_and_when_it_answers(
    apache: Stage, hanging: ApacheKafka, kind: str
) -> None:
    """The time limit of the requests is much longer. Both have fetches open at any time, and one line names them."""
    await apache.open()
    async with AsyncExitStack() as stack:
        with capture_logs() as logs:
            if kind == "worker":
                await stack.enter_async_context(apache.worker())
                await eventually(lambda: "worker.started" in [line["event"] for line in logs])
            else:
                await stack.enter_async_context(Gateway(apache))
            hanging.pause()
            paused_at = time.monotonic()
            await eventually(lambda: outages(logs))
            waited_s = time.monotonic() - paused_at
            await asyncio.sleep(1)  # the other connections are overdue as well
            hanging.resume()
            await eventually(lambda: "kafka.answering" in outages(logs))

    assert waited_s < 3.5
    assert outages(logs) == ["kafka.not_answering", "kafka.answering"]
    lines = [line for line in logs if line["event"] in outages(logs)]
    assert {line["broker"] for line in lines} == {apache.broker.bootstrap}
    assert lines[1]["silent_s"] >= 3


@pytest.mark.long
@pytest.mark.parametrize("command", ["tail", "submit"])
async def test_command_reports_a_broker_that_hangs(apache: Stage, hanging: ApacheKafka, command: str) -> None:
    """On standard error, while it waits: `tail` follows a job, `submit` has not connected."""
    await apache.open()
    names = {"JOBS": apache.jobs_topic, "EVENTS": apache.events_topic, "CONTROL": apache.control_topic}
    cli = Cli(
        {f"STREAMWORKER_TOPICS__{name}": topic for name, topic in names.items()}
        | {"STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": apache.broker.bootstrap}
    )
    process = await cli.start("tail", "job-1") if command == "tail" else None
    assert process is None or process.stderr is not None
    if process is not None and process.stderr is not None:
        assert b"waiting" in await process.stderr.readline()
    hanging.pause()
    if process is None:
        process = await cli.start("submit", "-m", "practice", "hi")
    assert process.stderr is not None
    try:
        async with asyncio.timeout(15):
            text = b""
            while b"[warning" not in text:
                text += await process.stderr.readline()
    finally:
        process.kill()
        await process.communicate()

    event = b"kafka.not_answering" if command == "tail" else b"kafka.connecting"
    assert event in text
    assert b"check" in text
