"""Measure the delivery of events to HTTP clients: `python -m benchmarks.gateway --face sse --clients 2000 --rate 5`.

A producer writes the deltas of many jobs to Apache Kafka in batches. One gateway delivers each job to one client. Beside it,
servers that make the same events themselves, and read no Kafka, write them to the same clients: a bare `asyncio.Protocol`,
which is the limit, and starlette on uvicorn, for event streams also with sse-starlette. Each runs in a process of its own;
the clients are raw sockets in another. With `--rounds`, all are measured one after another several times, and the medians
are printed: what a server costs depends on what else the processor's cache holds.

Per contender: CPU of the server per delivered event, resident memory per connection, and for the gateway the time from the
produce call to the client. What a gateway without clients uses to read the same topic is reported apart.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import sys
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, cast

import uvloop

from benchmarks.processes import started, usage_of
from streamworker.config import KafkaSettings
from streamworker.demo.child import free_port
from streamworker.kafka.sink import KafkaSink
from streamworker.model import ProducerRecord
from tests.brokers.apache import ApacheKafka
from tests.integration.events import started as started_event
from tests.integration.test_brokers import create

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JOBS, CONTROL = "bench.jobs", "bench.control"
PARTITIONS = 8
TICK_S = 0.01
SETTLE_S = 3.0
STAMP = b'"at":'
DIGITS = 16
PAD = "x" * 80


def delta_of(job_id: str, seq: int) -> bytes:
    """Return an event of about 250 bytes with the time in µs."""
    return (
        b'{"type":"delta","job_id":"%b","attempt":"a","seq":%d,"ts":%d,"choice":0,"delta":{"content":"%b"},'
        b'"finish_reason":null,"v":1,"at":%016d}'
        % (job_id.encode(), seq, time.time_ns() // 1_000_000, PAD.encode(), time.time_ns() // 1000)
    )


def job_name(number: int) -> str:
    """Return the id of a client's job."""
    return f"bench-{number}"


# The producer


async def feed(bootstrap: str, topic: str, clients: int, rate: float, go: Path) -> None:
    """Write `started` of each job, and when the file exists its deltas until the process is ended."""
    sink = KafkaSink(KafkaSettings(bootstrap_servers=bootstrap), [topic])
    await sink.start()
    keys = [job_name(number).encode() for number in range(clients)]
    places = [sink.partition_for(topic, key) for key in keys]
    receipt = sink.receipt()
    for key, place in zip(keys, places, strict=True):
        sink.publish(ProducerRecord(place, key, started_event(key.decode())), receipt)
    await receipt.settled()
    touch_ready(go)
    await until(go.exists)
    seqs = [0] * clients
    async for number in paced(clients, rate):
        seqs[number] += 1
        key = keys[number]
        sink.publish(ProducerRecord(places[number], key, delta_of(key.decode(), seqs[number])), receipt)


def touch_ready(go: Path) -> None:
    """Report that the producer has begun the jobs."""
    Path(f"{go}.ready").touch()


def is_ready(go: Path) -> bool:
    """Whether it has."""
    return Path(f"{go}.ready").exists()


async def until(condition: Callable[[], bool]) -> None:
    """Poll until a condition is true."""
    while not condition():  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.05)


async def paced(clients: int, rate: float) -> Any:
    """Yield the number of the client whose turn it is, `rate` times a second for each, in ticks of 10 ms."""
    due, sent, began = 0.0, 0, time.monotonic()
    while True:
        due = (time.monotonic() - began) * clients * rate
        while sent < due:
            yield sent % clients
            sent += 1
        await asyncio.sleep(TICK_S)


# The limit, and a usual server


