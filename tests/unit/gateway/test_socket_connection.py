"""The connection of a websocket: its handshake, frames of clients, pings, the closing handshake, and what it keeps."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import HttpVersion11
from multidict import CIMultiDict
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from streamworker.gateway import socket_connection
from streamworker.gateway.socket_connection import SocketClosed, SocketConnection, SocketFailed, accept_of
from streamworker.gateway.websocket_frames import control_frame
from tests.integration.stage import eventually
from tests.unit.gateway.memory import MemoryFeed
from tests.unit.gateway.served import ACME
from tests.unit.gateway.test_stream_connection import Owner, Transport, requests_alive
from tests.unit.gateway.test_websocket import narrow_socket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.gateway.feeds import FeedEvent, Push
    from tests.unit.gateway.served import Served

KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""Of the example in RFC 6455 section 1.3."""

HEADERS = {"Connection": "keep-alive, Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": KEY}


def frame(payload: bytes, opcode: int = 1, *, fin: bool = True) -> bytes:
    """Return a frame as clients send it, with a mask of zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([(0x80 if fin else 0) | opcode]) + length + bytes(4) + payload


def opcodes_of(data: bytes) -> list[int]:
    """Return the opcodes of frames of the gateway, which are not masked."""
    found = []
    while data:
        found.append(data[0] & 15)
        is_long = data[1] == 126
        size = 4 + int.from_bytes(data[2:4], "big") if is_long else 2 + data[1]
        data = data[size:]
    return found


def handshake(*more: str) -> bytes:
    """Return the request that opens a websocket."""
    lines = [
        "GET /v1/ws HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {ACME}",
        "Upgrade: websocket",
        "Sec-WebSocket-Protocol: streamworker.v1",
        *[f"{name}: {value}" for name, value in HEADERS.items()],
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def raw(
    gateway: Served, data: bytes
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send bytes on a connection of their own; take the head of the response and `welcome`."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            assert b"welcome" in await reader.readuntil(b"}}")
            yield reader, writer
    finally:
        writer.close()


# The handshake


@pytest.mark.parametrize(
    ("changed", "accept"),
    [
        ({}, ACCEPT),
        ({"Connection": "UPGRADE"}, ACCEPT),
        ({"Connection": "keep-alive"}, None),
        ({"Connection": None}, None),
        ({"Sec-WebSocket-Key": None}, None),
        ({"Sec-WebSocket-Key": ""}, None),
        ({"Sec-WebSocket-Key": "c2hvcnQ="}, None),
        ({"Sec-WebSocket-Key": "é" * 24}, None),
        ({"Sec-WebSocket-Key": "x"}, None),
    ],
)
def test_handshake_is_accepted_as_the_rfc_has_it(changed: dict[str, str | None], accept: str | None) -> None:
    """The key shows that the server understands websockets; a request that is not valid is refused."""

    class Request:
        version = HttpVersion11
        headers = CIMultiDict(
            {name: value for name, value in (HEADERS | changed).items() if value is not None}
        )

    request: Any = Request()
    assert accept_of(request) == accept


@pytest.mark.parametrize("version", ["12", "8", "14", "", "013", "thirteen", None])
async def test_handshake_of_another_version_is_426_with_the_one_that_is_spoken(
    gateway: Served, version: str | None
) -> None:
    """RFC 6455 section 4.4: the client may try again with it."""
    headers = HEADERS | {"Upgrade": "websocket", "Sec-WebSocket-Protocol": "streamworker.v1"}
    given = {"Sec-WebSocket-Version": version} if version is not None else {}
    del headers["Sec-WebSocket-Version"]
    status, value, answered = await gateway.call("GET", "/v1/ws", headers=headers | given)

    assert (status, value["error"]["code"]) == (426, "upgrade_required")
    assert (answered["Sec-WebSocket-Version"], answered["Upgrade"]) == ("13", "websocket")


async def test_handshake_in_http_1_0_is_400(gateway: Served) -> None:
    """RFC 6455 section 4.2.1: a websocket needs HTTP/1.1."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(handshake().replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    assert (await reader.readline()).startswith(b"HTTP/1.0 400 ")
    writer.close()


