"""Rollouts under continuous load, and what they cost: `python -m tests.chaos.moves`, on Apache Kafka.

Every job streams for ten seconds. Workers restart one after another, the group grows and shrinks, and one worker joins and
leaves again and again, alternately while partitions move to it and when it has them. The run checks that every job ends
once, that no upstream is called twice, and that every partition moves within the longest stream and five seconds. With
`--kills`, a worker dies between two moves: then a job may be called again if it was streaming at that moment. With
`--long`, one job streams for longer than `worker.move_timeout_s`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import secrets
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from streamworker.practice import PracticeUpstream
from tests.brokers.apache import ApacheKafka
from tests.integration.stage import Process, Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from streamworker.practice import Call
    from tests.conftest import Broker

__all__ = ["Plan", "Report", "Run", "play", "show"]

SLACK_S = 5.0
"""How much longer than its longest stream a partition may need to move."""

_WORKER = "x-worker"
"""The header of an upstream call that names the process which made it."""

_DEATH_S = 2.0
"""Between a worker's death and the end of its calls, at most: the upstream reads requests late, and commits take a while."""

LIMIT_S = 120.0
_LONG = "long"


class Plan(NamedTuple):
    """One run."""

    job_s: float = 10.0
    jobs_per_s: float = 3.0
    partitions: int = 24
    restarts: int = 3
    scales: tuple[int, ...] = (1, 4, 8, 2)
    returns: int = 7
    is_static: bool = False
    delivery: str = "exactly_once"
    kills: bool = False
    long_s: float = 0.0
    move_timeout_s: float = 900.0
    session_timeout_s: float = 10.0
    seed: int = 1


class Phase(NamedTuple):
    """The cost of one phase, until the partitions were balanced again: as the member saw it that rebalanced most."""

    name: str
    seconds: float
    rebalances: int
    moves: int
    longest_wait_s: float
    cuts: int


class Report(NamedTuple):
    """The results. `repeated` are the jobs with more than one call; `breaches` what must not happen.

    `cut_by_kills` counts the calls before the last one of a job that ended with the worker that had made them, and `kills` the
    workers that were killed.
    """

    phases: list[Phase]
    jobs: int
    calls: int
    repeated: dict[str, int]
    cut_by_kills: int
    kills: int
    breaches: list[str]
    seconds: float


async def play(plan: Plan, broker: Broker, name: Callable[[str], str], directory: Path) -> Report:
    """Run all phases; return the report."""
    async with PracticeUpstream() as practice, Stage(broker, practice, name, directory) as stage:
        await stage.open(partitions=plan.partitions)
        return await Run(plan, stage).play()


