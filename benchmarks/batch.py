"""Measure `streamworker batch`: `python -m benchmarks.batch --lines 50000`, on Apache Kafka.

The same lines are run by the command and by the client library (`Client.map`), in turns, with the same window, workers and
upstream; wall times include the start of the process. The memory of the command is sampled every 0.2 s. With `--index`, a
file of this many lines is submitted without any worker: the memory of the index and of the submission.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from streamworker.client import Client
from streamworker.config import load
from streamworker.demo.child import free_port
from streamworker.kafka.topics import open_admin
from tests.brokers.apache import ApacheKafka

if TYPE_CHECKING:
    from collections.abc import Iterator

MAIN = (sys.executable, "-m", "streamworker")
MODEL = "practice?deltas=3"
SAMPLE_S = 0.2
PARTITIONS = 12
TEXT = "word " * 100


class Memory(NamedTuple):
    """Resident memory of a process in MiB: the largest, and the medians of the second and of the last quarter."""

    peak: float
    second_quarter: float
    last_quarter: float


def write_lines(path: Path, count: int) -> None:
    """Write a batch file with some 700 bytes per line."""
    with path.open("w") as file:
        for number in range(count):
            body = {"model": MODEL, "messages": [{"role": "user", "content": f"{number} {TEXT}"}]}
            line = {
                "custom_id": f"request-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")


def requests_of(path: Path) -> Iterator[dict[str, object]]:
    """Yield the requests of a batch file."""
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)["body"]


async def run_client(path: Path, window: int) -> None:
    """Run the lines with the client library, in this process."""
    completed = 0
    async with Client.from_settings() as client:
        async for result in client.map(requests_of(path), window=window):
            completed += result.status == "completed"
    print(completed)


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, list[float]]:
    """Run a process to its end; return its wall time and its resident memory over time, in MiB."""
    started = time.monotonic()
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    samples = []
    while process.poll() is None:
        samples.append(resident_mib(process.pid))
        time.sleep(SAMPLE_S)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(f"{arguments}: {process.stderr.read().decode() if process.stderr else ''}")
    return seconds, samples


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024 if "VmRSS:" in text else 0.0


def memory_of(samples: list[float]) -> Memory:
    """Summarise samples of memory."""
    quarter = max(1, len(samples) // 4)
    return Memory(max(samples), median(samples[quarter : 2 * quarter] or samples), median(samples[-quarter:]))


class Place:
    """Broker, upstream, workers and topics of one run."""

    def __init__(self, directory: Path, kafka: ApacheKafka) -> None:
        self._directory = directory
        self._children: list[subprocess.Popen[bytes]] = []
        self._port = free_port()
        name = secrets.token_hex(4)
        self.environment = {
            **os.environ,
            "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap,
            "STREAMWORKER_TOPICS__JOBS": f"jobs.{name}",
            "STREAMWORKER_TOPICS__EVENTS": f"events.{name}",
            "STREAMWORKER_TOPICS__CONTROL": f"control.{name}",
            "STREAMWORKER_TOPICS__DLQ": f"dlq.{name}",
            "STREAMWORKER_TOPICS__RESULTS": f"results.{name}",
            "STREAMWORKER_WORKER__GROUP_ID": f"group.{name}",
            "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL": f"http://127.0.0.1:{self._port}/v1",
            "STREAMWORKER_TELEMETRY__HTTP_PORT": "0",
            "STREAMWORKER_TELEMETRY__HTTP_HOST": "127.0.0.1",
            "STREAMWORKER_TELEMETRY__LOG_LEVEL": "warning",
        }

    async def create_topics(self) -> None:
        async with open_admin(load(None, self.environment)) as admin:
            await admin.create(partitions=PARTITIONS)

    def start(self, *arguments: str) -> None:
        log = (self._directory / f"{arguments[0]}-{len(self._children)}.log").open("wb")
        self._children.append(
            subprocess.Popen([*MAIN, *arguments], env=self.environment, stdout=log, stderr=log)
        )

    def start_workers(self, count: int) -> None:
        self.start("practice-upstream", "--port", str(self._port))
        for _ in range(count):
            self.start("run")

    def stop(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()


def compare(place: Place, directory: Path, lines: int, window: int, rounds: int) -> None:
    """Print the wall times of both, and the memory of the command."""
    path = directory / "requests.jsonl"
    write_lines(path, lines)
    write_lines(directory / "warm-up.jsonl", 500)
    timed([*MAIN, "batch", str(directory / "warm-up.jsonl")], place.environment)
    times: dict[str, list[float]] = {"client": [], "batch": []}
    for number in range(rounds):
        module = [sys.executable, "-m", "benchmarks.batch", "--client", str(path), "--window", str(window)]
        times["client"].append(timed(module, place.environment)[0])
        output = directory / f"out-{number}.jsonl"
        seconds, samples = timed(
            [*MAIN, "batch", str(path), "-o", str(output), "--window", str(window)], place.environment
        )
        times["batch"].append(seconds)
        memory = memory_of(samples)
        print(
            f"round {number + 1}: client {times['client'][-1]:.1f} s, batch {seconds:.1f} s; memory of batch: peak "
            f"{memory.peak:.0f} MiB, second quarter {memory.second_quarter:.0f}, last quarter {memory.last_quarter:.0f}",
            flush=True,
        )
        with output.open("rb") as file:
            assert sum(1 for _ in file) == lines
        output.unlink()
    client, batch = median(times["client"]), median(times["batch"])
    print(
        f"{lines:,} lines, window {window:,}: client library {lines / client:.0f} lines/s, batch {lines / batch:.0f} lines/s "
        f"({batch / client - 1:+.1%} time)"
    )


def index_only(place: Place, directory: Path, lines: int) -> None:
    """Submit a large file without workers; print the memory and the times."""
    path = directory / "large.jsonl"
    write_lines(path, lines)
    print(f"{lines:,} lines, {path.stat().st_size / 1e6:.0f} MB", flush=True)
    started = time.monotonic()
    arguments = [*MAIN, "batch", str(path), "--window", str(lines), "--progress", "json"]
    process = subprocess.Popen(arguments, env=place.environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    indexed = submitted = peak = 0.0
    for text in process.stderr:
        report = json.loads(text)
        if report["type"] == "progress" and report["state"] == "working":
            indexed = indexed or time.monotonic() - started
            if report["in_flight"] == lines:
                submitted = time.monotonic() - started
                peak = (
                    int(Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[0])
                    / 1024
                )
                break
    process.send_signal(signal.SIGTERM)
    process.wait()
    print(
        f"indexed after at most {indexed:.0f} s, all submitted after {submitted:.0f} s, peak {peak:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--index", type=int, metavar="LINES", help="submit a file of this size without workers"
    )
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is not None:
        asyncio.run(run_client(arguments.client, arguments.window))
        return
    kafka = ApacheKafka()
    kafka.start()
    try:
        with tempfile.TemporaryDirectory(prefix="streamworker-batch-bench-") as name:
            directory = Path(name)
            place = Place(directory, kafka)
            asyncio.run(place.create_topics())
            try:
                if arguments.index:
                    index_only(place, directory, arguments.index)
                else:
                    place.start_workers(arguments.workers)
                    compare(place, directory, arguments.lines, arguments.window, arguments.rounds)
            finally:
                place.stop()
    finally:
        kafka.stop()


if __name__ == "__main__":
    main()