class BareConnection(asyncio.Protocol):
    """Answers any request with an event stream or a websocket, and is written to by `serve_bare`."""

    def __init__(self, ready: list[asyncio.Transport]) -> None:
        self._ready = ready
        self._is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def data_received(self, data: bytes) -> None:
        if not self._is_open:
            self._is_open = True
            upgrade = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
            stream = (
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            self._transport.write(upgrade if b"Upgrade" in data else stream)
            self._ready.append(self._transport)


async def serve_bare(port: int, clients: int, rate: float, face: str) -> None:
    """Write an event to each connection, one per write, in chunks or frames."""
    ready: list[asyncio.Transport] = []
    await asyncio.get_running_loop().create_server(
        lambda: BareConnection(ready), "127.0.0.1", port, backlog=4096
    )
    await until(lambda: len(ready) >= clients)
    seq = 0
    async for number in paced(clients, rate):
        seq += 1
        value = delta_of(job_name(number), seq)
        if face == "sse":
            data = b"event: delta\nid: 0.%d.%d.e8b7be43\ndata: %b\n\n" % (seq, seq, value)
            data = b"%x\r\n%b\r\n" % (len(data), data)
        else:
            data = b'{"type":"event","id":"s","cursor":"0.%d.%d.e8b7be43","event":%b}' % (seq, seq, value)
            data = b"\x81\x7e" + len(data).to_bytes(2, "big") + data
        ready[number].write(data)


async def serve_starlette(
    port: int, clients: int, rate: float, make_app: Callable[[list[asyncio.Queue[bytes]]], Any]
) -> None:
    """Serve the same events through a queue per client."""
    import uvicorn  # noqa: PLC0415

    queues: list[asyncio.Queue[bytes]] = []
    config = uvicorn.Config(make_app(queues), port=port, log_level="error", ws="websockets-sansio")
    server = asyncio.create_task(uvicorn.Server(config).serve())
    await until(lambda: len(queues) >= clients)
    seq = 0
    async for number in paced(clients, rate):
        seq += 1
        queues[number].put_nowait(delta_of(job_name(number), seq))
        if server.done():
            return


def starlette_app(queues: list[asyncio.Queue[bytes]]) -> Any:
    """Return an application that adds a queue for each client, and sends what is put there."""
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.responses import StreamingResponse  # noqa: PLC0415
    from starlette.routing import Route, WebSocketRoute  # noqa: PLC0415

    def queue() -> asyncio.Queue[bytes]:
        queues.append(asyncio.Queue())
        return queues[-1]

    async def framed(mine: asyncio.Queue[bytes]) -> Any:
        while True:
            yield b"event: delta\nid: 0.1.1.e8b7be43\ndata: %b\n\n" % await mine.get()

    async def events(_: Any) -> Any:
        return StreamingResponse(framed(queue()), media_type="text/event-stream")

    async def socket(websocket: Any) -> None:
        await websocket.accept(subprotocol="streamworker.v1")
        mine = queue()
        while True:
            value = (await mine.get()).decode()
            await websocket.send_text(f'{{"type":"event","id":"s","event":{value}}}')

    return Starlette(routes=[Route("/{path:path}", events), WebSocketRoute("/{path:path}", socket)])


def sse_starlette_app(queues: list[asyncio.Queue[bytes]]) -> Any:
    """Return an application with the event streams of sse-starlette."""
    from sse_starlette import EventSourceResponse  # noqa: PLC0415
    from starlette.applications import Starlette  # noqa: PLC0415
    from starlette.routing import Route  # noqa: PLC0415

    async def values(mine: asyncio.Queue[bytes]) -> Any:
        while True:
            yield {"event": "delta", "id": "0.1.1.e8b7be43", "data": (await mine.get()).decode()}

    async def events(_: Any) -> Any:
        queues.append(asyncio.Queue())
        return EventSourceResponse(values(queues[-1]))

    return Starlette(routes=[Route("/{path:path}", events)])


_APPS = {"starlette": starlette_app, "sse-starlette": sse_starlette_app}
_NOT_THERE = {("sse-starlette", "ws")}

# The clients


class Reader(asyncio.Protocol):
    """One client. It counts events by their stamps, and keeps their age."""

    def __init__(self, number: int, face: str, ages: list[int]) -> None:
        self._number, self._face, self._ages = number, face, ages
        self._rest = b""
        self._is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it
        job = job_name(self._number)
        if self._face == "sse":
            head = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
        else:
            key = base64.b64encode(os.urandom(16)).decode()
            head = (
                "GET /v1/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: streamworker.v1\r\n\r\n"
            )
        self._transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        if not self._is_open:
            self._is_open = True
            if data[9:10] not in b"21":
                raise SystemExit(f"client {self._number}: {data[:300]!r}")
            if self._face == "ws":
                ask = json.dumps({"type": "subscribe", "id": "s", "job_id": job_name(self._number)}).encode()
                self._transport.write(b"\x81" + bytes([0x80 | len(ask)]) + bytes(4) + ask)
        now = time.time_ns() // 1000
        data = self._rest + data
        at = data.find(STAMP)
        end = 0
        while at >= 0 and len(data) >= at + len(STAMP) + DIGITS:
            end = at + len(STAMP) + DIGITS
            self._ages.append(now - int(data[at + len(STAMP) : end]))
            at = data.find(STAMP, end)
        self._rest = data[max(end, len(data) - 30) :]


@dataclass(kw_only=True)
class Result:
    """What was measured of one server."""

    name: str
    cpu_us: float
    events_per_s: float
    kib: float
    p50_ms: float
    p99_ms: float


async def measure(
    name: str, pid: int, port: int, arguments: argparse.Namespace, go: Callable[[], None]
) -> Result:
    """Connect the clients, let the events begin, and measure for some seconds."""
    ages: list[int] = []
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        before = usage_of(pid).resident
        for number in range(arguments.clients):
            transport, _ = await loop.create_connection(
                lambda number=number: Reader(number, arguments.face, ages),  # type: ignore[misc]
                "127.0.0.1",
                port,
            )
            stack.callback(transport.close)
        await asyncio.sleep(SETTLE_S)
        resident = usage_of(pid).resident
        go()
        await asyncio.sleep(SETTLE_S)
        ages.clear()
        began, cpu = time.monotonic(), usage_of(pid).cpu_s
        await asyncio.sleep(arguments.window)
        took, used, count = time.monotonic() - began, usage_of(pid).cpu_s - cpu, len(ages)
        cuts = quantiles([age / 1000 for age in ages], n=100)
    return Result(
        name=name,
        cpu_us=used / count * 1e6,
        events_per_s=count / took,
        kib=(resident - before) / arguments.clients / 1024,
        p50_ms=cuts[49],
        p99_ms=cuts[98],
    )


async def until_open(port: int) -> None:
    """Wait until a port accepts connections."""
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


async def of_peer(name: str, arguments: argparse.Namespace, directory: Path) -> Result:
    """Measure a server that makes the events itself."""
    port = free_port()
    scale = ["--clients", str(arguments.clients), "--rate", str(arguments.rate), "--face", arguments.face]
    command = ["benchmarks.gateway", name, "--port", str(port), *scale]
    with started(command, {}, directory / f"{name}.log") as pid:
        await until_open(port)
        await asyncio.sleep(0.5)
        return await measure(name, pid, port, arguments, lambda: None)


async def of_gateway(
    bootstrap: str, arguments: argparse.Namespace, directory: Path, *, topic: str
) -> tuple[Result, float]:
    """Measure the gateway; return also the CPU time of reading the topic without clients, in µs per event."""
    port, idle_port = free_port(), free_port()
    go = directory / f"go-{topic}"
    environment = {
        "STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS": bootstrap,
        "STREAMWORKER_TOPICS__EVENTS": topic,
        "STREAMWORKER_TOPICS__JOBS": JOBS,
        "STREAMWORKER_TOPICS__CONTROL": CONTROL,
        "STREAMWORKER_GATEWAY__AUTH": "off",
        "STREAMWORKER_TELEMETRY__HTTP_PORT": "0",
        "STREAMWORKER_TELEMETRY__LOG_LEVEL": "error",
    }
    scale = ["--clients", str(arguments.clients), "--rate", str(arguments.rate)]
    producer = [
        "benchmarks.gateway",
        "feed",
        "--bootstrap",
        bootstrap,
        "--topic",
        topic,
        "--go",
        str(go),
        *scale,
    ]
    with ExitStack() as stack:
        at = {"STREAMWORKER_GATEWAY__PORT": str(port)}
        stack.enter_context(started(producer, {}, directory / "feed.log"))
        await until(lambda: is_ready(go))
        pid = stack.enter_context(
            started(["streamworker", "gateway"], environment | at, directory / "gateway.log")
        )
        await until_open(port)
        await asyncio.sleep(1)
        result = await measure("gateway", pid, port, arguments, go.touch)
        idle = {"STREAMWORKER_GATEWAY__PORT": str(idle_port), "STREAMWORKER_GATEWAY__READ": "all"}
        idle_pid = stack.enter_context(
            started(["streamworker", "gateway"], environment | idle, directory / "idle.log")
        )
        await until_open(idle_port)
        await asyncio.sleep(SETTLE_S)
        began, cpu = time.monotonic(), usage_of(idle_pid).cpu_s
        await asyncio.sleep(arguments.window)
        reading = (usage_of(idle_pid).cpu_s - cpu) / (time.monotonic() - began)
    return result, reading / result.events_per_s * 1e6


async def compare(arguments: argparse.Namespace) -> None:
    """Measure all servers and print a table."""
    directory = Path(tempfile.mkdtemp(prefix="gateway-bench-"))
    peers = [name for name in arguments.peers.split(",") if name and (name, arguments.face) not in _NOT_THERE]
    results: dict[str, list[Result]] = {name: [] for name in [*peers, "gateway"]}
    reading: list[float] = []
    broker = ApacheKafka()
    await asyncio.to_thread(broker.start)
    try:
        for topic in (JOBS, CONTROL):
            await create(broker, topic, PARTITIONS)
        for number in range(arguments.rounds):
            topic = f"bench.events.{number}"  # the ids of the jobs are the same in each round
            await create(broker, topic, PARTITIONS)
            await asyncio.sleep(1)
            for name in peers[:1]:
                results[name].append(await of_peer(name, arguments, directory))
            result, read_us = await of_gateway(broker.bootstrap, arguments, directory, topic=topic)
            results["gateway"].append(result)
            reading.append(read_us)
            for name in peers[1:]:
                results[name].append(await of_peer(name, arguments, directory))
    finally:
        broker.stop()
    print(
        f"{arguments.clients} clients x {arguments.rate:g}/s, {arguments.face}, medians of {arguments.rounds} rounds; "
        f"logs in {directory}"
    )
    for name, rounds in results.items():
        print(row(name, rounds))
    print(division(results["gateway"], reading, results.get("bare", [])))


def row(name: str, rounds: Sequence[Result]) -> str:
    """Return a line with the medians of a contender."""
    cpu, rate, kib, p50, p99 = (
        median(getattr(one, member) for one in rounds)
        for member in ("cpu_us", "events_per_s", "kib", "p50_ms", "p99_ms")
    )
    return (
        f"{name:13} {cpu:6.1f} us/event  {rate:8.0f} events/s  {kib:6.1f} KiB/connection"
        f"  p50 {p50:6.1f}  p99 {p99:6.1f} ms"
    )


def division(gateway: Sequence[Result], reading: Sequence[float], bare: Sequence[Result]) -> str:
    """Return a line that says how much of the gateway's time is reading and how much delivering, beside the limit."""
    delivering = [one.cpu_us - read_us for one, read_us in zip(gateway, reading, strict=True)]
    line = f"gateway: {median(reading):.1f} us reading Kafka, {median(delivering):.1f} us delivering"
    if not bare:
        return line
    ratios = [of_gateway / one.cpu_us for of_gateway, one in zip(delivering, bare, strict=True)]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"{line}: {median(ratios):.2f} x bare ({shown})"


def main() -> None:
    """Parse arguments; run one of the processes, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("process", nargs="?", default="compare", choices=["compare", "feed", "bare", *_APPS])
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=5)
    parser.add_argument("--face", choices=["sse", "ws"], default="sse")
    parser.add_argument("--window", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="bare,starlette,sse-starlette")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bootstrap", default="")
    parser.add_argument("--topic", default="")
    parser.add_argument("--go", type=Path, default=Path())
    arguments = parser.parse_args()
    clients, rate, face = arguments.clients, arguments.rate, arguments.face
    match arguments.process:
        case "feed":
            work = feed(arguments.bootstrap, arguments.topic, clients, rate, arguments.go)
        case "bare":
            work = serve_bare(arguments.port, clients, rate, face)
        case "compare":
            work = compare(arguments)
        case name:
            work = serve_starlette(arguments.port, clients, rate, _APPS[name])
    uvloop.run(work)


if __name__ == "__main__":
    sys.exit(main())
