"""Run one seed: play its plan, wait for every job, then check every guarantee."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.brokers.apache import ApacheKafka
from tests.chaos.plan import Act, Plan
from tests.integration.checker import Breach, unfinished_below
from tests.integration.results import result_breaches
from tests.integration.stage import Process, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from streamworker.practice import PracticeUpstream
    from tests.conftest import Broker

__all__ = ["Outcome", "play"]

STALL_S = 60.0
"""Seconds without an event while jobs are open: longer than a session, a rebalance and a broker's start together."""

SAMPLE_S = 0.5
GRACE_S = 20.0
"""Seconds that a commit may be visible before its events: an open transaction of a dead worker hides them for 10 s."""


class Outcome(NamedTuple):
    """The counts of a run, and the guarantees that were broken."""

    plan: Plan
    breaches: list[Breach]
    counts: Counter[str]
    calls: int
    seconds: float

    def line(self) -> str:
        """Return a summary in one line."""
        jobs = len(self.plan.jobs)
        acts = ", ".join(f"{count} × {name}" for name, count in sorted(self.counts.items()))
        verdict = "ok" if not self.breaches else f"{len(self.breaches)} BREACHES"
        return f"seed {self.plan.seed}: {verdict}; {jobs} jobs in {self.seconds:.0f} s, {self.calls} upstream calls ({self.calls - jobs} paid twice); {acts}"


async def play(
    plan: Plan, broker: Broker, practice: PracticeUpstream, name: Callable[[str], str], directory: Path
) -> Outcome:
    """Play a plan to its end; return the outcome."""
    async with Stage(broker, practice, name, directory) as stage:
        await stage.open(partitions=plan.size.partitions, events_partitions=3, results_topic=name("results"))
        return await _Run(plan, broker, stage).play()


async def _ended_well(process: Process) -> bool:
    code = await process.exit_code()
    # The signal may arrive before the handler is installed.
    return code in {0, -signal.SIGKILL} or (code == -signal.SIGTERM and not process.lines("probes.listening"))


