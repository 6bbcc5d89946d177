"""Thousands of clients of two gateways that die: `python -m tests.chaos.gateway`, on Apache Kafka.

Clients of server-sent events and websockets follow jobs that are submitted all the time. Gateways and workers are killed with
SIGKILL, the broker is restarted, and another producer leaves its transaction open. Clients connect again with the id of their last
event, at the other gateway. The run checks that each stream has what an `EventReader` over the topic gives, and one `usage`; that an
open transaction delays no delta; and that after a restart of both gateways each part of the log is read once for all clients.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import httpx
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import KafkaError

from streamworker.client.ids import new_job_id
from streamworker.demo.child import free_port
from streamworker.descriptors import raise_nofile_limit
from streamworker.practice import PracticeUpstream
from streamworker.reader import EventReader, Notice
from tests.brokers.apache import ApacheKafka
from tests.chaos.gateway_clients import Got, Job, Jobs, Replica, SseClient, Stream, WebsocketClient
from tests.integration.stage import Process, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["FULL", "SHORT", "Report", "Size", "play"]

SUBSCRIPTIONS = 4
"""Jobs that a websocket follows at once."""

DELAY_S = 0.1
"""By how much an open transaction may delay deltas. It would delay all of them; a busy machine delays a few at any time."""

REASSIGNED_S = 10.0
"""The time until the jobs of a worker that was killed run in another one: its session, and the rebalance."""

LIMIT_S = 180.0


class Size(NamedTuple):
    """The size of a run. `live` jobs are open at a time; each has `deltas` deltas, one in `pace_ms`."""

    sse: int
    websockets: int
    live: int
    deltas: int
    pace_ms: int
    window_s: float
    """How long deltas are measured, without and with an open transaction."""

    chaos_s: float
    partitions: int = 8


FULL = Size(sse=5000, websockets=200, live=96, deltas=30, pace_ms=1000, window_s=10, chaos_s=90)
SHORT = Size(sse=150, websockets=10, live=12, deltas=12, pace_ms=250, window_s=2, chaos_s=8, partitions=3)


class Report(NamedTuple):
    """The results of a run. `breaches` is what must not happen."""

    lines: list[str]
    breaches: list[str]


async def play(size: Size, seed: int, broker: ApacheKafka, directory: Path) -> Report:
    """Run one seed; return the report."""
    tag = secrets.token_hex(3)
    async with (
        PracticeUpstream() as practice,
        Stage(broker, practice, lambda name: f"chaos-gateway.{name}.{tag}", directory) as stage,
    ):
        await stage.open(partitions=4, events_partitions=size.partitions)
        return await _Run(size, seed, broker, stage).play()


class _Run:
    def __init__(self, size: Size, seed: int, broker: ApacheKafka, stage: Stage) -> None:
        self._size = size
        self._chance = random.Random(seed)
        self._broker = broker
        self._stage = stage
        ports = [(free_port(), free_port()) for _ in range(2)]
        self._replicas = (Replica(ports[0][0]), Replica(ports[1][0]))
        self._probes = {replica: probe for replica, (_, probe) in zip(self._replicas, ports, strict=True)}
        self._gateways: dict[Replica, Process] = {}
        self._workers: list[Process] = []
        self._jobs = Jobs(self._replicas, self._chance)
        self._jobs.now_ms = lambda: time.time_ns() // 1_000_000
        self._submitted: set[str] = set()
        self._read = 0
        self._counts: Counter[str] = Counter()
        self._worker_killed_at = -math.inf
        self._lines: list[str] = []
        self._breaches: list[str] = []
        self._loop = asyncio.get_running_loop()

    async def play(self) -> Report:
        size = self._size
        await asyncio.gather(*(self._start_gateway(replica) for replica in self._replicas))
        for _ in range(2):
            await self._start_worker()
        submitting = asyncio.create_task(self._submit())
        clients: list[SseClient | WebsocketClient] = [
            SseClient(self._jobs, self._replicas[number % 2], checks_end=number % 10 == 0)
            for number in range(size.sse)
        ]
        clients += [
            WebsocketClient(self._jobs, self._replicas[number % 2], SUBSCRIPTIONS)
            for number in range(size.websockets)
        ]
        began = self._loop.time()
        following = []
        for number, client in enumerate(clients):
            following.append(asyncio.create_task(client.run()))
            if number % 10 == 0:
                await asyncio.sleep(0.01)
        await self._until_followed()
        self._say(f"{size.sse} event streams and {size.websockets} websockets follow {size.live} jobs", began)
        await self._measure_transaction()
        await self._measure_restart()
        await self._act()
        await self._end(submitting, following)
        await self._audit()
        return Report(self._lines, self._breaches)

    def _say(self, line: str, began: float | None = None) -> None:
        line += "" if began is None else f", after {self._loop.time() - began:.1f} s"
        self._lines.append(line)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    async def _until_followed(self) -> None:
        """Wait until nine of ten clients have events on their connection; the others are between two jobs."""
        await eventually(
            lambda: self._jobs.following >= 0.9 * self._size.sse,
            LIMIT_S,
            lambda: f"{self._jobs.following} clients follow",
        )

    # Processes

    async def _start_gateway(self, replica: Replica) -> None:
        over = {
            "gateway__port": replica.port,
            "gateway__auth": "off",
            "gateway__drain_s": 1,
            "telemetry__http_port": self._probes[replica],
            "telemetry__log_level": "warning",
        }
        process = self._gateways[replica] = await self._stage.start_command("gateway", over)
        async with httpx.AsyncClient() as http:
            async with asyncio.timeout(LIMIT_S):
                while process.is_running:
                    with contextlib.suppress(httpx.HTTPError):
                        ready = await http.get(f"http://127.0.0.1:{self._probes[replica]}/readyz")
                        if ready.status_code == 200:
                            return
                    await asyncio.sleep(0.05)
        raise AssertionError(f"a gateway has ended: {process.tail()}")

    async def _start_worker(self) -> None:
        self._workers.append(
            await self._stage.process(
                worker__max_deliveries=1000, worker__max_in_flight=1000, telemetry__log_level="warning"
            )
        )

    # Jobs

    async def _submit(self) -> None:
        """Keep as many jobs open as are to be."""
        size, jobs = self._size, self._jobs
        model = f"practice?deltas={size.deltas}&pace_ms={size.pace_ms}"
        apart_s = size.deltas * size.pace_ms / 1000 / size.live
        async with httpx.AsyncClient(timeout=20) as http:
            while not jobs.is_closing:
                self._close_ended()
                if len(jobs.open) < size.live:
                    await self._submit_one(http, model)
                else:
                    await asyncio.sleep(0.05)
                await asyncio.sleep(min(0.1, apart_s))

    def _close_ended(self) -> None:
        """Have no more clients follow jobs whose terminal event is committed."""
        records = self._stage.records
        for record in records[self._read :]:
            if record.event.get("type") == "usage":
                self._jobs.open.pop(record.event["job_id"], None)
        self._read = len(records)

    async def _submit_one(self, http: httpx.AsyncClient, model: str) -> None:
        job_id = new_job_id()
        request = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        while True:
            replica = self._chance.choice(self._replicas)
            try:
                answer = await http.post(
                    f"http://127.0.0.1:{replica.port}/v1/jobs", json={"job_id": job_id, "request": request}
                )
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
                continue
            if answer.status_code == 202:
                break
            await asyncio.sleep(0.1)
        self._submitted.add(job_id)
        self._jobs.open[job_id] = Job(job_id, answer.json()["cursor"])
        async with self._jobs.changed:
            self._jobs.changed.notify_all()

    # Measurements

    async def _measure_transaction(self) -> None:
        """Compare the delays of deltas without and with a transaction of another producer that is open."""
        await asyncio.sleep(self._size.window_s / 2)  # the clients have just connected
        quiet = await self._delays()
        async with self._open_transaction():
            held = await self._delays()
        (p50, p90, p99), (held_p50, held_p90, held_p99) = _percentiles(quiet), _percentiles(held)
        self._say(
            f"delay of {len(held)} deltas behind an open transaction: p50 {held_p50} ms, p90 {held_p90} ms, p99 {held_p99} ms, max {max(held)} ms; "
            f"without it ({len(quiet)}) p50 {p50} ms, p90 {p90} ms, p99 {p99} ms, max {max(quiet)} ms"
        )
        if held_p50 - p50 > DELAY_S * 1000:
            self._breaches.append(
                f"an open transaction delays deltas: p50 {p50} ms without, {held_p50} ms with it"
            )

    async def _delays(self) -> list[int]:
        delays = self._jobs.delays = []
        await asyncio.sleep(self._size.window_s)
        self._jobs.delays = None
        return delays

    @contextlib.asynccontextmanager
    async def _open_transaction(self) -> Any:
        """Leave a transaction open in every partition of the events topic."""
        self._counts["open transaction"] += 1
        producer = AIOKafkaProducer(
            bootstrap_servers=self._broker.bootstrap,
            transactional_id=f"stranger-{secrets.token_hex(3)}",
            transaction_timeout_ms=30_000,
        )
        await producer.start()
        try:
            await producer.begin_transaction()
            for partition in range(self._size.partitions):
                await producer.send_and_wait(
                    self._stage.events_topic, b"{}", key=b"stranger", partition=partition
                )
            yield
            await producer.abort_transaction()
        finally:
            await producer.stop()

    async def _measure_restart(self) -> None:
        """Kill both gateways, start them again, and compare what they read with what their clients have missed."""
        began = self._loop.time()
        before = self._jobs.cuts
        await asyncio.gather(*(process.kill() for process in self._gateways.values()))
        await eventually(lambda: self._jobs.following == 0)
        await asyncio.sleep(self._size.window_s / 3)
        for replica in self._replicas:
            replica.cursors.clear()
        await asyncio.gather(*(self._start_gateway(replica) for replica in self._replicas))
        ready = self._loop.time()
        await self._until_followed()
        ends = await self._ends()
        for number, replica in enumerate(self._replicas):
            span = _span(replica.cursors, ends)
            scanned = await self._metric(replica, "gateway_records_scanned_total")
            searches = await self._metric(replica, "gateway_searched_records_total")
            self._say(
                f"gateway {number}: {len(replica.cursors)} clients connected again with their cursors; its replays read {scanned:.0f} "
                f"records, of {sum(span.values())} between the lowest cursors and the ends of {len(span)} partitions; searches passed {searches:.0f}"
            )
            # A search, for a job without an event behind its place, reads what is before the cursors.
            if scanned > sum(span.values()) + searches:
                self._breaches.append(
                    f"gateway {number} read {scanned:.0f} records to serve {sum(span.values())}"
                )
        self._say(
            f"both gateways killed and started again: ready after {ready - began:.1f} s, "
            f"{self._jobs.cuts - before} cuts and refused connections, all clients followed",
            began,
        )

    async def _ends(self) -> dict[int, int]:
        consumer = AIOKafkaConsumer(bootstrap_servers=self._broker.bootstrap)
        await consumer.start()
        try:
            topic = self._stage.events_topic
            wanted = [KafkaTopicPartition(topic, number) for number in range(self._size.partitions)]
            return {at.partition: end for at, end in (await consumer.end_offsets(wanted)).items()}
        finally:
            await consumer.stop()

    async def _metric(self, replica: Replica, name: str) -> float:
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://127.0.0.1:{self._probes[replica]}/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith(f"streamworker_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    # Acts

    async def _act(self) -> None:
        """Break something every few seconds."""
        until = self._loop.time() + self._size.chaos_s
        acts = [self._kill_gateway, self._kill_worker, self._kill_gateway, self._hold, self._restart_broker]
        number = 0
        while self._loop.time() < until:
            await acts[number % len(acts)]()
            number += 1
            await asyncio.sleep(self._chance.uniform(0.5, 3))
        await self._until_followed()
        acted = ", ".join(f"{count} × {name}" for name, count in sorted(self._counts.items()))
        self._say(f"{acted}; {self._jobs.cuts} cuts, {self._jobs.closings} streams closed by a gateway")

    async def _kill_gateway(self) -> None:
        replica = self._chance.choice(self._replicas)
        self._counts["kill -9 of a gateway"] += 1
        await self._gateways[replica].kill()
        await asyncio.sleep(self._chance.uniform(0, 1))
        await self._start_gateway(replica)

    async def _kill_worker(self) -> None:
        """Kill a worker, unless jobs of the last one that was killed may still run.

        Jobs that two workers died of run one at a time, for they may be the cause. Clients would wait for them.
        """
        job_s = self._size.deltas * self._size.pace_ms / 1000
        if self._loop.time() - self._worker_killed_at < job_s + REASSIGNED_S:
            return
        self._worker_killed_at = self._loop.time()
        self._counts["kill -9 of a worker"] += 1
        victim = self._workers.pop(0)
        await victim.kill()
        await self._start_worker()

    async def _hold(self) -> None:
        with contextlib.suppress(KafkaError):
            async with self._open_transaction():
                await asyncio.sleep(self._chance.uniform(1, 4))

    async def _restart_broker(self) -> None:
        self._counts["restart of the broker"] += 1
        await asyncio.to_thread(self._broker.restart)

    # The end

    async def _end(self, submitting: asyncio.Task[None], following: Sequence[asyncio.Task[None]]) -> None:
        began = self._loop.time()
        self._jobs.is_closing = True
        async with self._jobs.changed:
            self._jobs.changed.notify_all()
        await submitting
        _, open_ = await asyncio.wait(following, timeout=LIMIT_S)
        for task in open_:
            task.cancel()
        if open_:
            await asyncio.wait(open_)
            self._breaches.append(f"{len(open_)} clients got no terminal event within {LIMIT_S:g} s")
        for task in following:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        self._say(f"{len(self._jobs.streams)} streams of {len(self._submitted)} jobs have ended", began)

    async def _audit(self) -> None:
        expected = await self._expected()
        found = Counter[str]()
        for stream in self._jobs.streams:
            for breach in breaches_of(stream, expected.get(stream.job.job_id, {})):
                found[breach] += 1
        self._breaches += [f"{breach} ({count} streams)" for breach, count in found.most_common(20)]
        events = sum(len(stream.events) for stream in self._jobs.streams)
        self._say(
            f"audited {events} events of {len(self._jobs.streams)} streams with an EventReader over the topic"
        )

    async def _expected(self) -> dict[str, dict[str, list[Got]]]:
        """Read the topic as a committed reader; return each job's events by attempt, in the order of the attempts."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._broker.bootstrap,
            isolation_level="read_committed",
            enable_auto_commit=False,
            max_poll_records=5000,
        )
        await consumer.start()
        try:
            topic = self._stage.events_topic
            at = [KafkaTopicPartition(topic, number) for number in range(self._size.partitions)]
            consumer.assign(at)
            await consumer.seek_to_beginning(*at)
            ends = await self._ends()
            reader, expected = EventReader(), dict[str, dict[str, list[Got]]]()
            while any([await consumer.position(one) < ends[one.partition] for one in at]):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    for record in records:
                        _read(reader, record.key, record.value, expected)
            return expected
        finally:
            await consumer.stop()


