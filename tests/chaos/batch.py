"""One batch under crashes: `python -m tests.chaos.batch`, on Apache Kafka.

The command is killed (SIGKILL) at random moments and started again, and it is suspended (SIGSTOP) while another process of the run
continues elsewhere. Beside it, workers are killed and suspended, and the broker restarts. At the end every line is in exactly
one of the two files, in the shape of the openai SDK, and no line was called twice but those that a dead worker had in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from streamworker.practice import PracticeUpstream
from tests.brokers.apache import ApacheKafka
from tests.integration.batches import Command, Files, request, start_batch
from tests.integration.stage import Process, Stage

if TYPE_CHECKING:
    from streamworker.practice import Call

__all__ = ["Plan", "Report", "play"]

LIMIT_S = 1800.0
COMMIT_S = 5.0
"""How long before a worker's death a call may have ended whose job was not committed yet."""

READ_LATE_S = 1.0
"""How long after a worker's death the upstream may read a request that the worker had sent."""

MODELS = (
    "practice?deltas=2",
    "practice?deltas=3&shape=vllm",
    "practice?deltas=2&shape=groq&reasoning",
    "practice?deltas=4&tool_calls",
)
FAILING = "practice?status=400"


class Plan(NamedTuple):
    """One run."""

    lines: int = 50_000
    kills: int = 20
    zombies: int = 2
    worker_kills: int = 4
    worker_stops: int = 2
    restarts: int = 1
    workers: int = 2
    seed: int = 1


class Report(NamedTuple):
    """The outcome of a run. `breaches` is empty if every guarantee held."""

    breaches: list[str]
    seconds: float
    calls: int
    repeated: int
    deaths: int
    starts: int
    peak_mib: float

    def line(self) -> str:
        """Return a summary in one line."""
        verdict = "ok" if not self.breaches else f"{len(self.breaches)} BREACHES"
        return (
            f"{verdict}: {self.starts} starts of the command, {self.deaths} deaths or outages of workers, {self.calls} upstream "
            f"calls ({self.repeated} repeated), {self.seconds:.0f} s, peak memory of the command {self.peak_mib:.0f} MiB"
        )


def write_input(path: Path, count: int) -> list[str]:
    """Write the lines; return their custom ids."""
    ids = [f"request-{number}" for number in range(count)]
    with path.open("w") as file:
        for number, custom_id in enumerate(ids):
            model = FAILING if number % 500 == 499 else MODELS[number % len(MODELS)]
            file.write(json.dumps(request(custom_id, model)) + "\n")
    return ids


