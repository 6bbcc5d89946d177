"""An upstream that refuses, stalls, breaks and dies: `python -m tests.chaos.upstream --apache`.

A third of all calls is answered 429, a tenth stalls, a tenth is reset, and once in the run the whole upstream is down for
some seconds. It has limits of its own, and its log shows whether they were exceeded. The run checks that every job ends
once, that the calls per job are within policy, and that the throughput recovers after the outage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from streamworker.demo.broker import EmbeddedBroker
from streamworker.practice import Limits, Mishaps, PracticeUpstream
from tests.brokers.apache import ApacheKafka
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Broker

__all__ = ["Plan", "Report", "play"]

MODEL = "practice?deltas=20&pace_ms=20"
MAX_TRIES = 6
MAX_RESTARTS = 2


class Plan(NamedTuple):
    """One run. The upstream dies when a third of the jobs has ended."""

    jobs: int = 300
    dies_for_s: float = 10.0
    streams: int = 40
    requests_per_minute: int = 600
    seed: int = 1


class Report(NamedTuple):
    """The results. Throughput is in ended jobs per second, before the outage of the upstream and after it."""

    statuses: dict[str, int]
    codes: dict[str, int]
    breaches: list[str]
    calls: int
    most_calls_of_a_job: int
    answered_with: dict[str, int]
    exceeded: dict[str, int]
    peak_streams: int
    peak_calls_per_minute: int
    calls_while_dead: int
    before: float
    after: float
    seconds: float


async def play(plan: Plan, broker: Broker, topics: Callable[[str], str], directory: Path) -> Report:
    """Run the jobs through one worker; half of them have `on_break: restart`."""
    mishaps = Mishaps(limited=1 / 3, stalled=0.1, broken=0.1, seed=plan.seed)
    limits = Limits(streams=plan.streams, requests_per_minute=plan.requests_per_minute)
    async with (
        PracticeUpstream(limits=limits, mishaps=mishaps) as practice,
        Stage(broker, practice, topics, directory) as stage,
    ):
        await stage.open(partitions=2)
        jobs = [(f"job-{number}", MODEL, number % 2) for number in range(plan.jobs)]
        async with stage.worker(
            upstreams__default__max_streams=plan.streams,
            upstreams__default__requests_per_minute=plan.requests_per_minute,
            upstreams__default__max_tries=MAX_TRIES,
            upstreams__default__max_restarts=MAX_RESTARTS,
            upstreams__default__first_delta_timeout_s=1,
            upstreams__default__idle_timeout_s=1,
            upstreams__default__circuit_open_s=0.5,
        ):
            loop = asyncio.get_running_loop()
            began = loop.time()
            await stage.submit_many(jobs[::2])
            await stage.submit_many(jobs[1::2], on_break="restart")
            await stage.until(lambda: len(stage.terminals()) >= plan.jobs // 3, limit_s=120)
            before, died, ended = _rate(len(stage.terminals()), began), loop.time(), len(stage.terminals())
            await practice.die(plan.dies_for_s)
            back, dead = loop.time(), len(stage.terminals())
            calls_while_dead = sum(died < call.started_at < back for call in practice.calls)
            await stage.until(lambda: len(stage.terminals()) > dead, limit_s=120)
            resumed = len(stage.terminals())
            since = loop.time()
            await stage.ended(limit_s=300)
            after, seconds = _rate(plan.jobs - resumed, since), loop.time() - began
        assert ended <= dead
        ends = stage.terminals().values()
        per_job = Counter(json.dumps(call.body["messages"]) for call in practice.calls if call.body)
        return Report(
            statuses=dict(Counter(end["status"] for end in ends)),
            codes=dict(Counter(end["error"]["code"] for end in ends if end["error"])),
            breaches=[str(breach) for breach in [*stage.breaches(), *await stage.commit_breaches()]],
            calls=len(practice.calls),
            most_calls_of_a_job=max(per_job.values()),
            answered_with=dict(Counter(str(call.outcome) for call in practice.calls)),
            exceeded=practice.exceeded,
            peak_streams=practice.max_streams,
            peak_calls_per_minute=_peak([call.started_at for call in practice.calls]),
            calls_while_dead=calls_while_dead,
            before=round(before, 1),
            after=round(after, 1),
            seconds=round(seconds, 1),
        )


def _rate(count: int, since: float) -> float:
    return count / (asyncio.get_running_loop().time() - since)


def _peak(times: list[float]) -> int:
    """Return the maximum number of calls in any 60 seconds."""
    return max(sum(start <= at < start + 60 for at in times) for start in times)


async def _run(plan: Plan, broker: Broker, directory: Path) -> Report:
    return await play(plan, broker, lambda name: f"hostile.{name}.{secrets.token_hex(3)}", directory)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.upstream", description=__doc__)
    parser.add_argument(
        "--apache", action="store_true", help="use Apache Kafka; default: the embedded broker"
    )
    for name, default in Plan._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    broker = ApacheKafka() if arguments.pop("apache") else EmbeddedBroker()
    with tempfile.TemporaryDirectory() as scratch:
        broker.start()
        try:
            report = asyncio.run(_run(Plan(**arguments), broker, Path(scratch)))
        finally:
            broker.stop()
    for name, value in report._asdict().items():
        sys.stdout.write(f"{name:22} {value}\n")
    return 1 if report.breaches or report.exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
