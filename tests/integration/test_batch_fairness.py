"""A batch does not delay interactive jobs by more than one slot's time, on Apache Kafka."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.batches import Files, request, start_batch, write_lines
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.stage import Stage

pytestmark = pytest.mark.long

SLOT_S = 1.0
MODEL = "practice?deltas=10&pace_ms=100"  # takes SLOT_S
SLOTS = 20
LINES = 1500
INTERACTIVE = 15
NOISE_S = 0.5
"""Of a test machine: the time from the record to the worker, and a busy loop."""


async def test_batch_delays_interactive_jobs_by_less_than_one_slot_time(
    apache: Stage, tmp_path: Path
) -> None:
    """With a topic of its own and `topics.weights`; the batch fills every slot and has a window of lines waiting."""
    await apache.open(results_topic=f"{apache.events_topic}.results")
    topic = f"{apache.jobs_topic}.batch"
    await apache.create_topic(topic)
    topics: dict[str, Any] = {
        "topics__jobs": f"{apache.jobs_topic},{topic}",
        "topics__batch": topic,
        "topics__weights": f"{apache.jobs_topic}=4",
    }
    files = Files.of(tmp_path)
    write_lines(files.input, (request(f"line-{number}", MODEL) for number in range(LINES)))
    async with apache.worker(worker__max_in_flight=SLOTS, worker__max_waiting=2048, **topics) as worker:
        batch = await start_batch(apache, files.input, **topics)
        await eventually(lambda: apache.practice.open_streams == SLOTS, what=lambda: batch.text)
        for number in range(INTERACTIVE):
            await apache.submit(f"chat-{number}", MODEL)
            await asyncio.sleep(SLOT_S * 0.7)
        ends = await apache.ended(*(f"chat-{number}" for number in range(INTERACTIVE)))
        batch.send(signal.SIGTERM)
        assert await batch.ends() == 3
        worker.abandon()
    waits = sorted(end["timing"]["queued"] / 1000 for end in ends)

    assert waits[-1] < SLOT_S + NOISE_S, waits
    assert waits[len(waits) // 2] < SLOT_S
