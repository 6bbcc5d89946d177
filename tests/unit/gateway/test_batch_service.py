"""The batches of one gateway process: their parts start and stop together, over a broker in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamworker.config import Settings
from streamworker.errors import ConfigurationError, KafkaRefused
from streamworker.gateway.batches import runner as runner_module
from streamworker.gateway.batches.records import write_state
from streamworker.gateway.batches.service import Batches
from streamworker.telemetry import gateway_metrics as table
from streamworker.telemetry.metrics import Metrics
from tests.unit.gateway.batches import BATCH, a_batch
from tests.unit.gateway.test_batch_runner import Share
from tests.unit.gateway.test_batch_topic import Broker

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
async def broker(monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Return an empty state topic. No partition is owned, so that nothing runs."""
    monkeypatch.setattr(runner_module, "PartitionShare", Share)
    return Broker(monkeypatch)


def batches_of(files: str) -> Batches:
    """Return the batches of a gateway."""
    settings = Settings(topics={"results": "results", "batches": "batches"}, batch={"files": files})
    return Batches(settings, Metrics(table=table.GATEWAY_TABLE))


async def test_batches_are_ready_from_their_start_to_their_stop(broker: Broker, tmp_path: Path) -> None:
    """What is written is in the table when `write` returns."""
    batches = batches_of(f"file://{tmp_path}")
    assert not batches.is_ready
    await batches.start()
    assert (batches.is_ready, batches.running) == (True, 0)
    await batches.write(BATCH, BATCH, a_batch())
    assert batches.table.batch(BATCH) == a_batch()
    await batches.stop()

    assert not batches.is_ready
    assert [tail.is_running for tail in broker.tails] == [False]
    assert [sink.is_running for sink in broker.sinks] == [False]


async def test_batches_are_counted_by_status_at_each_scrape(broker: Broker, tmp_path: Path) -> None:
    """Those of all gateways: the state is the same at each of them."""
    batches = batches_of(f"file://{tmp_path}")
    await batches.start()
    for number, status in enumerate(["validating", "in_progress", "in_progress", "completed"]):
        record = a_batch(f"batch_{number}", status=status, ended_at=1 if status == "completed" else None)
        broker.write(0, record.id, write_state(record))
    broker.deliver()
    batches._count_statuses()
    counted = {
        sample.labels["status"]: sample.value
        for metric in batches._metrics.registry.collect()
        for sample in metric.samples
        if sample.name.endswith(table.BATCHES.name)
    }
    await batches.stop()

    assert {status: count for status, count in counted.items() if count} == {
        "validating": 1, "in_progress": 2, "completed": 1
    }  # fmt: skip


async def test_batches_without_their_topic_do_not_join_the_owners(broker: Broker, tmp_path: Path) -> None:
    """An operator must create it; the stop is harmless all the same."""
    del broker.log.numbers["batches"]
    batches = batches_of(f"file://{tmp_path}")
    with pytest.raises(KafkaRefused, match="topic batches does not exist"):
        await batches.start()
    assert batches._runner._sweeping is None
    await batches.stop()


async def test_store_that_cannot_be_used_is_a_fault_of_the_configuration(broker: Broker) -> None:
    """Found when the gateway starts, and not at the first upload."""
    del broker
    with pytest.raises(ConfigurationError, match=r"batch\.files"):
        batches_of("ftp://host/files")
