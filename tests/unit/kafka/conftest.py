"""Every test here runs on a loop whose time is turned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.memory_kafka import MemoryKafka
from tests.turnable import TurnableLoop

if TYPE_CHECKING:
    from collections.abc import Mapping


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, type[TurnableLoop]]:
    """Name the only kind of loop there is."""
    return {"turnable": TurnableLoop}


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> MemoryKafka:
    """A cluster in memory with the topic `t` of two partitions; all clients connect to it."""
    kafka = MemoryKafka(t=2)
    kafka.install(monkeypatch)
    return kafka