class _Run:
    def __init__(self, plan: Plan, broker: Broker, stage: Stage) -> None:
        self._plan = plan
        self._broker = broker
        self._stage = stage
        self._counts: Counter[str] = Counter()
        self._breaches: list[Breach] = []
        self._too_far: dict[str, Breach] = {}
        self._ended_at: dict[str, float] = {}
        self._asleep: set[Process] = set()
        self._leaving: set[Process] = set()
        self._started = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    async def play(self) -> Outcome:
        for _ in range(self._plan.size.workers):
            await self._join()
        watching = asyncio.create_task(self._watch())
        begun_at = self._loop.time()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._submit(begun_at))
            group.create_task(self._act(begun_at))
        for task in list(self._tasks):
            await task
        await self._see_all_end()
        watching.cancel()
        await asyncio.wait([watching])
        self._breaches += self._stage.breaches() + await self._stage.commit_breaches() + self._paid_again()
        self._breaches += await result_breaches(self._stage, self._stage.variables["TOPICS__RESULTS"])
        self._breaches += self._too_far.values()
        opened = sum(len(process.lines("partition.opened")) for process in self._stage.processes)
        self._counts["take-over"] = opened
        return Outcome(
            self._plan,
            self._breaches,
            self._counts,
            len(self._stage.practice.calls),
            self._loop.time() - begun_at,
        )

    # Acts

    async def _submit(self, begun_at: float) -> None:
        for job in self._plan.jobs:
            await self._until(begun_at + job.at_s)
            await self._stage.submit(job.job_id, job.model, partition=job.partition)

    async def _act(self, begun_at: float) -> None:
        for action in self._plan.actions:
            await self._until(begun_at + action.at_s)
            self._counts[action.act] += 1
            await self._do(action.act, action.whom, action.for_s)

    async def _do(self, act: Act, whom: float, for_s: float) -> None:
        busy = self._asleep | self._leaving
        awake = [process for process in self._stage.processes if process.is_running and process not in busy]
        chosen = awake[int(whom * len(awake))] if awake else None
        match act:
            case Act.JOIN:
                await self._join()
            case Act.KILL if chosen:
                await chosen.kill()
                self._later(self._join_after(for_s / 4))
            case Act.LEAVE if chosen and len(awake) > 1:
                chosen.signal(signal.SIGTERM)
                self._leaving.add(chosen)
            case Act.SLEEP if chosen:
                chosen.signal(signal.SIGSTOP)
                self._asleep.add(chosen)
                self._later(self._wake(chosen, for_s))
            case Act.BROKER_RESTART | Act.BROKER_KILL | Act.BROKER_PAUSE:
                assert isinstance(self._broker, ApacheKafka)
                await self._break_broker(self._broker, act, for_s)

    async def _break_broker(self, broker: ApacheKafka, act: Act, for_s: float) -> None:
        if act is Act.BROKER_PAUSE:
            await asyncio.to_thread(broker.pause)
            await asyncio.sleep(for_s)
            await asyncio.to_thread(broker.resume)
            return
        if act is Act.BROKER_KILL:
            await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(broker.restart)

    async def _join(self) -> None:
        over = {"worker__max_in_flight": self._plan.max_in_flight, "worker__max_deliveries": 1000}
        if self._plan.static_names:
            self._started += 1
            await self._stage.process(**over, worker__group_instance_id=f"member-{self._started}")
        else:
            await self._stage.process(**over)

    async def _join_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._join()

    async def _wake(self, process: Process, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if process.is_running:
            process.signal(signal.SIGCONT)
        self._asleep.discard(process)

    def _later(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _until(self, when: float) -> None:
        await asyncio.sleep(max(0.0, when - self._loop.time()))

    # Checks

    async def _see_all_end(self) -> None:
        if not any(process.is_running for process in self._stage.processes):
            await self._join()
        wanted = {job.job_id for job in self._plan.jobs}
        seen, since = -1, self._loop.time()
        while not wanted <= self._stage.terminals().keys():
            if len(self._stage.records) != seen:
                seen, since = len(self._stage.records), self._loop.time()
            if self._loop.time() - since > STALL_S:
                open_ = sorted(wanted - self._stage.terminals().keys())
                self._breaches.append(Breach("silent stall", ",".join(open_[:5]), f"{len(open_)} jobs open"))
                return
            for process in self._stage.processes:
                if not process.is_running and not await _ended_well(process):
                    self._breaches.append(Breach("worker crashed", process.name, process.tail()))
                    return
            await asyncio.sleep(0.1)

    async def _watch(self) -> None:
        """Check commits during the run: at its end a commit that was too far cannot be seen any more."""
        suspects: dict[tuple[int, str], float] = {}
        while True:
            await asyncio.sleep(SAMPLE_S)
            now = self._loop.time()
            for job_id in self._stage.terminals():
                self._ended_at.setdefault(job_id, now)
            with contextlib.suppress(Exception):  # the broker may be down
                committed = await asyncio.wait_for(self._stage.committed(), 2)
                found = {
                    (partition, breach.job_id): breach
                    for partition, point in committed.items()
                    for breach in unfinished_below(
                        point.offset, self._stage.jobs_topic, partition, self._stage.jobs, self._stage.records
                    )
                }
                suspects = {key: suspects.get(key, now) for key in found}
                late = [key for key, since in suspects.items() if now - since > GRACE_S]
                self._too_far |= {key[1]: found[key] for key in late}

    def _paid_again(self) -> list[Breach]:
        """Return a breach for each job that was called after its terminal event was visible."""
        return [
            Breach("finished job paid again", job_id, f"{call.started_at - ended_at:.1f} s after its end")
            for job_id, ended_at in self._ended_at.items()
            for call in self._stage.calls(job_id)
            if call.started_at > ended_at
        ]
