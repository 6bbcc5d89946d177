"""Three brokers that die and restart under load: `python -m tests.chaos.cluster`, on Apache Kafka.

Each broker is killed in turn and restarted in turn, one stays away for 35 s so that no partition has all its replicas in
sync, and meanwhile static workers are restarted. The run checks that every job ends once and without a gap, and that no
upstream is called twice: no worker dies.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import secrets
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from streamworker.practice import PracticeUpstream
from tests.brokers.cluster import ApacheCluster
from tests.chaos.moves import Plan, Report, Run, show
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["play"]

AWAY_S = 35.0
"""How long the replicas of one broker are out of sync."""

BETWEEN_S = 8.0
"""Between two failures, so that the replicas of the broker before are in sync again."""


class _ClusterRun(Run):
    def __init__(self, plan: Plan, stage: Stage, cluster: ApacheCluster, away_s: float) -> None:
        super().__init__(plan, stage)
        self._cluster = cluster
        self._away_s = away_s
        self._restarted = 0

    async def _play_phases(self) -> None:
        for node in self._cluster.nodes:
            await self._phase(f"kill broker {node}", partial(self._break, node, is_kill=True))
        for node in self._cluster.nodes:
            await self._phase(f"restart broker {node}", partial(self._break, node, is_kill=False))
        await self._phase(f"a broker is away for {self._away_s:g} s", self._miss_one)

    async def _break(self, node: int, *, is_kill: bool) -> None:
        """Stop a broker and start it again, while a worker is restarted."""
        if is_kill:
            await asyncio.to_thread(self._cluster.kill, node)
            await asyncio.gather(self._restart(), asyncio.sleep(self._plan.job_s))
            await asyncio.to_thread(self._cluster.return_, node)
        else:
            await asyncio.gather(self._restart(), asyncio.to_thread(self._cluster.restart, node))
        await asyncio.sleep(BETWEEN_S)

    async def _miss_one(self) -> None:
        node = self._cluster.nodes[-1]
        await asyncio.to_thread(self._cluster.kill, node)
        await asyncio.sleep(self._away_s)
        await asyncio.to_thread(self._cluster.return_, node)


async def play(
    plan: Plan,
    cluster: ApacheCluster,
    name: Callable[[str], str],
    directory: Path,
    *,
    away_s: float = AWAY_S,
) -> Report:
    """Run all phases on a cluster that was started; return the report."""
    async with PracticeUpstream() as practice, Stage(cluster, practice, name, directory) as stage:
        stage.replicas = cluster.size
        await stage.open(partitions=plan.partitions, events_partitions=6)
        return await _ClusterRun(plan, stage, cluster, away_s).play()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.cluster", description=__doc__)
    parser.add_argument("--dynamic", dest="is_static", action="store_false", help="no static membership")
    parser.add_argument("--away-s", type=float, default=AWAY_S, help="how long one broker is away")
    parser.add_argument("--logs", type=Path, help="keep the workers' logs in this directory")
    for field, default in {
        "job_s": 6.0,
        "jobs_per_s": 3.0,
        "partitions": 12,
        "delivery": "exactly_once",
    }.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    logs, away_s = arguments.pop("logs"), arguments.pop("away_s")
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    cluster = ApacheCluster()
    with tempfile.TemporaryDirectory() as scratch:
        cluster.start()
        try:
            report = asyncio.run(
                play(
                    Plan(**arguments),
                    cluster,
                    lambda name: f"cluster.{name}.{secrets.token_hex(3)}",
                    logs or Path(scratch),
                    away_s=away_s,
                )
            )
        finally:
            cluster.stop()
    show(report)
    return 1 if report.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
