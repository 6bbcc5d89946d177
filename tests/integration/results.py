"""Results as a reader of the results topic sees them, and their comparison with the events."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaConsumer

from streamworker.stream.completion import CompletionAssembler
from tests.integration.checker import Breach

if TYPE_CHECKING:
    from tests.integration.stage import Stage

MARKERS_S = 10.0

__all__ = ["assembled", "result_breaches", "results_of"]


async def results_of(stage: Stage, topic: str) -> dict[str, list[dict[str, Any]]]:
    """Read the results topic to its end as a read_committed reader; return the results by job id."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=stage.broker.bootstrap,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=100,
    )
    found: dict[str, list[dict[str, Any]]] = {}
    await consumer.start()
    try:
        partitions = list(consumer.assignment())
        ends = await consumer.end_offsets(partitions)
        while any([await consumer.position(at) < end for at, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    result = json.loads(record.value)
                    assert record.key == result["job_id"].encode()
                    found.setdefault(result["job_id"], []).append(result)
    finally:
        await consumer.stop()
    return found


def assembled(stage: Stage, job_id: str, limit_bytes: int = 10_000_000) -> Any:
    """Return what a reader makes of the events of the job's valid attempt."""
    assembler = CompletionAssembler(limit_bytes=limit_bytes)
    for event in stage.events(job_id):
        assembler.read(event)
    return assembler.completion()


def started_at(stage: Stage, attempt: str) -> dict[str, Any] | None:
    """Return the coordinates of an attempt's `started` event."""
    for record in stage.records:
        if record.event["attempt"] == attempt and record.event["type"] == "started":
            return {"topic": record.topic, "partition": record.partition, "offset": record.offset}
    return None


async def result_breaches(stage: Stage, topic: str) -> list[Breach]:
    """Return the terminal events without exactly one result of equal members, offsets and completion.

    The broker writes the markers of a transaction to one partition after another, so a result may be visible a moment
    later than its terminal event.
    """
    terminals = stage.terminals()
    results: dict[str, list[dict[str, Any]]] = {}
    with suppress(TimeoutError):
        async with asyncio.timeout(MARKERS_S):
            while terminals.keys() - (results := await results_of(stage, topic)).keys():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.2)
    found = [Breach("result without end", job_id, "") for job_id in results.keys() - terminals.keys()]
    for job_id, terminal in terminals.items():
        if len(of_job := results.get(job_id, [])) != 1:
            found.append(Breach("results", job_id, f"{len(of_job)} results of one terminal event"))
            continue
        [result] = of_job
        differing = [name for name, value in terminal.items() if name != "type" and result.get(name) != value]
        if result["type"] != "result":
            differing.append("type")
        if result["error"] is None or result["error"]["code"] != "max_deliveries":
            differing += ["events"] if result["events"] != started_at(stage, terminal["attempt"]) else []
        if not result["omitted"] and result["completion"] != assembled(stage, job_id):
            differing.append("completion")
        if differing:
            found.append(Breach("unequal result", job_id, ", ".join(differing)))
    return found
