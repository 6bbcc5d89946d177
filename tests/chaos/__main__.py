"""Run seeds: `python -m tests.chaos --seeds 20 --apache`; repeat one: `python -m tests.chaos --seed 7 --apache`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamworker.demo.broker import EmbeddedBroker
from streamworker.practice import PracticeUpstream
from tests.brokers.apache import ApacheKafka
from tests.chaos.plan import FULL, GENTLE, SHORT, draw
from tests.chaos.run import Outcome, play

if TYPE_CHECKING:
    from tests.conftest import Broker

SIZES = {"full": FULL, "short": SHORT, "gentle": GENTLE}


async def run(seed: int, size: str, broker: Broker, logs: Path) -> Outcome:
    directory = logs / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    async with PracticeUpstream() as practice:
        return await play(
            draw(seed, SIZES[size]),
            broker,
            practice,
            lambda name: f"chaos-{seed}.{name}.{secrets.token_hex(3)}",
            directory,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="run seeds 1 to N")
    parser.add_argument("--seed", type=int, action="append", help="run this seed; may be repeated")
    parser.add_argument(
        "--size", choices=SIZES, help="default: full on Apache Kafka, gentle on the embedded broker"
    )
    parser.add_argument(
        "--apache",
        action="store_true",
        help="use Apache Kafka, where members may die without leaving the group",
    )
    parser.add_argument("--logs", type=Path, help="keep the workers' logs in this directory")
    arguments = parser.parse_args()
    size = arguments.size or ("full" if arguments.apache else "gentle")
    seeds = arguments.seed or range(1, arguments.seeds + 1)
    logging.getLogger("aiokafka").setLevel(
        logging.CRITICAL
    )  # messages of the reader in this process while the broker is down
    failed = []
    broker = ApacheKafka() if arguments.apache else EmbeddedBroker()
    with tempfile.TemporaryDirectory() as scratch:
        broker.start()
        try:
            for seed in seeds:
                outcome = asyncio.run(run(seed, size, broker, arguments.logs or Path(scratch)))
                click.echo(outcome.line())
                for breach in outcome.breaches:
                    click.echo(f"    {breach.kind}: {breach.job_id}: {breach.detail}")
                if outcome.breaches:
                    failed.append(seed)
        finally:
            broker.stop()
    if failed:
        on = " --apache" if arguments.apache else ""
        again = " ".join(f"--seed {seed}" for seed in failed)
        click.echo(f"run them again: python -m tests.chaos {again} --size {size}{on} --logs DIRECTORY")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
