"""Measure memory, tasks and connections over many short jobs: `python -m benchmarks.soak --jobs 10000`.

The worker runs in this process, the broker and the practice upstream in others. After every tenth of the jobs the resident
memory, the tasks and the file descriptors of the process are printed, and again when the worker has stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from streamworker.app import App
from streamworker.config import Settings, load
from streamworker.demo.broker import EmbeddedBroker
from streamworker.demo.child import free_port
from streamworker.kafka.sink import publish
from streamworker.kafka.topics import open_admin
from streamworker.telemetry.logging import configure_logging

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "practice?deltas=5"


def settings_for(bootstrap: str, upstream: str) -> Settings:
    """Return the worker's settings."""
    return load(
        None,
        {
            "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": bootstrap,
            "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": upstream,
            "STREAMWORKER_TELEMETRY__HTTP_HOST": "127.0.0.1",
            "STREAMWORKER_TELEMETRY__HTTP_PORT": "0",
        },
    )


def state() -> str:
    """Return resident memory, tasks and file descriptors of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    return f"{resident:7.1f} MiB  {len(asyncio.all_tasks()):4d} tasks  {descriptors:4d} descriptors"


def entries(count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of job records."""
    request = {"model": MODEL, "messages": [{"role": "user", "content": "soak"}]}
    for number in range(count):
        job_id = f"soak-{number}"
        yield job_id.encode(), orjson.dumps({"job_id": job_id, "request": request})


def ended(app: App) -> int:
    """Return the number of jobs that have their terminal event."""
    metric = "streamworker_jobs_ended_total"
    samples = [
        sample
        for family in app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == metric
    ]
    return int(sum(sample.value for sample in samples))


async def soak(bootstrap: str, upstream: str, jobs: int) -> None:
    """Run the jobs and print the measurements."""
    settings = settings_for(bootstrap, upstream)
    async with open_admin(settings) as admin:
        await admin.create(partitions=8)
    await publish(settings.kafka, settings.topics.jobs[0], entries(jobs))
    print(f"before      {state()}")
    app = App(settings)
    worker = asyncio.create_task(app.run())
    begun, cpu = time.monotonic(), time.process_time()
    for tenth in range(1, 11):
        while ended(app) < jobs * tenth // 10:
            if worker.done():
                worker.result()
            await asyncio.sleep(0.05)
        print(f"{jobs * tenth // 10:6d} jobs {state()}")
    wall, cpu = time.monotonic() - begun, time.process_time() - cpu
    app.drain()
    await worker
    await asyncio.sleep(0.1)  # transports close in the next iterations of the loop
    print(f"stopped     {state()}")
    print(
        f"{jobs} jobs of 5 deltas in {wall:.1f} s: {jobs / wall:.0f} jobs/s, {cpu / jobs * 1e3:.2f} ms of CPU per job"
    )


def main() -> None:
    """Parse arguments, start broker and upstream, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--kafka", help="host:port of a broker; default: the embedded one")
    arguments = parser.parse_args()
    with Path(os.devnull).open("wb") as nowhere, EmbeddedBroker() as broker:
        configure_logging("json", "error", nowhere)
        port = free_port()
        command = [sys.executable, "-m", "streamworker", "practice-upstream", "--port", str(port)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as upstream:
            try:
                asyncio.run(
                    soak(arguments.kafka or broker.bootstrap, f"http://127.0.0.1:{port}/v1", arguments.jobs)
                )
            finally:
                upstream.terminate()


if __name__ == "__main__":
    main()