def _read(reader: EventReader, key: bytes, value: bytes, expected: dict[str, dict[str, list[Got]]]) -> None:
    if key == b"stranger":
        return
    event = json.loads(value)
    for reading in reader.read(event):
        if reading.notice is Notice.VALID:
            attempt = f"{crc32(event['attempt'].encode()):08x}"
            attempts = expected.setdefault(event["job_id"], {})
            attempts.setdefault(attempt, []).append(Got(attempt, event["seq"], crc32(value)))


def breaches_of(stream: Stream, expected: dict[str, list[Got]]) -> list[str]:
    """Return what is wrong with what a client received, given the valid events of each attempt of its job."""
    if stream.faults:
        return stream.faults
    attempts: dict[str, list[Got]] = {}
    for got in stream.events:
        attempts.setdefault(got.attempt, []).append(got)
    if not expected:
        return ["a job without events in the topic was followed"]
    last = next(reversed(expected))
    if not attempts or next(reversed(attempts)) != last:
        return ["the last attempt is not the valid one"]
    found = []
    if attempts[last] != expected[last]:
        found.append("events of the valid attempt are missing, repeated or different")
    for attempt, events in attempts.items():
        # The events of a void attempt end where the next one begins; one whose `started` was rolled back is not in the topic.
        if attempt != last and attempt in expected and events != expected[attempt][: len(events)]:
            found.append("events of a void attempt are missing, repeated or different")
        if (
            attempt != last
            and attempt not in expected
            and [one.seq for one in events] != list(range(len(events)))
        ):
            found.append("events of an attempt that was rolled back are missing or repeated")
    return found


