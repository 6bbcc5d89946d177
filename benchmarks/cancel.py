"""Measure the latency of cancellations: `python -m benchmarks.cancel --streams 200`.

One worker on Apache Kafka has `--streams` open streams; all of them are cancelled, one control record after another. The
latency is the time from writing a job's control record to its terminal event, as seen by a `read_committed` reader.
Broker, worker, upstream and reader share one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import quantiles

from streamworker.practice import PracticeUpstream
from streamworker.telemetry.logging import configure_logging
from streamworker.wire.control import write_cancel
from tests.brokers.apache import ApacheKafka
from tests.integration.stage import Stage

MODEL = "practice?deltas=100000&pace_ms=50"


async def measure(stage: Stage, streams: int, every_s: float) -> list[float]:
    """Return the seconds from each cancellation to its job's terminal event."""
    await stage.open(partitions=4)
    jobs = [(f"job-{number}", MODEL, number % 4) for number in range(streams)]
    written: dict[str, float] = {}
    seen: dict[str, float] = {}

    async def watch() -> None:
        while len(seen) < streams:
            await asyncio.sleep(0.002)
            for job_id in stage.terminals().keys() - seen.keys():
                seen[job_id] = time.monotonic()

    async with stage.worker(worker__max_in_flight=streams):
        await stage.submit_many(jobs)
        await stage.until(lambda: all(stage.deltas(job_id) for job_id, _, _ in jobs), limit_s=60)
        assert stage.practice.open_streams == streams
        tasks = asyncio.all_tasks()
        watching = asyncio.create_task(watch())
        for job_id, _, _ in jobs:
            written[job_id] = time.monotonic()
            await stage._producer.send(stage.control_topic, write_cancel(job_id, None), key=job_id.encode())  # noqa: SLF001
            await asyncio.sleep(every_s)
        await asyncio.wait_for(watching, 60)
        with suppress(TimeoutError):
            await asyncio.wait_for(stage.practice.until(lambda: stage.practice.open_streams == 0), 5)
        left = {task for task in asyncio.all_tasks() - tasks if task.get_name().startswith("job ")}
        print(f"connections still open: {stage.practice.open_streams}, remaining tasks of jobs: {len(left)}")
    assert {end["status"] for end in stage.terminals().values()} == {"cancelled"}
    assert stage.breaches() == []
    return [seen[job_id] - written[job_id] for job_id in written]


async def run(kafka: ApacheKafka, streams: int, every_s: float, directory: Path) -> list[float]:
    async with PracticeUpstream() as practice:
        names = lambda name: f"cancel.{name}.{secrets.token_hex(3)}"  # noqa: E731
        async with Stage(kafka, practice, names, directory) as stage:
            return await measure(stage, streams, every_s)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cancel", description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--every-ms", type=float, default=10, help="between two control records")
    arguments = parser.parse_args()
    configure_logging("json", "error")
    kafka = ApacheKafka()
    with tempfile.TemporaryDirectory() as scratch:
        kafka.start()
        try:
            took = asyncio.run(run(kafka, arguments.streams, arguments.every_ms / 1000, Path(scratch)))
        finally:
            kafka.stop()
    cuts = quantiles(took, n=100)
    print(
        f"{len(took)} cancellations: p50 {cuts[49] * 1000:.0f} ms, p90 {cuts[89] * 1000:.0f} ms, "
        f"p99 {cuts[98] * 1000:.0f} ms, most {max(took) * 1000:.0f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
