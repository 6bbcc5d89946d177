"""A connection that is passed to a stream: the memory of its request, the requests behind it, and its end."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from streamworker.gateway import stream_connection
from streamworker.gateway.stream_connection import StreamConnection
from tests.integration.stage import eventually
from tests.unit.gateway.served import ACME, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.unit.gateway.served import Served

JOB = "acme.0199-job"
EVENTS = f"/v1/jobs/{JOB}/events?cursor=0.0.w"
"""The stream of the job from its beginning; it waits for the first event."""


def head(path: str = EVENTS, *more: str) -> bytes:
    """Return a request without a body."""
    lines = [f"GET {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {ACME}", *more, "", ""]
    return "\r\n".join(lines).encode()


@asynccontextmanager
async def connected(
    gateway: Served, data: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send a request on a connection of its own."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(data or head())
    try:
        yield reader, writer
    finally:
        writer.close()


async def until_open(gateway: Served, reader: asyncio.StreamReader) -> bytes:
    """Wait until the stream is open; return the head of the response."""
    async with asyncio.timeout(5):
        received = await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"retry: ")
        await eventually(lambda: gateway.log.open_feeds > 0)
    return received


def requests_alive() -> int:
    """Return how many request objects of aiohttp exist."""
    gc.collect()
    return sum(isinstance(one, web.BaseRequest) for one in gc.get_objects())


async def test_open_stream_keeps_nothing_of_its_request(gateway: Served) -> None:
    """Neither the request nor aiohttp's connection: they take 15 KB, and a stream lasts as long as a job."""
    before = requests_alive()
    async with connected(gateway) as (reader, _):
        await until_open(gateway, reader)
        await asyncio.sleep(0)

        assert requests_alive() == before
        assert gateway.server._runner.server is not None
        assert gateway.server._runner.server.connections == []
        assert gateway.server.connections == 1
    await eventually(lambda: gateway.server.connections == 0)
    assert gateway.log.open_feeds == 0
    assert gateway.gateway.limits.streams == 0


async def test_connection_waits_for_another_request_behind_a_stream(gateway: Served) -> None:
    """It is counted once, with the stream and without."""
    async with connected(gateway) as (reader, writer):
        opened = await until_open(gateway, reader)
        gateway.log.publish(JOB, ["a"])
        await reader.readuntil(b"\r\n0\r\n\r\n")
        await eventually(lambda: gateway.log.open_feeds == 0)
        assert gateway.server.connections == 1
        writer.write(head("/v1/models"))
        following = await reader.readuntil(b"\r\n\r\n")

    assert b"Connection: close" not in opened
    assert following.startswith(b"HTTP/1.1 200 ")


async def test_request_that_is_sent_during_a_stream_is_answered_behind_it(gateway: Served) -> None:
    """Whole, and in two parts."""
    async with connected(gateway) as (reader, writer):
        await until_open(gateway, reader)
        request = head("/v1/models")
        writer.write(request[:20])
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(request[20:])
        await asyncio.sleep(0.02)
        gateway.log.publish(JOB, ["a"])
        await reader.readuntil(b"\r\n0\r\n\r\n")
        following = await reader.readuntil(b"\r\n\r\n")

    assert following.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("more", [head("/v1/models"), head("/v1/models")[:30]])
async def test_connection_is_closed_behind_a_stream_if_more_was_sent_with_its_request(
    gateway: Served, more: bytes
) -> None:
    """aiohttp's parser may have a part of it. The response says so, and the client sends it anew."""
    gateway.log.publish(JOB, ["a"])
    async with connected(gateway, head() + more) as (reader, _), asyncio.timeout(5):
        received = await reader.read()

    assert b"\r\nConnection: close\r\n" in received
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert received.count(b"HTTP/1.1 ") == 1


async def test_connection_is_closed_behind_a_stream_if_much_is_sent_during_it(gateway: Served) -> None:
    """Nothing of it is kept."""
    async with connected(gateway) as (reader, writer):
        await until_open(gateway, reader)
        writer.write(b"x" * 100_000)
        await writer.drain()
        [stream] = gateway.server._streams
        await eventually(lambda: not stream._is_kept)
        assert stream._kept == b""
        gateway.log.publish(JOB, ["a"])
        async with asyncio.timeout(5):
            received = await reader.read()

    assert received.endswith(b"\r\n0\r\n\r\n")


async def test_request_with_a_body_gets_its_stream_and_the_connection_is_closed(gateway: Served) -> None:
    """A body of a GET request has no meaning; its rest might be on its way."""
    gateway.log.publish(JOB, ["a"])
    async with connected(gateway, head(EVENTS, "Content-Length: 3") + b"abc") as (
        reader,
        _,
    ):
        async with asyncio.timeout(5):
            received = await reader.read()

    assert b"event: usage" in received
    assert b"\r\nConnection: close\r\n" in received


