"""Run the benchmarks: `python -m benchmarks --size quick`. benchmarks/README.md describes what is measured."""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks import scenarios
from benchmarks.processes import started
from benchmarks.report import machine, medians, table, write
from benchmarks.stage import CONTENDERS, Contender, Figures, Stage
from streamworker.demo.child import accepts, free_port
from tests.brokers.apache import ApacheKafka

UPSTREAM_START_S = 10


def chosen(names: str, before: Path | None) -> list[Contender]:
    """Return the selected contenders whose libraries are installed; workers also in the version of `before`."""
    asked = [contender for contender in CONTENDERS if contender.name in names.split(",")]
    if before is not None:
        workers = [contender for contender in asked if contender.module == "streamworker"]
        earlier = [one._replace(name=f"{one.name} before", directory=before) for one in workers]
        asked = [*(one for one in asked if one not in workers), *earlier, *workers]
    if find_spec("faststream") is None:
        print("faststream is skipped: it is not installed (make bench installs it)")
        asked = [contender for contender in asked if contender.name != "faststream"]
    return asked


async def measure(stage: Stage, arguments: argparse.Namespace) -> list[Figures]:
    """Run every scenario with every contender that can sustain it, `repeat` times."""
    runs = []
    for scenario in scenarios.QUICK if arguments.size == "quick" else scenarios.FULL:
        if arguments.only not in scenario.name:
            continue
        for _ in range(arguments.repeat):
            for contender in chosen(arguments.contenders, arguments.before):
                if scenario.offered <= contender.ceiling:
                    runs.append(await stage.run(contender, scenario, arguments.window))
                    print(table(runs[-1:]).splitlines()[-1], flush=True)
    return runs


def main() -> None:
    """Parse arguments, start Apache Kafka and the upstream, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("quick", "full"), default="full")
    parser.add_argument("--contenders", default=",".join(contender.name for contender in CONTENDERS))
    parser.add_argument("--before", type=Path, help="checkout of another version, to run beside this one")
    parser.add_argument("--only", default="", help="part of a scenario's name")
    parser.add_argument("--partitions", type=int, default=8, help="of each topic")
    parser.add_argument(
        "--repeat", type=int, default=1, help="runs of each scenario; the report has their median"
    )
    parser.add_argument("--window", type=float, help="seconds to measure; default: 8, or 2 with --size quick")
    parser.add_argument("--out", type=Path, help="directory for figures.json and cpu.svg")
    arguments = parser.parse_args()
    arguments.window = arguments.window or (2.0 if arguments.size == "quick" else 8.0)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it logs every topic that it does not know yet
    port = free_port()
    broker = ApacheKafka()
    broker.start()
    begun = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="streamworker-bench-"))
    try:
        with started(["benchmarks.upstream", "--port", str(port)], {}, directory / "upstream.log"):
            deadline = time.monotonic() + UPSTREAM_START_S
            while not accepts(port) and time.monotonic() < deadline:
                time.sleep(0.05)
            stage = Stage(broker.bootstrap, port, directory, partitions=arguments.partitions)
            runs = asyncio.run(measure(stage, arguments))
    finally:
        broker.stop()
    figures = medians(runs)
    print(f"\n{table(figures)}\n\n{machine()}\n{time.monotonic() - begun:.0f} s; logs in {directory}")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(arguments.out, figures, runs)


if __name__ == "__main__":
    main()