async def test_handshake_that_is_not_valid_is_400(gateway: Served) -> None:
    """The connection serves further requests."""
    headers = HEADERS | {"Upgrade": "websocket", "Sec-WebSocket-Key": "x"}
    headers |= {"Sec-WebSocket-Protocol": "streamworker.v1"}
    status, value, _ = await gateway.call("GET", "/v1/ws", headers=headers)

    assert (status, value["error"]["code"]) == (400, "invalid_request")


async def test_messages_that_are_sent_with_the_handshake_are_answered(gateway: Served) -> None:
    """In one segment with it, whole or in part."""
    ping = frame(b'{"type":"ping"}')
    async with raw(gateway, handshake() + ping + ping[:3]) as (reader, writer):
        assert b'{"type":"pong"}' in await reader.readuntil(b"}")
        writer.write(ping[3:])
        assert b'{"type":"pong"}' in await reader.readuntil(b"}")


async def test_open_websocket_keeps_nothing_of_its_request(gateway: Served) -> None:
    """Neither the request nor aiohttp's connection; it is counted once."""
    before = requests_alive()
    async with raw(gateway, handshake()):
        await asyncio.sleep(0)
        assert requests_alive() == before
        assert gateway.server._runner.server is not None
        assert gateway.server._runner.server.connections == []
        assert (gateway.server.connections, gateway.gateway.limits.streams) == (1, 1)
    await eventually(lambda: gateway.server.connections == 0)
    assert gateway.gateway.limits.streams == 0
    assert gateway.gateway.drain.busy == 0


# Frames


async def test_ping_of_a_client_is_answered_with_its_payload(gateway: Served) -> None:
    """A pong that was not asked for is ignored."""
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(frame(b"unasked", 10) + frame(b"hello", 9))
        assert await reader.readexactly(7) == control_frame(10, b"hello")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x83\x80\0\0\0\0", 1002),  # a reserved opcode
        (b"\xf1\x80\0\0\0\0", 1002),  # bits of extensions that were not agreed on
        (frame(b"x", 0), 1002),  # a continuation of nothing
        (frame(b"x" * 126, 9), 1002),  # a control frame that is too long
        (frame(b"x", 9, fin=False), 1002),  # a control frame in fragments
        (b"\x81\x0f" + b'{"type":"ping"}', 1002),  # without a mask
        (frame(b'{"type":', fin=False) + b"\x80\x07" + b'"ping"}', 1002),  # its last fragment without a mask
        (b"\x88\x02\x03\xe8", 1002),
        (frame(b"", fin=False) + frame(b'{"type":"ping"}'), 1002),  # a message within another one
        (b"\x81\xff" + bytes(8) + bytes(4), 1002),  # a length in more bytes than it needs
        (frame(b"\x03", 8), 1002),  # half a code
        (frame(b"\xff", fin=False) + b"\x80\x01x", 1002),  # the first fault counts
        (frame(b"\xff\xfe"), 1007),  # not UTF-8
        (frame(b'"\xe2', fin=False) + frame(b'\x82"', 0), 1007),  # in two fragments
        (frame(b"\xff") + b"\x81\x00", 1007),
        (frame(b"\x03\xe8\xff", 8), 1007),
        (frame(b"{}", 2), 4400),  # binary
        (frame(b"not JSON"), 4400),
    ],
)
async def test_frame_that_is_not_valid_closes_the_websocket(
    gateway: Served, monkeypatch: pytest.MonkeyPatch, data: bytes, code: int
) -> None:
    """With the code of the fault."""
    monkeypatch.setattr(socket_connection, "_CLOSE_S", 0.1)
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(data)
        received = await reader.read()

    closing = received[received.index(b"\x88") :]
    assert int.from_bytes(closing[2:4], "big") == code


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2999, 5000, 65535])
async def test_close_with_a_code_that_must_not_be_sent_is_a_protocol_error(
    gateway: Served, code: int
) -> None:
    """RFC 6455 section 7.4. The connection ends at once."""
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(frame(code.to_bytes(2, "big"), 8))
        received = await asyncio.wait_for(reader.read(), 1.5)

    assert int.from_bytes(received[2:4], "big") == 1002


