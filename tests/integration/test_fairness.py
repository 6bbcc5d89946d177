"""A tenant or a topic with a large backlog does not delay the jobs of another one, on Apache Kafka."""

from __future__ import annotations

import asyncio
import json
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer

from tests.integration.stage import eventually

if TYPE_CHECKING:
    from tests.integration.stage import InProcess, Stage

pytestmark = pytest.mark.long

BACKLOG = 600
SLOT_S = 1.0
MODEL = "practice?deltas=10&pace_ms=100"  # takes SLOT_S
SLOTS = 20
RARE_JOBS = 12


def details(worker: InProcess) -> dict[str, Any]:
    """Return what `/readyz` of a worker shows."""
    return worker.app._readiness()[1]


async def p95_wait_s(stage: Stage, worker: InProcess, *, topic: str = "") -> float:
    """Fill the worker with jobs of one tenant, submit one job of another each second; return its p95 wait."""
    await stage.submit_many(
        [(f"bulk-{number}", MODEL, 0) for number in range(BACKLOG)], metadata={"tenant": "bulk"}
    )
    await eventually(lambda: details(worker)["jobs_open"] >= BACKLOG * 2 // 3)
    producer = AIOKafkaProducer(bootstrap_servers=stage.broker.bootstrap)
    await producer.start()
    names = [f"rare-{number}" for number in range(RARE_JOBS)]
    try:
        for name in names:
            value = {
                "job_id": name,
                "request": {"model": MODEL, "messages": stage.message(name)},
                "metadata": {"tenant": "rare"},
            }
            await producer.send_and_wait(topic or stage.jobs_topic, json.dumps(value).encode(), partition=0)
            await asyncio.sleep(SLOT_S)
    finally:
        await producer.stop()
    ends: list[dict[str, Any]] = await stage.ended(*names)
    waits = [end["timing"]["queued"] / 1000 for end in ends]
    return float(quantiles(waits, n=20, method="inclusive")[-1])


async def test_tenant_with_a_backlog_delays_another_tenant_by_less_than_two_slot_times(apache: Stage) -> None:
    """With `fair_by`, its jobs take turns with those of the backlog."""
    await apache.open()
    async with apache.worker(
        worker__fair_by="metadata:tenant", worker__max_waiting=2048, worker__max_in_flight=SLOTS
    ) as worker:
        await eventually(lambda: worker.app._readiness()[0])
        wait_s = await p95_wait_s(apache, worker)
        worker.abandon()

    assert wait_s < 2 * SLOT_S


async def test_topic_with_a_backlog_delays_another_topic_by_less_than_two_slot_times(apache: Stage) -> None:
    """With `weights`, the slots that become free go to the topic that has fewest of them."""
    chat = f"{apache.jobs_topic}.chat"
    await apache.open()
    await apache.create_topic(chat)
    async with apache.worker(
        topics__jobs=f"{apache.jobs_topic},{chat}",
        topics__weights=f"{chat}=3",
        worker__max_waiting=2048,
        worker__max_in_flight=SLOTS,
    ) as worker:
        await eventually(lambda: worker.app._readiness()[0])
        wait_s = await p95_wait_s(apache, worker, topic=chat)
        worker.abandon()

    assert wait_s < 2 * SLOT_S