@pytest.mark.parametrize("length", ["Content-Length: {}", "Transfer-Encoding: chunked"])
async def test_body_that_follows_a_request_for_a_stream_is_not_read_as_a_request(
    gateway: Served, length: str
) -> None:
    """A proxy that passes the body of a GET request on takes the second answer for that of another client."""
    smuggled = head("/v1/models")
    async with connected(gateway, head(EVENTS, length.format(len(smuggled)))) as (reader, writer):
        opened = await until_open(gateway, reader)
        writer.write(smuggled)
        await writer.drain()
        await asyncio.sleep(0.02)
        gateway.log.publish(JOB, ["a"])
        async with asyncio.timeout(5):
            received = await reader.read()

    assert b"\r\nConnection: close\r\n" in opened
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert b"HTTP/1.1 " not in received


async def test_connection_that_the_client_asks_to_close_is_closed(gateway: Served) -> None:
    """Behind the whole stream."""
    gateway.log.publish(JOB, ["a"])
    request = head(EVENTS, "Connection: close")
    async with connected(gateway, request) as (reader, _), asyncio.timeout(5):
        received = await reader.read()

    assert received.endswith(b"\r\n0\r\n\r\n")


async def test_access_log_reports_a_stream_at_its_end(gateway: Served) -> None:
    """With the status, 499 where the client left; the drain waits for it until then."""
    with capture_logs() as logs:
        async with connected(gateway) as (reader, _):
            await until_open(gateway, reader)
            assert gateway.gateway.drain.busy == 1
            assert logs == []
        await eventually(lambda: gateway.gateway.drain.busy == 0)
        gateway.log.publish(JOB, ["a"])
        async with connected(gateway) as (reader, _):
            await reader.readuntil(b"\r\n0\r\n\r\n")
        await eventually(lambda: len(logs) == 2)

    lines = [
        (line["event"], line["status"], line["route"], line["job_id"], line["key"], line["method"])
        for line in logs
    ]
    common = ("/v1/jobs/{job_id}/events", JOB, "k0", "GET")
    assert lines == [("gateway.request", 499, *common), ("gateway.request", 200, *common)]
    assert all(line["request_id"] for line in logs)


async def test_stream_that_fails_is_cut_without_its_end(gateway: Served) -> None:
    """The client sees that it is not whole. The log has no message of the exception, which may quote an event."""
    with capture_logs() as logs:
        async with connected(gateway) as (reader, _):
            await until_open(gateway, reader)
            gateway.log.error = RuntimeError("canary")
            gateway.log.changed.notify()
            async with asyncio.timeout(5):
                received = b""
                with suppress(ConnectionResetError):
                    received = await reader.read()
        await eventually(lambda: gateway.server.connections == 0)

    assert not received.endswith(b"0\r\n\r\n")
    assert [line["event"] for line in logs] == ["gateway.stream_failed", "gateway.request"]
    assert "canary" not in json.dumps([str(line) for line in logs])
    assert gateway.gateway.limits.streams == 0


async def test_server_that_stops_ends_its_streams(tmp_path: Path) -> None:
    """No task is left, and the clients are disconnected."""
    async with served(tmp_path) as gateway, connected(gateway) as (reader, _):
        await until_open(gateway, reader)
        [stream] = gateway.server._streams
        await gateway.server.stop()
        assert stream.task is not None
        assert stream.task.done()
        assert gateway.log.open_feeds == 0
        async with asyncio.timeout(5):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1000)


async def test_stream_that_ends_while_the_server_stops_is_closed(tmp_path: Path) -> None:
    """Nothing serves another request then."""
    async with served(tmp_path) as gateway, connected(gateway) as (reader, _):
        await until_open(gateway, reader)
        gateway.server._streams._is_stopped = True
        gateway.log.publish(JOB, ["a"])
        async with asyncio.timeout(5):
            received = await reader.read()

    assert received.endswith(b"\r\n0\r\n\r\n")


async def test_rest_of_an_ended_stream_that_is_not_taken_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is cut then."""
    monkeypatch.setattr(stream_connection, "_FLUSH_S", 0.1)
    async with (
        served(tmp_path) as gateway,
        connected(gateway, head(EVENTS, "Connection: close")),
    ):
        # More than the buffers of both sockets hold, and less than makes the stream wait.
        gateway.log.publish(JOB, ["x" * 60_000] * 4)
        await eventually(lambda: gateway.server.connections == 0, 10)


def unread(gateway: Served) -> socket.socket:
    """Return a connection that takes few bytes before it is read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.connect(gateway.address)
    return client


