"""Commands at a Kafka that cannot do what they ask: they say so within seconds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_cli import Cli

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.brokers.apache import ApacheKafka


@pytest.mark.parametrize(
    ("command", "topic"),
    [
        (["submit", "-m", "practice", "hi"], "JOBS"),
        (["cancel", "j"], "CONTROL"),
        (["tail", "j"], "EVENTS"),
        (["audit"], "EVENTS"),
        (["retry", "--status", "failed"], "EVENTS"),
        (["dlq", "list"], "DLQ"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
async def test_command_without_its_topic_names_it_within_seconds(
    apache_kafka: ApacheKafka, topics: Callable[[str], str], command: list[str], topic: str
) -> None:
    """A broker without auto-creation reports the missing topic; the command does not wait for it."""
    names = {
        f"STREAMWORKER_TOPICS__{name}": topics(name.lower()) for name in ("JOBS", "EVENTS", "CONTROL", "DLQ")
    }
    cli = Cli({**names, "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": apache_kafka.bootstrap})
    began = asyncio.get_running_loop().time()
    result = await cli(*command)

    assert asyncio.get_running_loop().time() - began < 8
    assert result.code == 1
    assert f"topic {names[f'STREAMWORKER_TOPICS__{topic}']} does not exist" in result.err
