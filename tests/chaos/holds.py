"""Upstreams that limit, die and refuse the key for minutes: `python -m tests.chaos.holds`, on Apache Kafka.

Every scenario has an upstream, topics and a worker of its own, and all of them run at once for about five minutes. The run
checks that every job completes, and that the calls exceed the jobs by at most a fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from streamworker.practice import Limits, PracticeUpstream
from tests.brokers.apache import ApacheKafka
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.conftest import Broker

__all__ = ["SCENARIOS", "Report", "Scenario", "play"]

MOST_CALLS = 1.2
"""Calls for each job."""

LIMIT_S = 600.0
_KEY = "sk-right"


class Scenario(NamedTuple):
    """What the upstream does. `down_s` and `refused_s` begin when the jobs are submitted; a job streams for `job_s`."""

    limits: Limits = Limits()
    down_s: float = 0.0
    refused_s: float = 0.0
    job_s: float = 0.4
    jobs: int = 200


class Report(NamedTuple):
    """The results of one scenario. `breaches` is what must not happen."""

    statuses: Mapping[str, int]
    calls: int
    outcomes: Mapping[str, int]
    seconds: float
    breaches: list[str]


SCENARIOS = {
    "rate": Scenario(Limits(requests_per_minute=60)),
    "rate, long jobs": Scenario(Limits(requests_per_minute=60), job_s=5),
    "streams": Scenario(Limits(streams=4)),
    "streams, long jobs": Scenario(Limits(streams=4), job_s=3),
    "rate and streams": Scenario(Limits(requests_per_minute=60, streams=4)),
    "down": Scenario(down_s=120),
    "key refused": Scenario(refused_s=120),
}


async def play(scenario: Scenario, broker: Broker, topics: Callable[[str], str], directory: Path) -> Report:
    """Run the jobs of one scenario through one worker; return the report."""
    key = _write_key(directory, "sk-wrong" if scenario.refused_s else _KEY)
    loop = asyncio.get_running_loop()
    async with (
        PracticeUpstream(api_key=_KEY, limits=scenario.limits) as practice,
        Stage(broker, practice, topics, directory) as stage,
    ):
        await stage.open(partitions=4)
        async with stage.worker(upstreams__default__api_key_file=key), asyncio.TaskGroup() as group:
            began = loop.time()
            if scenario.down_s:
                group.create_task(practice.die(scenario.down_s))
            if scenario.refused_s:
                group.create_task(_replace(key, scenario.refused_s))
            model = f"practice?deltas=4&pace_ms={round(scenario.job_s * 250)}"
            await stage.submit_many([(f"job-{number}", model, number % 4) for number in range(scenario.jobs)])
            with contextlib.suppress(AssertionError):
                await stage.ended(limit_s=LIMIT_S)
            seconds = loop.time() - began
        ends = stage.terminals().values()
        breaches = [str(breach) for breach in [*stage.breaches(), *await stage.commit_breaches()]]
        if any(end["status"] != "completed" for end in ends) or len(ends) < scenario.jobs:
            breaches.append(f"{scenario.jobs - len(ends)} jobs have not ended, or some have not completed")
        calls = len(practice.calls)
        if calls > MOST_CALLS * scenario.jobs:
            breaches.append(f"{calls} calls for {scenario.jobs} jobs")
        return Report(
            statuses=Counter(f"{end['status']}{_code(end)}" for end in ends),
            calls=calls,
            outcomes=Counter(str(call.outcome) for call in practice.calls),
            seconds=seconds,
            breaches=breaches,
        )


def _write_key(directory: Path, key: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (path := directory / "key").write_text(key)
    return path


async def _replace(key: Path, after_s: float) -> None:
    await asyncio.sleep(after_s)
    _write_key(key.parent, _KEY)


def _code(end: Mapping[str, dict[str, object] | None]) -> str:
    return f"/{error['code']}" if (error := end["error"]) else ""


async def _run(names: list[str], broker: Broker, directory: Path) -> dict[str, Report]:
    async def one(name: str) -> Report:
        prefix = f"holds.{name.replace(', ', '-').replace(' ', '-')}"
        return await play(
            SCENARIOS[name],
            broker,
            lambda topic: f"{prefix}.{topic}.{secrets.token_hex(3)}",
            directory / prefix,
        )

    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.holds", description=__doc__)
    parser.add_argument("scenario", nargs="*", help=f"default: all of {', '.join(SCENARIOS)}")
    names = parser.parse_args().scenario or list(SCENARIOS)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    broker = ApacheKafka()
    with tempfile.TemporaryDirectory() as scratch:
        broker.start()
        try:
            reports = asyncio.run(_run(names, broker, Path(scratch)))
        finally:
            broker.stop()
    for name, report in reports.items():
        sys.stdout.write(
            f"{name:20} {dict(report.statuses)}; {report.calls} calls {dict(report.outcomes)}; {report.seconds:.0f} s\n"
        )
        for breach in report.breaches:
            sys.stdout.write(f"    {breach}\n")
    return 1 if any(report.breaches for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
