"""A stage per test, on either broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from tests.integration.secured import Acls
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from streamworker.practice import PracticeUpstream
    from tests.brokers.apache import ApacheKafka
    from tests.conftest import Broker


@pytest.fixture
async def stage(
    broker: Broker, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[Stage]:
    """A stage on each broker in turn; the test opens it."""
    async with Stage(broker, practice, topics, tmp_path) as stage:
        yield stage


@pytest.fixture
async def apache(
    apache_kafka: ApacheKafka, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[Stage]:
    """A stage on Apache Kafka."""
    async with Stage(apache_kafka, practice, topics, tmp_path) as stage:
        yield stage


@pytest.fixture
async def acls(apache: Stage) -> AsyncIterator[Acls]:
    """Yield the ACLs of the stage's topics; at first only the tests themselves have permissions."""
    await apache.open()
    admin = AIOKafkaAdminClient(bootstrap_servers=apache.broker.bootstrap)
    await admin.start()
    yield Acls(admin)
    await admin.close()
