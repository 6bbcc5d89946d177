"""Run one contender in one scenario, and measure it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import orjson

from benchmarks.processes import CPU_RESOLUTION_S, Usage, started, usage_of
from benchmarks.scenarios import Scenario
from benchmarks.watcher import Watcher
from streamworker.config import load
from streamworker.demo.child import free_port
from streamworker.kafka.sink import publish
from streamworker.kafka.topics import open_admin

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CONTENDERS", "Contender", "Figures", "Stage"]

WARM_UP = Scenario("warm-up", 8, deltas=20)
START_S = 60
END_S = 120
SETTLE_S = 1.0
IDLE_CHECKS = 20
KEEPS_UP = 0.97


class Contender(NamedTuple):
    """A program that is measured. Scenarios with more than `ceiling` deltas per second are skipped.

    `directory` is the checkout in which it runs; None for this one. `hides` names modules that it cannot import.
    `has_results` gives it a results topic.
    """

    name: str
    module: str
    ceiling: float
    directory: Path | None = None
    hides: tuple[str, ...] = ()
    has_results: bool = False


CONTENDERS = (
    Contender("limit", "benchmarks.contenders.limit", 1e9),
    Contender("streamworker", "streamworker", 1e9, hides=("bpe_openai",)),
    Contender("with tokenizer", "streamworker", 1e9),
    Contender("with results", "streamworker", 1e9, hides=("bpe_openai",), has_results=True),
    Contender("naive", "benchmarks.contenders.naive", 20_000),
    Contender("faststream", "benchmarks.contenders.faststream_docs", 2000),
)


class Figures(NamedTuple):
    """The measurements of one run. Times in µs (per delta), ms (latency) and seconds; memory in KiB per open stream."""

    contender: str
    scenario: str
    cpu_us: float
    per_core: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    stream_kib: float | None
    ramp_s: float
    lag_ms: float | None
    deltas: int
    offered: float
    sustained: float
    fault: str | None


class Stage:
    """A broker and an upstream, for one contender at a time."""

    def __init__(self, bootstrap: str, upstream_port: int, directory: Path, *, partitions: int) -> None:
        """Use a running broker and upstream. Topics get `partitions` partitions; logs go to `directory`."""
        self._bootstrap = bootstrap
        self._upstream = f"http://127.0.0.1:{upstream_port}"
        self._directory = directory
        self._partitions = partitions
        self._runs = 0

    async def run(self, contender: Contender, scenario: Scenario, window_s: float) -> Figures:
        """Start the contender, warm it up, run the scenario."""
        self._runs += 1
        jobs, events = await self._topics(contender)
        metrics_port = free_port()
        log = self._directory / f"{self._runs}-{contender.name}.log"
        async with Watcher(self._bootstrap, events, self._partitions) as watcher:
            with self._contender(contender, jobs, events, metrics_port, log) as pid:
                await self._publish(jobs, WARM_UP, "warm")
                if not await watcher.until(lambda: watcher.ended >= WARM_UP.streams, START_S):
                    raise SystemExit(f"{contender.name} did not end its first jobs; see {log}")
                await _idle(pid)
                watcher.forget()
                before = usage_of(pid)
                begun = time.monotonic()
                await self._publish(jobs, scenario, "job")
                measure = self._paced if scenario.rate else self._unpaced
                figures = await measure(contender, scenario, watcher, pid, before, begun, window_s)
                if contender.module == "streamworker":
                    figures = figures._replace(lag_ms=await asyncio.to_thread(_loop_lag_ms, metrics_port))
        return figures

    async def _paced(
        self,
        contender: Contender,
        scenario: Scenario,
        watcher: Watcher,
        pid: int,
        before: Usage,
        begun: float,
        window_s: float,
    ) -> Figures:
        fault = None
        if not await watcher.until(lambda: len(watcher.open) >= scenario.streams, START_S):
            fault = f"only {len(watcher.open)} streams opened"
        ramp_s = time.monotonic() - begun
        await asyncio.sleep(SETTLE_S)
        first, start, at = usage_of(pid), len(watcher.ages), time.monotonic()
        offered = await self._account("stats")
        await asyncio.sleep(window_s)
        last, end, took = usage_of(pid), len(watcher.ages), time.monotonic() - at
        written = (await self._account("stats"))["written"] - offered["written"]
        account = await self._account("finish")
        if account["withheld"] or end - start < KEEPS_UP * written:
            fault = f"falls behind: {(end - start) / written:.0%} of the deltas"
        elif not await watcher.until(lambda: watcher.ended >= scenario.streams, END_S):
            fault = f"only {watcher.ended} jobs ended"
        return _figures(
            contender,
            scenario,
            fault,
            ages=sorted(watcher.ages[start:end]),
            cpu_s=last.cpu_s - first.cpu_s,
            seconds=took,
            stream_kib=(last.resident - before.resident) / 1024 / scenario.streams,
            ramp_s=ramp_s,
        )

    async def _unpaced(
        self,
        contender: Contender,
        scenario: Scenario,
        watcher: Watcher,
        pid: int,
        before: Usage,
        begun: float,
        _window_s: float,
    ) -> Figures:
        fault = None
        if not await watcher.until(lambda: watcher.ended >= scenario.streams, END_S):
            fault = f"only {watcher.ended} jobs ended"
        seconds = time.monotonic() - begun
        after = usage_of(pid)
        return _figures(
            contender,
            scenario,
            fault,
            ages=sorted(watcher.ages),
            cpu_s=after.cpu_s - before.cpu_s,
            seconds=seconds,
            stream_kib=None,
            ramp_s=seconds,
        )

    async def _topics(self, contender: Contender) -> tuple[str, str]:
        """Create topics for this run."""
        settings = load(None, self._kafka_environment(contender))
        async with open_admin(settings) as admin:
            await admin.create(partitions=self._partitions)
        return settings.topics.jobs[0], settings.topics.events

    def _kafka_environment(self, contender: Contender) -> dict[str, str]:
        """Return the broker and this run's topics, as streamworker's settings."""
        kinds = ["jobs", "events", "control", "dlq", *(["results"] if contender.has_results else [])]
        topics = {f"STREAMWORKER_TOPICS__{kind.upper()}": f"bench.{kind}.{self._runs}" for kind in kinds}
        return {"STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": self._bootstrap, **topics}

    @contextmanager
    def _contender(
        self, contender: Contender, jobs: str, events: str, metrics_port: int, log: Path
    ) -> Iterator[int]:
        base_url = f"{self._upstream}/v1"
        environment = {
            "BENCH_BOOTSTRAP": self._bootstrap,
            "BENCH_BASE_URL": base_url,
            "BENCH_JOBS": jobs,
            "BENCH_EVENTS": events,
            **self._kafka_environment(contender),
            "STREAMWORKER_WORKER__GROUP_ID": jobs,
            "STREAMWORKER_WORKER__MAX_IN_FLIGHT": "4096",
            # The defaults of now, for versions that had others, which this run's topics refuse.
            "STREAMWORKER_KAFKA__MAX_RECORD_BYTES": "1000000",
            "STREAMWORKER_WORKER__MAX_JOB_BYTES": "1000000",
            "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": base_url,
            "STREAMWORKER_TELEMETRY__HTTP_HOST": "127.0.0.1",
            "STREAMWORKER_TELEMETRY__HTTP_PORT": str(metrics_port),
        }
        environment["PYTHONPATH"] = os.pathsep.join(self._path(contender))
        arguments = [contender.module, *(["run"] if contender.module == "streamworker" else [])]
        with started(arguments, environment, log, contender.directory) as pid:
            yield pid

    def _path(self, contender: Contender) -> list[str]:
        """Return the module path: the checkout, and before it modules that cannot be imported."""
        hidden = self._directory / f"hidden-{self._runs}"
        hidden.mkdir()
        # `site` imports this module at the start; a module that is None in `sys.modules` cannot be imported or found.
        (hidden / "sitecustomize.py").write_text(
            f"import sys\nsys.modules.update(dict.fromkeys({contender.hides!r}))\n"
        )
        return [str(hidden), str(contender.directory or Path.cwd())]

    async def _publish(self, topic: str, scenario: Scenario, prefix: str) -> None:
        """Publish the scenario's jobs."""
        settings = load(None, {"STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": self._bootstrap})
        request = {"model": scenario.model, "messages": [{"role": "user", "content": "Tell me a story."}]}
        entries = []
        for number in range(scenario.streams):
            job_id = f"{prefix}-{self._runs}-{number}"
            entries.append((job_id.encode(), orjson.dumps({"job_id": job_id, "request": request})))
        await publish(settings.kafka, topic, entries)

    async def _account(self, what: str) -> dict[str, int]:
        """Return the counts of what the upstream has written."""

        def ask() -> dict[str, int]:
            with urllib.request.urlopen(f"{self._upstream}/{what}", timeout=30) as answer:
                account: dict[str, int] = json.load(answer)
                return account

        return await asyncio.to_thread(ask)