class _Run:
    def __init__(self, plan: Plan, stage: Stage, kafka: ApacheKafka, directory: Path) -> None:
        self._plan, self._stage, self._kafka = plan, stage, kafka
        self._random = random.Random(plan.seed)
        self._files = Files.of(directory)
        self._elsewhere = Files.of(directory / "elsewhere")
        self._deaths: list[tuple[float, float]] = []  # from, to
        self._starts = 0
        self._peak_kib = 0
        self._name = f"chaos-{secrets.token_hex(4)}"

    async def play(self) -> Report:
        started = time.monotonic()
        ids = write_input(self._files.input, self._plan.lines)
        self._elsewhere.input.parent.mkdir()
        self._elsewhere.input.hardlink_to(self._files.input)
        for _ in range(self._plan.workers):
            await self._stage.process()
        trouble = asyncio.create_task(self._trouble_workers())
        try:
            async with asyncio.timeout(LIMIT_S):
                await self._trouble_command()
                trouble.cancel()
                await asyncio.wait([trouble])
                breaches = await self._finish()
        finally:
            trouble.cancel()
        breaches += self._check_files(ids)
        repeated = self._repeated()
        breaches += self._unexplained(repeated)
        return Report(
            breaches,
            time.monotonic() - started,
            len(self._stage.practice.calls),
            sum(len(calls) - 1 for calls in repeated.values()),
            len(self._deaths),
            self._starts,
            self._peak_kib / 1024,
        )

    # The command

    async def _start(self, files: Files | None = None) -> Command:
        self._starts += 1
        return await start_batch(self._stage, (files or self._files).input, "--batch-id", self._name)

    async def _trouble_command(self) -> None:
        acts = ["kill"] * self._plan.kills + ["zombie"] * self._plan.zombies
        self._random.shuffle(acts)
        for act in acts:
            command = await self._start()
            if not await self._runs_for(command, self._random.uniform(0.2, 6)):
                return
            if act == "kill":
                await command.kill()
            else:
                await self._suspend(command)

    async def _suspend(self, command: Command) -> None:
        """Suspend the command while another process of the run works elsewhere; it must then be refused."""
        command.send(signal.SIGSTOP)
        other = await self._start(self._elsewhere)
        await self._runs_for(other, self._random.uniform(3, 8))
        await other.kill()
        command.send(signal.SIGCONT)
        await self._runs_for(command, 3)
        if command.child.returncode is None:
            await command.kill()

    async def _runs_for(self, command: Command, seconds: float) -> bool:
        """Wait; return whether the command still has work, or a reason to be started again."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._measure(command)
            if command.child.returncode is not None:
                return not (self._files.output.exists() and not self._files.record.exists())
            await asyncio.sleep(0.05)
        return True

    def _measure(self, command: Command) -> None:
        with contextlib.suppress(OSError, IndexError, ValueError):
            text = Path(f"/proc/{command.child.pid}/status").read_text()
            self._peak_kib = max(self._peak_kib, int(text.split("VmHWM:")[1].split()[0]))

    async def _finish(self) -> list[str]:
        """Start the command until it is done: 3 says run it again."""
        for _ in range(20):
            command = await self._start()
            while command.child.returncode is None:
                self._measure(command)
                await asyncio.sleep(0.2)
            code = await command.ends()
            click.echo("\n".join(command.text.strip().splitlines()[-4:]))
            if code != 3:
                return [] if code in {0, 1} else [f"the command ended with {code}: {command.text[-2000:]}"]
        return ["the command did not finish in 20 starts"]

    # The workers

    async def _trouble_workers(self) -> None:
        plan = self._plan
        acts = ["kill"] * plan.worker_kills + ["stop"] * plan.worker_stops + ["restart"] * plan.restarts
        self._random.shuffle(acts)
        for act in acts:
            await asyncio.sleep(self._random.uniform(4, 12))
            started = asyncio.get_running_loop().time()
            if act == "restart":
                await asyncio.to_thread(self._kafka.restart)
            else:
                process = self._random.choice([one for one in self._stage.processes if one.is_running])
                await (self._kill(process) if act == "kill" else self._stop(process))
            self._deaths.append((started, asyncio.get_running_loop().time()))

    async def _kill(self, process: Process) -> None:
        await process.kill()
        await self._stage.process()

    async def _stop(self, process: Process) -> None:
        """Suspend a worker for longer than its session, so that another one takes its jobs."""
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(9)
        process.signal(signal.SIGCONT)

    # The guarantees

    def _check_files(self, ids: list[str]) -> list[str]:
        try:
            self._files.check(ids)
        except AssertionError as error:
            return [f"files: {str(error)[:2000]}"]
        leftovers = [
            name for name in self._files.leftovers() if not name.startswith(("worker-", "elsewhere"))
        ]
        return [f"left over: {leftovers}"] if leftovers else []

    def _repeated(self) -> dict[str, list[Call]]:
        """Return the calls of each prompt that was called more than once."""
        by_prompt: dict[str, list[Call]] = {}
        for call in self._stage.practice.calls:
            if call.body:
                by_prompt.setdefault(call.body["messages"][0]["content"], []).append(call)
        return {prompt: calls for prompt, calls in by_prompt.items() if len(calls) > 1}

    def _unexplained(self, repeated: dict[str, list[Call]]) -> list[str]:
        """Return the repeated calls that no death of a worker explains."""
        found = []
        for prompt, calls in repeated.items():
            for call in calls[:-1]:
                ended = call.ended_at if call.ended_at is not None else float("inf")
                if not any(
                    call.started_at <= to + READ_LATE_S and ended >= start - COMMIT_S
                    for start, to in self._deaths
                ):
                    found.append(f"called again without a death: {prompt}")
        return found


async def play(plan: Plan, kafka: ApacheKafka, directory: Path) -> Report:
    """Run a plan to its end."""

    def name(what: str) -> str:
        return f"batch.{what}.{secrets.token_hex(4)}"

    async with (
        PracticeUpstream(maxlen=4 * plan.lines, content_limit=0) as practice,
        Stage(kafka, practice, name, directory) as stage,
    ):
        await stage.open(partitions=4, events_partitions=4, results_topic=name("results"))
        assert stage._reading is not None
        stage._reading.cancel()  # this process needs no events, and they would fill its memory
        await asyncio.wait([stage._reading])
        stage.variables["WORKER__ON_NO_OFFSET"] = "earliest"
        return await _Run(plan, stage, kafka, directory).play()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.batch", description=__doc__)
    for field, default in Plan._field_defaults.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    arguments = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    kafka = ApacheKafka()
    kafka.start()
    try:
        with tempfile.TemporaryDirectory(prefix="streamworker-batch-chaos-") as directory:
            report = asyncio.run(play(Plan(**vars(arguments)), kafka, Path(directory)))
    finally:
        kafka.stop()
    click.echo(report.line())
    for kind, count in Counter(breach.split(":")[0] for breach in report.breaches).items():
        click.echo(f"  {count} × {kind}")
    for breach in report.breaches[:20]:
        click.echo(f"  {breach}")
    return bool(report.breaches)


if __name__ == "__main__":
    sys.exit(main())
