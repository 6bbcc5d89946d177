"""Measure the latency of exactly-once delivery: `python -m benchmarks.latency --partitions 8 --streams 80`.

Paced streams run through one worker on Apache Kafka. Two readers follow the events topic, one `read_uncommitted` and one
`read_committed`, and record when each event becomes visible:

* terminal latency: last delta visible (uncommitted) → terminal event visible (committed)
* delta delay: delta visible (uncommitted) → the same delta visible (committed): the delay by open transactions
* first visible: worker's clock in the event (`ts`) → visible (uncommitted)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import orjson

from benchmarks.soak import settings_for
from streamworker.app import App
from streamworker.demo.child import free_port
from streamworker.kafka.log import open_log
from streamworker.kafka.sink import KafkaSink
from streamworker.kafka.topics import open_admin
from streamworker.model import ProducerRecord, TopicPartition
from streamworker.telemetry.logging import configure_logging
from tests.brokers.apache import ApacheKafka

if TYPE_CHECKING:
    from streamworker.config import Settings

Seen = dict[tuple[str, int], tuple[float, dict[str, Any]]]


async def watch(settings: Settings, seen: Seen, *, committed: bool) -> None:
    """Record when each event becomes visible."""
    topic = settings.topics.events
    async with open_log(settings.kafka, topic, committed_only=committed) as log:
        async for record in log.follow([TopicPartition(topic, number) for number in log.partitions]):
            event = orjson.loads(record.value or b"{}")
            seen[event["job_id"], event["seq"]] = (time.time(), event)


async def measure(settings: Settings, partitions: int, jobs: int, model: str) -> tuple[Seen, Seen]:
    """Run the jobs; return when each reader saw each event."""
    async with open_admin(settings) as admin:
        await admin.create(partitions=partitions)
    committed: Seen = {}
    uncommitted: Seen = {}
    readers = [
        asyncio.create_task(watch(settings, committed, committed=True)),
        asyncio.create_task(watch(settings, uncommitted, committed=False)),
    ]
    app = App(settings)
    worker = asyncio.create_task(app.run())
    topic = settings.topics.jobs[0]
    sink = KafkaSink(settings.kafka, [topic])
    await sink.start()
    request = {"model": model, "messages": [{"role": "user", "content": "x"}]}
    for number in range(jobs):
        key = f"job-{number}".encode()
        job = orjson.dumps({"job_id": key.decode(), "request": request})
        sink.publish(ProducerRecord(sink.partition_for(topic, key), key, job), sink.receipt())
        await asyncio.sleep(0.01)  # jobs that start at the same time would end in the same transaction
    deadline = time.monotonic() + 30
    while sum(event["type"] == "usage" for _, event in list(committed.values())) < jobs:
        if worker.done():
            worker.result()
        if time.monotonic() > deadline:
            raise SystemExit(
                f"the jobs did not end: {len(committed)} events committed, {len(uncommitted)} in total"
            )
        await asyncio.sleep(0.1)
    app.drain()
    await worker
    await sink.stop()
    for reader in readers:
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
    return committed, uncommitted


def report(committed: Seen, uncommitted: Seen) -> None:
    """Print percentiles in milliseconds."""
    terminal, delay, visible = [], [], []
    for (job, seq), (at, event) in committed.items():
        if event["type"] == "usage":
            terminal.append(at - uncommitted[job, seq - 1][0])
        elif event["type"] == "delta":
            delay.append(at - uncommitted[job, seq][0])
            visible.append(uncommitted[job, seq][0] - event["ts"] / 1000)
    for name, values in (("terminal latency", terminal), ("delta delay", delay), ("delta visible", visible)):
        cuts = quantiles([value * 1000 for value in values], n=100)
        print(
            f"{name:17} p50 {cuts[49]:6.1f}  p90 {cuts[89]:6.1f}  p99 {cuts[98]:6.1f} ms  ({len(values)} events)"
        )


def main() -> None:
    """Parse arguments, start Apache Kafka and the upstream, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--streams", type=int, default=80)
    parser.add_argument("--model", default="practice?deltas=100&pace_ms=20")
    arguments = parser.parse_args()
    broker = ApacheKafka()
    broker.start()
    port = free_port()
    command = [sys.executable, "-m", "streamworker", "practice-upstream", "--port", str(port)]
    with (
        Path(os.devnull).open("wb") as nowhere,
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as upstream,
    ):
        configure_logging("json", "error", nowhere)
        try:
            settings = settings_for(broker.bootstrap, f"http://127.0.0.1:{port}/v1")
            report(*asyncio.run(measure(settings, arguments.partitions, arguments.streams, arguments.model)))
        finally:
            upstream.terminate()
            broker.stop()


if __name__ == "__main__":
    main()