def _span(cursors: Sequence[str], ends: Mapping[int, int]) -> dict[int, int]:
    """Return the number of offsets, by partition, from the lowest cursor to the end."""
    lowest: dict[int, int] = {}
    for cursor in cursors:
        partition, offset = map(int, cursor.split(".")[:2])
        lowest[partition] = min(offset, lowest.get(partition, offset))
    return {partition: max(0, ends[partition] - offset) for partition, offset in lowest.items()}


def _percentiles(values: Sequence[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    count = len(ordered)
    return ordered[count // 2], ordered[count * 9 // 10], ordered[count * 99 // 100]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.gateway", description=__doc__)
    parser.add_argument("--size", choices=["full", "short"], default="full")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sse", type=int, help="clients of server-sent events (5000)")
    parser.add_argument("--websockets", type=int, help="websockets, each with four jobs (200)")
    parser.add_argument(
        "--seconds", type=float, help="time for which gateways, workers and the broker fail (90)"
    )
    parser.add_argument("--logs", type=Path, help="keep the logs of gateways and workers in this directory")
    arguments = parser.parse_args()
    size = FULL if arguments.size == "full" else SHORT
    over = {"sse": arguments.sse, "websockets": arguments.websockets, "chaos_s": arguments.seconds}
    size = size._replace(**{name: value for name, value in over.items() if value is not None})
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # messages of the readers in this process
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    raise_nofile_limit(2 * (size.sse + size.websockets))
    broker = ApacheKafka()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.logs or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        broker.start()
        try:
            report = asyncio.run(play(size, arguments.seed, broker, directory))
        finally:
            broker.stop()
    for breach in report.breaches:
        sys.stdout.write(f"BREACH: {breach}\n")
    return 1 if report.breaches else 0


if __name__ == "__main__":
    sys.exit(main())