async def test_frame_without_a_mask_is_refused_however_it_is_received(gateway: Served) -> None:
    """The messages before it are answered; nothing behind it is."""
    before = frame(b'{"type":"ping"}') + b"\x81"
    async with raw(gateway, handshake()) as (reader, writer):
        for at in range(len(before)):
            writer.write(before[at : at + 1])
            await asyncio.sleep(0)
        writer.write(b"\x0f" + b'{"type":"ping"}' + frame(b'{"type":"ping"}'))
        received = await reader.read()

    assert received.count(b"pong") == 1
    assert received[received.index(b"\x88") + 4 :] == b"a frame of a client must be masked"


async def test_client_that_goes_on_sending_behind_a_fault_gets_the_close_frame(gateway: Served) -> None:
    """The connection stays half open for a short time: a reset would take the frame from the client."""
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(b"\x81\x00")
        await writer.drain()
        for _ in range(20):
            writer.write(frame(b"{}"))
            await asyncio.sleep(0.01)
        received = await reader.read()

    assert int.from_bytes(received[2:4], "big") == 1002
    await eventually(lambda: gateway.server.connections == 0)


async def test_client_that_stays_behind_a_fault_is_disconnected(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a short time."""
    monkeypatch.setattr(socket_connection, "_CLOSE_S", 0.05)
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(b"\x81\x00")
        assert b"\x88" in await reader.read()
        await eventually(lambda: gateway.server.connections == 0)


async def test_connection_that_is_half_open_behind_a_fault_is_sent_no_ping(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write behind the end of the stream would raise in the timer."""
    monkeypatch.setattr(socket_connection, "PING_S", 0.02)
    monkeypatch.setattr(socket_connection, "_CLOSE_S", 0.1)
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(b"\x81\x00")
        assert b"\x88" in await reader.read()
        await eventually(lambda: gateway.server.connections == 0)

    assert failures == []


@pytest.mark.parametrize("data", [b"\x81\x00", frame(b"not JSON")], ids=["fault", "message"])
async def test_websocket_that_is_being_closed_is_not_closed_for_another_reason(
    gateway: Served, data: bytes
) -> None:
    """A drain may begin in these seconds, and the client may disconnect."""
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(data)
        await reader.readuntil(b"\x88")
        [close] = gateway.gateway.drain._closers.values()
        close()
    await eventually(lambda: gateway.server.connections == 0)

    assert gateway.metric("gateway_streams_closed_total", face="websocket", reason="refused") == 1


async def test_messages_before_a_fault_are_received_though_many_wait() -> None:
    """The reader stops while its queue is full, and goes on when messages are taken."""
    transport = Paused()
    connection = SocketConnection(transport, Owner(), 100_000)
    connection.data_received(frame(b"x" * 50_000) * 6 + b"\x81\x00" + frame(b"behind"))
    connection.data_received(frame(b"later"))
    for _ in range(6):
        assert await connection.receive() == "x" * 50_000
    with pytest.raises(SocketFailed, match="masked") as failed:
        await connection.receive()

    assert failed.value.code == 1002
    connection.connection_lost(None)


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
async def test_client_that_closes_gets_its_code_back(gateway: Served, code: int) -> None:
    """And the connection ends."""
    url = f"ws://127.0.0.1:{gateway.server.port}/v1/ws"
    headers = {"Authorization": f"Bearer {ACME}"}
    async with connect(url, subprotocols=["streamworker.v1"], additional_headers=headers) as socket:  # type: ignore[list-item]
        await socket.recv()
        await socket.close(code)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()

    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == code
    await eventually(lambda: gateway.server.connections == 0)


class PushingFeed(MemoryFeed):
    """A feed that is live, and whose log pushes a delta each time the event loop runs."""

    push: Push | None = None

    async def next(self, push: Push | None = None) -> FeedEvent | None:
        self.push = push
        try:
            waiting: asyncio.Future[FeedEvent] = asyncio.get_running_loop().create_future()
            return await waiting
        finally:
            self.push = None

    def pump(self) -> None:
        """Push, now and later."""
        if self.push is not None:
            self.push.write(self.push.framing.delta(b"0.1.1.00000000", b"{}"))
        if not self.is_closed:
            asyncio.get_running_loop().call_soon(self.pump)


@pytest.mark.parametrize("code", [b"", b"\x03\xe8", b"\x03"], ids=["none", "1000", "not-valid"])
async def test_nothing_follows_the_close_frame(
    gateway: Served, monkeypatch: pytest.MonkeyPatch, code: bytes
) -> None:
    """RFC 6455 section 5.5.1: the subscriptions are ended before the client's close frame is answered."""
    monkeypatch.setattr(socket_connection, "_CLOSE_S", 0.1)
    feeds: list[PushingFeed] = []

    async def opened(job_id: str, **_: Any) -> PushingFeed:
        feeds.append(feed := PushingFeed(gateway.log, job_id, 0, "0.0.w"))
        return feed

    monkeypatch.setattr(gateway.log, "open", opened)
    async with raw(gateway, handshake()) as (reader, writer):
        for number in range(3):
            message = {"type": "subscribe", "id": f"{number}", "job_id": f"acme.{number}"}
            writer.write(frame(json.dumps(message).encode()))
        await eventually(lambda: [feed.push is not None for feed in feeds] == [True] * 3)
        for feed in feeds:
            feed.pump()
        received = await reader.readuntil(b"0.1.1.00000000")
        writer.write(frame(code, 8))
        received += await reader.read()

    opcodes = opcodes_of(received)
    assert opcodes.count(8) == 1
    assert opcodes[-1] == 8
    await eventually(lambda: gateway.server.connections == 0)


async def test_client_that_does_not_answer_the_close_is_disconnected(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a short time."""
    monkeypatch.setattr(socket_connection, "_CLOSE_S", 0.05)
    async with raw(gateway, handshake()) as (reader, writer):
        writer.write(frame(b"not JSON"))
        assert b"\x88" in await reader.read()


# Quiet clients


async def test_silent_client_is_sent_a_ping_and_then_cut(
    gateway: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies keep connections open whose client is gone."""
    monkeypatch.setattr(socket_connection, "PING_S", 0.05)
    monkeypatch.setattr(socket_connection, "PONG_S", 0.05)
    async with raw(gateway, handshake()) as (reader, _):
        assert await reader.readexactly(2) == b"\x89\x00"
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    await eventually(lambda: gateway.gateway.limits.streams == 0)


@pytest.mark.parametrize(
    "data",
    [frame(b"x" * 125, 9) * 500, frame(b'{"type":"ping"}') * 2000],
    ids=["pings", "messages"],
)
@pytest.mark.parametrize("is_known", [True, False], ids=["with a key", "without"])
async def test_answers_do_not_gather_for_a_client_that_reads_none(
    gateway: Served, data: bytes, is_known: bool
) -> None:
    """Nothing more is read from it, whether it has named itself or not."""
    opening = handshake()
    if not is_known:
        opening = opening.replace(f"Authorization: Bearer {ACME}\r\n".encode(), b"")
    loop = asyncio.get_running_loop()
    with narrow_socket(gateway) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        await loop.sock_sendall(client, opening)
        most = sent = 0
        with suppress(TimeoutError):
            while sent < 32_000_000:
                async with asyncio.timeout(0.3):
                    await loop.sock_sendall(client, data)
                sent += len(data)
                most = max(most, gateway.unsent_bytes)
        await eventually(lambda: gateway.unsent_bytes > 0)
        most = max(most, gateway.unsent_bytes)

    assert sent < 32_000_000
    assert most < 300_000


async def test_pings_are_answered_when_the_client_takes_answers_again() -> None:
    """All of them, in their order."""
    transport = Paused()
    connection = SocketConnection(transport, Owner(), 1000)
    connection.pause_writing()
    connection.data_received(frame(b"one", 9) + frame(b"two", 9) + frame(b"{}"))
    receiving = asyncio.create_task(connection.receive())
    await asyncio.sleep(0)
    assert transport.written == b""
    connection.resume_writing()

    assert await receiving == "{}"
    assert transport.written == control_frame(10, b"one") + control_frame(10, b"two")
    connection.connection_lost(None)


async def test_client_that_answers_pings_stays(gateway: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked again and again."""
    monkeypatch.setattr(socket_connection, "PING_S", 0.1)
    monkeypatch.setattr(socket_connection, "PONG_S", 0.3)
    async with raw(gateway, handshake()) as (reader, writer):
        for _ in range(3):
            assert await reader.readexactly(2) == b"\x89\x00"
            writer.write(frame(b"", 10))
        writer.write(frame(json.dumps({"type": "ping"}).encode()))
        assert b"pong" in await reader.readuntil(b"}")


# The queue


class Paused(Transport):
    """Notes what is written, and whether reading is paused."""

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = False
        self.written = b""

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def write(self, data: Any) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_closed = True


async def test_connection_reads_nothing_while_many_messages_wait() -> None:
    """They are in memory; it reads on when they were taken."""
    transport = Paused()
    connection = SocketConnection(transport, Owner(), 100_000)
    sent = 0
    while not transport.is_paused and sent < 100:
        connection.data_received(frame(b"x" * 10_000))
        sent += 1
    assert sent < 20
    for _ in range(sent):
        assert await connection.receive() == "x" * 10_000
    assert not transport.is_paused
    connection.connection_lost(None)
    with pytest.raises(ConnectionResetError):
        await connection.receive()


@pytest.mark.parametrize("cut", [1000, 1, 999])
async def test_message_of_the_limit_is_received(cut: int) -> None:
    """Whole, and in two fragments."""
    connection = SocketConnection(Paused(), Owner(), 1000)
    connection.data_received(frame(b"x" * cut, fin=False) + frame(b"x" * (1000 - cut), 0))
    assert await connection.receive() == "x" * 1000
    connection.connection_lost(None)


async def test_message_above_the_limit_fails_with_1009() -> None:
    """In fragments too."""
    connection = SocketConnection(Paused(), Owner(), 1000)
    connection.data_received(frame(b"x" * 600, fin=False) + frame(b"x" * 600, 0))
    with pytest.raises(SocketFailed) as failed:
        await connection.receive()

    assert failed.value.code == 1009
    connection.connection_lost(None)


async def test_close_is_said_once() -> None:
    """Behind the answer to the client's close, `close` does nothing."""
    transport = Paused()
    connection = SocketConnection(transport, Owner(), 1000)
    connection.data_received(frame((1001).to_bytes(2, "big"), 8))
    with pytest.raises(SocketClosed) as closed:
        await connection.receive()
    assert transport.written == b""  # what writes to the websocket has to be ended first
    connection.answer_close(closed.value.code)
    await connection.close(1000, b"late")

    assert transport.written == control_frame(8, (1001).to_bytes(2, "big"))
    connection.connection_lost(None)


async def test_close_waits_for_that_of_the_client() -> None:
    """Messages before it are dropped."""
    transport = Paused()
    connection = SocketConnection(transport, Owner(), 1000)
    closing = asyncio.create_task(connection.close(1012, b"shutdown"))
    await asyncio.sleep(0)
    connection.data_received(frame(b"{}"))
    await asyncio.sleep(0.01)
    assert not closing.done()
    connection.data_received(frame((1012).to_bytes(2, "big"), 8))
    await asyncio.wait_for(closing, 1)

    assert transport.written == control_frame(8, (1012).to_bytes(2, "big") + b"shutdown")
    connection.connection_lost(None)


async def test_client_that_sends_is_sent_no_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time begins anew with everything that it sends."""
    monkeypatch.setattr(socket_connection, "PING_S", 0.2)
    transport = Paused()
    connection = SocketConnection(transport, Owner(), 1000)
    for _ in range(6):
        await asyncio.sleep(0.08)
        connection.data_received(frame(b"{}"))
    assert transport.written == b""
    await eventually(lambda: bool(transport.written))

    assert transport.written == control_frame(9, b"")
    connection.connection_lost(None)