class Run:
    """One run on an open stage."""

    def __init__(self, plan: Plan, stage: Stage) -> None:
        self._plan = plan
        self._stage = stage
        self._loop = asyncio.get_running_loop()
        self._chance = random.Random(plan.seed)
        self._members: list[Process] = []
        self._names: dict[Process, str] = {}
        self._killed_at: dict[str, float] = {}  # process -> when it was killed
        self._phases: list[Phase] = []

    async def play(self) -> Report:
        """Play all phases under load; return the report."""
        plan, began = self._plan, self._loop.time()
        await self._join_first()
        await self._settled()
        async with self._load():
            await asyncio.sleep(plan.job_s)
            await self._play_phases()
        for process in self._members:
            process.signal(signal.SIGTERM)
        codes = [await process.exit_code(LIMIT_S) for process in self._members]
        repeated = self._repeated()
        return Report(
            phases=self._phases,
            jobs=len(self._stage.jobs),
            calls=len(self._stage.practice.calls),
            repeated=repeated,
            cut_by_kills=sum(
                self._cut_by_kill(call) for job_id in repeated for call in self._stage.calls(job_id)[:-1]
            ),
            kills=len(self._killed_at),
            breaches=[
                *map(str, self._stage.breaches() + await self._stage.commit_breaches()),
                *(f"exit code {code}" for code in codes if code),
                *self._unexplained(repeated),
                *self._late(),
            ],
            seconds=self._loop.time() - began,
        )

    # Phases

    async def _join_first(self) -> None:
        await self._join(self._plan.scales[0] if self._plan.long_s else 3)

    async def _play_phases(self) -> None:
        if self._plan.long_s:
            await self._phase("2 workers for 1, one long job", self._meet_long_job)
        else:
            await self._play_rollouts()

    async def _play_rollouts(self) -> None:
        plan = self._plan
        for _ in range(plan.restarts):
            await self._phase("restart", self._restart)
        for count in plan.scales:
            await self._phase(f"{len(self._members)} → {count} workers", partial(self._scale, count))
        for number in range(plan.returns):
            await self._phase("join, then leave", partial(self._return, is_settled=number % 2 == 1))

    async def _phase(self, name: str, act: Callable[[], Awaitable[None]]) -> None:
        before, began = self._counts(), self._loop.time()
        generations = {process: len(process.lines("partitions.changed")) for process in self._stage.processes}
        await act()
        await self._settled()
        waits = [float(str(line["waited_s"])) for line in self._lines("partition.moved")][before[0] :]
        moves, cuts = (new - old for new, old in zip(self._counts(), before, strict=True))
        rebalances = max(
            len(process.lines("partitions.changed")) - generations.get(process, 0)
            for process in self._stage.processes
        )
        phase = Phase(name, self._loop.time() - began, rebalances, moves, max(waits, default=0.0), cuts)
        self._phases.append(phase)
        if self._plan.kills:
            await self._kill()

    async def _restart(self) -> None:
        process = self._members[0]
        name = self._names[process]
        await self._leave([process])
        await self._join(1, name)

    async def _scale(self, count: int) -> None:
        if count > len(self._members):
            await self._join(count - len(self._members))
        else:
            await self._leave(self._members[: len(self._members) - count])

    async def _return(self, *, is_settled: bool) -> None:
        await self._join(1)
        await asyncio.sleep(self._plan.job_s / 2)
        if is_settled:
            await self._settled()
        await self._leave(self._members[-1:])

    async def _kill(self) -> None:
        """Kill a worker, and start another one."""
        process = self._chance.choice(self._members)
        self._members.remove(process)
        self._killed_at[process.name] = self._loop.time()
        await process.kill()
        await self._join(1, self._names[process])
        await self._settled()

    async def _meet_long_job(self) -> None:
        deltas = round(self._plan.long_s / 0.2)
        await self._stage.submit(_LONG, f"practice?deltas={deltas}&pace_ms=200", partition=0)
        await self._stage.until(lambda: self._stage.deltas(_LONG))
        await self._join(1)

    # Workers

    async def _join(self, count: int, name: str | None = None) -> None:
        plan = self._plan
        joined = []
        for _ in range(count):
            instance = name or f"member-{secrets.token_hex(3)}"
            static = {"worker__group_instance_id": instance} if plan.is_static else {}
            caller = f"run-{len(self._stage.processes)}"  # the name of the process that is started next
            process = await self._stage.process(
                worker__delivery=plan.delivery,
                worker__drain_timeout_s=3 * plan.job_s,
                worker__move_timeout_s=plan.move_timeout_s,
                worker__session_timeout_s=plan.session_timeout_s,
                **static,
                **{f"upstreams__default__headers__{_WORKER}": caller},
            )
            self._names[process] = instance
            joined.append(process)
        self._members += joined
        for process in joined:
            await process.logged("worker.started", limit_s=LIMIT_S)

    async def _leave(self, processes: list[Process]) -> None:
        self._members = [process for process in self._members if process not in processes]
        for process in processes:
            process.signal(signal.SIGTERM)
        for process in processes:
            if code := await process.exit_code(LIMIT_S):
                raise AssertionError(f"{process.name} ended with {code}:\n{process.tail()}")

    async def _settled(self) -> None:
        """Wait until every partition has an owner among the members, in equal parts."""
        async with asyncio.timeout(LIMIT_S):
            while not self._is_settled():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.1)

    def _is_settled(self) -> bool:
        owned = [lines[-1]["owned"] for p in self._members if (lines := p.lines("partitions.changed"))]
        is_whole = len(owned) == len(self._members) and sum(owned) == self._plan.partitions
        return is_whole and max(owned) - min(owned) <= 1

    # Load

    @contextlib.asynccontextmanager
    async def _load(self) -> AsyncIterator[None]:
        """Submit jobs to all partitions in turn until the block ends, then wait for all of them."""
        submitting = asyncio.create_task(self._submit())
        try:
            yield
        finally:
            submitting.cancel()
            await asyncio.wait([submitting])
        await self._stage.ended(limit_s=LIMIT_S)

    async def _submit(self) -> None:
        model = f"practice?deltas={round(self._plan.job_s / 0.2)}&pace_ms=200"
        began, number = self._loop.time(), 0
        while True:
            await self._stage.submit(f"job-{number}", model, partition=number % self._plan.partitions)
            number += 1
            await asyncio.sleep(max(0.0, began + number / self._plan.jobs_per_s - self._loop.time()))

    # Results

    def _lines(self, event: str) -> list[dict[str, object]]:
        found = [line for process in self._stage.processes for line in process.lines(event)]
        return sorted(found, key=lambda line: str(line["timestamp"]))

    def _counts(self) -> tuple[int, int]:
        """Return the deferred moves, and the partitions that were lost with open streams."""
        return len(self._lines("partition.moved")), len(self._lines("partition.streams_cut"))

    def _repeated(self) -> dict[str, int]:
        counts = {job.job_id: len(self._stage.calls(job.job_id)) for job in self._stage.jobs}
        return {job_id: count for job_id, count in counts.items() if count != 1}

    def _unexplained(self, repeated: dict[str, int]) -> list[str]:
        """Return the jobs that were called again although the worker of the former call was not killed during it.

        One call of the long job is explained as well.
        """
        found = []
        for job_id in repeated:
            cut = self._stage.calls(job_id)[:-1]
            if job_id == _LONG and len(cut) == 1:
                continue
            if not cut or not all(map(self._cut_by_kill, cut)):
                found.append(f"{job_id}: {len(cut) + 1} calls; {self._times(job_id)}")
        if self._plan.long_s and repeated.get(_LONG) != 2:
            found.append(f"the long job had {repeated.get(_LONG, 1)} calls")
        return found

    def _cut_by_kill(self, call: Call) -> bool:
        """Whether the worker that made a call was killed while it was open, or before its end was committed."""
        died_at = self._killed_at.get(call.headers.get(_WORKER, ""))
        if died_at is None or call.ended_at is None:
            return False
        return call.started_at - _DEATH_S <= died_at and abs(call.ended_at - died_at) <= _DEATH_S

    def _late(self) -> list[str]:
        longest = max(self._plan.job_s, min(self._plan.long_s, self._plan.move_timeout_s)) + SLACK_S
        if self._plan.kills:  # a rebalance waits for a member that is gone, for its session
            longest += self._plan.session_timeout_s
        return [
            f"{line['partition']}: moved after {line['waited_s']} s"
            for line in self._lines("partition.moved")
            if float(str(line["waited_s"])) > longest
        ]

    def _times(self, job_id: str) -> str:
        """Return who made the job's calls and when, and when workers were killed: seconds since its first call."""
        calls = self._stage.calls(job_id)
        began = calls[0].started_at if calls else 0.0
        spans = [
            f"{call.headers.get(_WORKER)} {call.started_at - began:.1f} to {(call.ended_at or began) - began:.1f}"
            for call in calls
        ]
        deaths = {name: round(at - began, 1) for name, at in self._killed_at.items()}
        return f"calls {', '.join(spans)}; deaths {deaths}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.moves", description=__doc__)
    parser.add_argument("--static", dest="is_static", action="store_true", help="static membership")
    parser.add_argument("--kills", action="store_true", help="kill a worker between two moves")
    parser.add_argument(
        "--long", action="store_true", help="one job that is longer than worker.move_timeout_s"
    )
    parser.add_argument("--logs", type=Path, help="keep the workers' logs in this directory")
    for field in ("job_s", "jobs_per_s", "partitions", "restarts", "returns", "delivery", "seed"):
        default = Plan._field_defaults[field]
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    logs = arguments.pop("logs")
    if arguments.pop("long"):
        arguments |= {"long_s": 60.0, "move_timeout_s": 20.0}
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    broker = ApacheKafka()
    with tempfile.TemporaryDirectory() as scratch:
        broker.start()
        try:
            report = asyncio.run(
                play(
                    Plan(**arguments),
                    broker,
                    lambda name: f"moves.{name}.{secrets.token_hex(3)}",
                    logs or Path(scratch),
                )
            )
        finally:
            broker.stop()
    show(report)
    return 1 if report.breaches else 0


def show(report: Report) -> None:
    """Print a report."""
    write = sys.stdout.write
    write(f"{'phase':32} {'seconds':>8} {'rebalances':>11} {'moves':>6} {'longest wait':>13} {'cut':>4}\n")
    for phase in report.phases:
        write(
            f"{phase.name:32} {phase.seconds:8.1f} {phase.rebalances:11} {phase.moves:6} "
            f"{phase.longest_wait_s:11.1f} s {phase.cuts:4}\n"
        )
    extra = report.calls - report.jobs
    whose = f", of {', '.join(sorted(report.repeated))}" if 0 < len(report.repeated) <= 5 else ""
    write(f"{report.jobs} jobs, {report.calls} calls ({extra} repeated{whose}) in {report.seconds:.0f} s\n")
    if report.kills:
        write(
            f"{report.cut_by_kills} calls ended with the worker that had made them, in {report.kills} kills\n"
        )
    for breach in report.breaches:
        write(f"    {breach}\n")


if __name__ == "__main__":
    sys.exit(main())