async def test_stream_behind_one_that_was_closed_while_the_client_took_nothing_waits_for_it(
    tmp_path: Path,
) -> None:
    """The transport does not report anew that it is full: nothing may be pushed to it."""
    async with served(tmp_path, max_stream_age_s=1) as gateway:
        gateway.log.publish("acme.large", ["x" * 60_000] * 20, end=None)
        reader, writer = await asyncio.open_connection(sock=unread(gateway), limit=1024)
        writer.write(head("/v1/jobs/acme.large/events"))
        await eventually(lambda: gateway.log.open_feeds == 1)
        await eventually(lambda: gateway.log.open_feeds == 0)  # closed for its age
        writer.write(head())
        await eventually(lambda: gateway.log.open_feeds == 1)
        [stream] = gateway.server._streams
        assert stream.transport.get_write_buffer_size() > 65_536
        assert stream.is_paused
        gateway.log.publish(JOB, ["a"])
        received = b""
        async with asyncio.timeout(10):
            while received.count(b"HTTP/1.1 200 ") < 2 or not received.endswith(b"\r\n0\r\n\r\n"):
                received += await reader.read(65_536)
        writer.close()

    assert b'"reason":"age"' in received


async def test_client_that_does_not_take_the_end_of_a_job_has_stalled(tmp_path: Path) -> None:
    """The connection is not kept for further requests before it has; nothing else watches it then."""
    async with served(tmp_path, stall_s=0.3) as gateway:
        gateway.log.publish("acme.large", [], end=None)
        ending = json.loads(gateway.log.events["acme.large"][0].value)
        ending |= {"type": "usage", "seq": 1, "metadata": {"pad": "x" * 900_000}}
        reader, writer = await asyncio.open_connection(sock=unread(gateway), limit=1024)
        writer.write(head("/v1/jobs/acme.large/events?cursor=0.0.w"))
        gateway.log.append("acme.large", "usage", ending)
        closed = "gateway_streams_closed_total"
        await eventually(lambda: gateway.metric(closed, face="sse", reason="stalled") == 1, 10)
        assert gateway.metric(closed, face="sse", reason="ended") == 0
        del reader
        writer.close()


# The protocol


class Transport(asyncio.Transport):
    """Counts what is done with it."""

    def __init__(self, request: web.Request | None = None) -> None:
        super().__init__()
        self.request = request
        self.protocol: Any = None
        self.is_closed = False

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def get_write_buffer_size(self) -> int:
        return 0


class Owner:
    """Notes what a connection reports."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def adopt(self, _: StreamConnection, received: bytes, *, is_paused: bool) -> None:
        self.calls.append(("adopt", received, is_paused))

    def forget(self, _: StreamConnection) -> None:
        self.calls.append("forget")


async def status(value: int) -> int:
    return value


async def test_connection_reports_each_pause_until_its_stream_has_ended() -> None:
    """What pushes to it learns so that the client does not take it."""
    transport, pauses = Transport(), list[bool]()
    connection = StreamConnection(transport, Owner())
    connection.pause_writing()
    connection.resume_writing()
    connection.on_pause(lambda: pauses.append(connection.is_paused))
    for _ in range(2):
        connection.pause_writing()
        connection.resume_writing()
    assert pauses == [True, True]
    assert not connection.is_paused
    connection.run(status(200), keep_alive=True)
    assert connection.task is not None
    await connection.task
    connection.pause_writing()
    assert pauses == [True, True]


async def test_drain_waits_while_writing_is_paused() -> None:
    """And again after it was cancelled once."""
    connection = StreamConnection(Transport(), Owner())
    await connection.drain()
    connection.pause_writing()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.drain(), 0.01)
    waiting = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    connection.resume_writing()
    await asyncio.wait_for(waiting, 1)
    connection.resume_writing()
    await connection.drain()


async def test_drain_of_a_closed_connection_raises() -> None:
    """The stream ends by it."""
    transport = Transport()
    connection = StreamConnection(transport, Owner())
    transport.close()
    with pytest.raises(ConnectionResetError):
        await connection.drain()


@pytest.mark.parametrize(
    ("code", "keep_alive", "calls"),
    [(200, True, [("adopt", b"next", True)]), (200, False, []), (499, True, [])],
)
async def test_connection_is_adopted_behind_a_whole_stream_only(
    code: int, *, keep_alive: bool, calls: list[Any]
) -> None:
    """With what was received meanwhile, and with the state of its buffer."""
    owner, transport = Owner(), Transport()
    connection = StreamConnection(transport, owner)
    connection.run(status(code), keep_alive=keep_alive)
    connection.data_received(b"ne")
    connection.data_received(b"xt")
    connection.pause_writing()
    assert connection.task is not None
    await connection.task

    assert owner.calls == calls
    assert transport.is_closed is not bool(calls)


async def test_connection_that_is_lost_cancels_its_stream_and_reports_it() -> None:
    """With the status of a client that left."""
    owner, statuses = Owner(), list[int]()
    connection = StreamConnection(Transport(), owner)
    connection.connection_lost(None)  # before the stream has begun
    connection.run(asyncio.sleep(60, 200), keep_alive=True)
    connection.on_end(statuses.append)
    await asyncio.sleep(0)
    connection.connection_lost(ConnectionResetError())
    assert connection.task is not None
    with pytest.raises(asyncio.CancelledError):
        await connection.task

    assert owner.calls == ["forget", "forget"]
    assert statuses == [499]
