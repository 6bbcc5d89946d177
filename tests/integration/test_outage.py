"""The clients of a broker that is away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import conn

from streamworker.demo.broker import EmbeddedBroker
from streamworker.kafka.compat import client_of
from streamworker.kafka.log import open_log
from streamworker.kafka.topics import open_admin
from streamworker.model import TopicPartition
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.practice import PracticeUpstream

pytestmark = pytest.mark.embedded


@pytest.mark.usefixtures("embedded_broker")  # skips where it cannot run
async def test_reader_of_a_partition_without_leader_and_broker_connects_a_few_times_a_second(
    practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker reads the control topic: retrying at once would take the processor of its streams."""
    connect, tries = conn.create_conn, 0

    async def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal tries
        tries += 1
        return await connect(*arguments, **named)

    monkeypatch.setattr(conn, "create_conn", counted)
    with EmbeddedBroker() as broker:
        settings = Stage(broker, practice, topics, tmp_path).settings()
        topic = settings.topics.control
        async with open_admin(settings) as admin:
            await admin.create(partitions=1)
        async with open_log(settings.kafka, topic) as log:
            await asyncio.to_thread(broker.stop)
            leaders = client_of(log.consumer).cluster._partitions
            # The metadata of a partition that was just created, or whose leader has gone.
            leaders[topic] = {0: leaders[topic][0]._replace(leader=-1)}
            reading = asyncio.ensure_future(anext(log.follow([TopicPartition(topic, 0)])))
            tries = 0
            await eventually(lambda: tries)
            await asyncio.sleep(1)
            in_a_second = tries
            reading.cancel()
            await asyncio.wait([reading])

    assert in_a_second <= 10
