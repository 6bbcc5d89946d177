"""Measure the CPU that fair scheduling costs: `python -m benchmarks.fairness`.

A backlog of jobs of many tenants runs through one worker process on Apache Kafka, alternately first come, first served and
with `worker.fair_by`. The figure is the CPU time of the worker per job; every run has a worker of its own.

The jobs are in one partition, so that both variants share commits alike. A backlog of several partitions is read, and first
come, first served also run, one partition after another: nearly all jobs that begin or end together are then in one
partition, and share one commit. With `--partitions 4` the figure shows these commits, and hardly the scheduling.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.processes import usage_of
from streamworker.practice import PracticeUpstream
from tests.brokers.apache import ApacheKafka
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from tests.conftest import Broker

VARIANTS: dict[str, dict[str, Any]] = {
    "first come, first served": {},
    "fair_by metadata": {"worker__fair_by": "metadata:tenant"},
}
WARM_UP = 200
"""Jobs before the measurement, so that every module and connection is in use."""


async def measure(
    broker: Broker,
    directory: Path,
    over: dict[str, Any],
    *,
    jobs: int,
    tenants: int,
    partitions: int,
    model: str,
) -> float:
    """Return the worker's CPU time per job, in ms."""
    async with (
        PracticeUpstream(content_limit=0) as practice,
        Stage(broker, practice, lambda name: f"fairness.{name}.{secrets.token_hex(3)}", directory) as stage,
    ):
        await stage.open(partitions=partitions)
        worker = await stage.process(worker__max_waiting=2048, worker__max_in_flight=64, **over)
        await worker.logged("worker.started")

        async def run(prefix: str, count: int) -> None:
            for tenant in range(tenants):
                names = range(tenant, count, tenants)
                await stage.submit_many(
                    [(f"{prefix}-{number}", model, number % partitions) for number in names],
                    metadata={"tenant": str(tenant)},
                )
            await stage.ended(limit_s=300)

        await run("warm-up", WARM_UP)
        before = usage_of(worker.pid).cpu_s
        await run("job", jobs)
        return 1000 * (usage_of(worker.pid).cpu_s - before) / jobs


def main() -> int:
    """Parse arguments, start Apache Kafka, measure the variants in turn, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each variant")
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of each run")
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--model", default="practice?deltas=20&pace_ms=10")
    arguments = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    broker = ApacheKafka()
    with tempfile.TemporaryDirectory() as scratch:
        broker.start()
        try:
            for number in range(arguments.runs):
                # The order alternates, so that a load which grows or shrinks favours neither variant.
                for name, over in list(VARIANTS.items())[:: -1 if number % 2 else 1]:
                    cost = measure(
                        broker,
                        Path(scratch),
                        over,
                        jobs=arguments.jobs,
                        tenants=arguments.tenants,
                        partitions=arguments.partitions,
                        model=arguments.model,
                    )
                    found[name].append(asyncio.run(cost))
        finally:
            broker.stop()
    for name, costs in found.items():
        runs = " ".join(f"{cost:.3f}" for cost in costs)
        sys.stdout.write(f"{name:26} median {median(costs):.3f} ms of CPU per job; runs {runs}\n")
    plain, fair = (median(costs) for costs in found.values())
    sys.stdout.write(f"fair scheduling costs {100 * (fair / plain - 1):+.1f} %\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