async def _idle(pid: int) -> None:
    """Wait until a contender does nothing any more, such as loading a tokenizer: memory is compared with that of now."""
    for _ in range(IDLE_CHECKS):
        before = usage_of(pid).cpu_s
        await asyncio.sleep(SETTLE_S / 2)
        if usage_of(pid).cpu_s - before < SETTLE_S / 2 * 0.1:
            return


def _figures(
    contender: Contender,
    scenario: Scenario,
    fault: str | None,
    *,
    ages: list[int],
    cpu_s: float,
    seconds: float,
    stream_kib: float | None,
    ramp_s: float,
) -> Figures:
    deltas = len(ages)
    if not deltas:
        raise SystemExit(f"{contender.name}, {scenario.name}: no delta was read ({fault})")
    cpu_s = max(cpu_s, CPU_RESOLUTION_S)  # a short run may show no tick of the clock at all
    return Figures(
        contender=contender.name,
        scenario=scenario.name,
        cpu_us=cpu_s / deltas * 1e6,
        per_core=deltas / cpu_s,
        p50_ms=ages[deltas // 2] / 1000,
        p99_ms=ages[deltas * 99 // 100] / 1000,
        max_ms=ages[-1] / 1000,
        stream_kib=stream_kib,
        ramp_s=ramp_s,
        lag_ms=None,
        deltas=deltas,
        offered=scenario.offered,
        sustained=deltas / seconds,
        fault=fault,
    )


def _loop_lag_ms(port: int) -> float | None:
    """Return a worker's maximum event-loop lag of the last seconds, from its metrics."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        found = re.search(rb"^streamworker_event_loop_lag_seconds (\S+)", page.read(), re.MULTILINE)
        return float(found[1]) * 1000 if found else None
    print(f"no metrics on port {port}", file=sys.stderr)
    return None
