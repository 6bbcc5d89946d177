"""Clients of the gateway that do not read for a while what a running job writes; on Apache Kafka."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import socket
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from streamworker.client.ids import new_job_id
from streamworker.gateway import client_stream
from tests.integration.events import delta, ended, started
from tests.integration.gateway_here import gateway
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.integration.gateway_here import Gateway
    from tests.integration.stage import Stage

SUBPROTOCOL = Subprotocol("streamworker.v1")
DELTAS, TEXT = 500, 10_000
BUFFERS = 200_000
"""Bytes that may wait in the gateway for a client, besides its mailbox: the transport's 64 KiB, and one batch of events."""


class Watched:
    """The largest number of bytes that waited in the transports of a gateway's streams."""

    def __init__(self, served: Gateway) -> None:
        assert served._app is not None
        assert served._app._server is not None
        self._streams = served._app._server._streams
        self.largest = 0

    async def watch(self) -> None:
        """Look until the task is cancelled."""
        while True:
            sizes = [one.transport.get_write_buffer_size() for one in self._streams]
            self.largest = max(self.largest, *sizes, 0)
            await asyncio.sleep(0)


async def write_slowly(stage: Stage, job_id: str, may_go_on: Callable[[], bool]) -> None:
    """Write a job's events one after another, so that a client that follows gets each by itself; wait before the ending."""
    key = job_id.encode()
    for seq in range(1, DELTAS + 1):
        await stage._producer.send_and_wait(stage.events_topic, delta(job_id, seq, "x" * TEXT), key=key)
    await eventually(may_go_on)
    await stage._producer.send_and_wait(stage.events_topic, ended(job_id, DELTAS + 1), key=key)


def unread(port: int) -> socket.socket:
    """Return a connection that takes few bytes before it is read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.connect(("127.0.0.1", port))
    return client


def seqs(text: str) -> list[int]:
    """Return the numbers of the events."""
    return [int(found) for found in re.findall(r'"seq": ?(\d+)', text)]


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_client_that_reads_nothing_of_a_running_job_costs_its_buffers_and_gets_all_later(
    apache: Stage, accept: str
) -> None:
    """Deltas are pushed to it only until its transport is full; then the log holds them. Nothing comes twice."""
    await apache.open(events_partitions=1)
    job_id = new_job_id()
    async with gateway(apache) as served:
        await apache._producer.send_and_wait(apache.events_topic, started(job_id), key=job_id.encode())
        client = unread(served.port)
        request = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
        client.sendall(request.encode())
        watched = Watched(served)
        await eventually(lambda: len(watched._streams) == 1)
        watching = asyncio.create_task(watched.watch())
        await write_slowly(apache, job_id, lambda: watched.largest > 0)
        reader, writer = await asyncio.open_connection(sock=client)
        async with asyncio.timeout(30):
            received = await reader.read()
        watching.cancel()
        writer.close()

    assert seqs(received.decode()) == list(range(DELTAS + 2))
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert 0 < watched.largest < BUFFERS


async def test_client_that_reads_nothing_of_a_job_that_becomes_quiet_is_disconnected(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last delta that was pushed filled its transport, and no event follows that would have to wait."""
    monkeypatch.setattr(client_stream, "_LAST_WORD_S", 0.1)
    await apache.open(events_partitions=1)
    job_id = new_job_id()
    async with gateway(apache, gateway__stall_s=1) as served:
        key = job_id.encode()
        await apache._producer.send_and_wait(apache.events_topic, started(job_id), key=key)
        client = unread(served.port)
        client.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        streams = Watched(served)._streams
        await eventually(lambda: len(streams) == 1)
        [stream] = streams
        seq = 0
        while not stream.is_paused:
            seq += 1
            before = stream.transport.get_write_buffer_size()
            await apache._producer.send_and_wait(apache.events_topic, delta(job_id, seq, "x" * TEXT), key=key)
            if before:  # the socket takes nothing more: wait until this delta was pushed
                await eventually(lambda: stream.transport.get_write_buffer_size() > before)  # noqa: B023
        await eventually(lambda: not streams)
        client.close()


class UnreadWebsocket:
    """A websocket client that takes nothing from its socket before `messages` is iterated."""

    def __init__(self, port: int) -> None:
        self._client = unread(port)
        self._protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}/v1/ws"), subprotocols=[SUBPROTOCOL])
        self._protocol.send_request(self._protocol.connect())
        self._send()

    def _send(self) -> None:
        for data in self._protocol.data_to_send():
            self._client.sendall(data)

    async def receive(self, count: int) -> list[dict[str, Any]]:
        """Read the next messages, and nothing behind them."""
        received: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        self._client.setblocking(False)
        while len(received) < count:
            self._protocol.receive_data(await loop.sock_recv(self._client, 1))
            received += self._messages()
        self._client.setblocking(True)
        return received

    def _messages(self) -> list[dict[str, Any]]:
        return [
            json.loads(bytes(one.data)) for one in self._protocol.events_received() if isinstance(one, Frame)
        ]

    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._protocol.send_text(json.dumps(message).encode())
        self._send()

    async def messages(self) -> AsyncGenerator[dict[str, Any], None]:
        """Read, and yield the messages."""
        reader, writer = await asyncio.open_connection(sock=self._client)
        try:
            while data := await reader.read(65_536):
                self._protocol.receive_data(data)
                for message in self._messages():
                    yield message
        finally:
            writer.close()


async def test_websocket_that_reads_nothing_of_two_running_jobs_costs_its_buffers_and_gets_all_later(
    apache: Stage,
) -> None:
    """As an event stream does; and each of its subscriptions."""
    await apache.open(events_partitions=1)
    jobs = [f"{secrets.token_hex(4)}.{number}" for number in range(2)]
    async with gateway(apache) as served:
        for job_id in jobs:
            await apache._producer.send_and_wait(apache.events_topic, started(job_id), key=job_id.encode())
        client = UnreadWebsocket(served.port)
        [welcome] = await client.receive(1)
        for job_id in jobs:
            client.send({"type": "subscribe", "id": job_id, "job_id": job_id})
        early = await client.receive(6)  # deltas are pushed behind `live`
        assert welcome["type"] == "welcome"
        assert sorted(message["type"] for message in early) == sorted(["subscribed", "event", "live"] * 2)
        watched = Watched(served)
        await eventually(lambda: len(watched._streams) == 1)
        watching = asyncio.create_task(watched.watch())
        await asyncio.gather(*[write_slowly(apache, job_id, lambda: watched.largest > 0) for job_id in jobs])
        got: dict[str, list[int]] = {job_id: [] for job_id in jobs}
        ends = 0
        async with asyncio.timeout(30), aclosing(client.messages()) as messages:
            async for message in messages:
                if message["type"] == "event" and message["event"]["type"] != "position":
                    got[message["id"]].append(message["event"]["seq"])
                ends += message["type"] == "end"
                if ends == len(jobs):
                    break
        watching.cancel()

    assert got == {job_id: list(range(1, DELTAS + 2)) for job_id in jobs}
    assert 0 < watched.largest < BUFFERS
