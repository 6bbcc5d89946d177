"""aiokafka's connections to a broker that stops answering: what is reported, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiokafka import conn
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import JoinGroupRequest, SyncGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from structlog.testing import capture_logs

from streamworker.kafka import compat
from streamworker.kafka.answers import SilentBrokers
from tests.turnable import SocketLoop, run, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEYS = {3: 0, 1: 4, 10: 0, 11: 0, 14: 0}
"""The one version of each API that the broker knows: Metadata, Fetch, FindCoordinator, JoinGroup, SyncGroup."""

VERSIONS = struct.pack(">hi", 0, len(KEYS)) + b"".join(
    struct.pack(">hhh", key, version, version) for key, version in KEYS.items()
)
NO_METADATA = struct.pack(">ii", 0, 0)


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> SilentBrokers:
    """Forget the outages of other tests."""
    brokers = SilentBrokers()
    monkeypatch.setattr(compat, "_silent", brokers)
    return brokers


class Broker:
    """A server that answers the first request of a connection, and others when the test says so."""

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[int] = []
        """The correlation ids of the requests that have no answer yet."""
        self.identifies = True
        self._writer: asyncio.StreamWriter | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await reader.readexactly(4))
                head = (await reader.readexactly(size))[:8]
                key, _, number = struct.unpack(">hhi", head.ljust(8, b"\0"))  # a token has no header
                if key == 18 and self.identifies:  # ApiVersions
                    self.write(struct.pack(">i", number) + VERSIONS)
                else:
                    self.requests.append(number)
        writer.close()

    def write(self, response: bytes) -> None:
        assert self._writer is not None
        self._writer.write(len(response).to_bytes(4) + response)

    def answer(self, body: bytes = NO_METADATA) -> None:
        """Answer the oldest request."""
        self.write(struct.pack(">i", self.requests.pop(0)) + body)

    def begin_to_answer(self, size: int) -> None:
        """Announce a response of this size."""
        assert self._writer is not None
        self._writer.write(size.to_bytes(4))

    def write_part(self, part: bytes) -> None:
        assert self._writer is not None
        self._writer.write(part)


@asynccontextmanager
async def serving() -> AsyncIterator[Broker]:
    """Yield a broker that listens."""
    broker = Broker()
    server = await asyncio.start_server(broker.serve, "127.0.0.1", 0)
    broker.port = server.sockets[0].getsockname()[1]
    try:
        yield broker
    finally:
        server.close()
        await asyncio.sleep(0.1)  # the tasks of closed connections end


@asynccontextmanager
async def connected(**over: Any) -> AsyncIterator[tuple[Broker, Any]]:
    """Yield a broker and an identified connection to it, which is closed afterwards."""
    async with serving() as broker:
        connection = await conn.create_conn("127.0.0.1", broker.port, request_timeout_ms=60_000, **over)
        try:
            yield broker, connection
        finally:
            connection.close()


def test_broker_that_stops_answering_is_reported_within_three_seconds_and_when_it_answers() -> None:
    """The request's own time limit is a minute."""

    async def work() -> None:
        async with connected() as (broker, connection):
            waiting = asyncio.ensure_future(connection.send(MetadataRequest([])))
            await asyncio.sleep(1.9)
            assert logs == []
            await asyncio.sleep(1.1)
            assert [(line["event"], line["broker"], line["request"]) for line in logs] == [
                ("kafka.not_answering", broker.address, "Metadata")
            ]
            broker.answer()
            await waiting

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert [line["event"] for line in logs] == ["kafka.not_answering", "kafka.answering"]


@pytest.mark.parametrize(
    ("request_", "after_s"),
    [
        (FetchRequest(500, 1, 1, 0, []), 3.0),
        (FetchRequest(10_000, 1, 1, 0, []), 12.5),
        (FindCoordinatorRequest("g", 0), 2.5),
        (JoinGroupRequest("g", 1000, 1000, "", None, "consumer", []), None),
        (SyncGroupRequest("g", 1, "m", None, []), None),
    ],
    ids=["fetch", "long fetch", "coordinator", "join", "sync"],
)
def test_request_that_the_broker_may_hold_is_overdue_later(request_: Any, after_s: float | None) -> None:
    """A fetch by its own wait; a join waits for the other members, which has a line of its own."""

    async def work() -> float | None:
        async with connected() as (_, connection):
            loop = asyncio.get_running_loop()
            began = loop.time()
            waiting = asyncio.ensure_future(connection.send(request_))
            with suppress(TimeoutError):
                await until(lambda: logs, within_s=40, every_s=0.05)
            waiting.cancel()
            return loop.time() - began if logs else None

    with capture_logs() as logs:
        found = run(work(), SocketLoop)

    if after_s is None:
        assert found is None
    else:
        assert found is not None
        assert after_s - 0.6 < found < after_s + 0.1


def test_requests_that_are_answered_are_not_reported() -> None:
    """Also where each one takes a second and a half, and one always waits behind another one."""

    async def work() -> None:
        async with connected() as (broker, connection):
            waiting = [asyncio.ensure_future(connection.send(MetadataRequest([]))) for _ in range(5)]
            for _ in range(5):
                await asyncio.sleep(1.5)
                broker.answer()
            await asyncio.gather(*waiting)
            await asyncio.sleep(10)

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert logs == []


def test_response_that_arrives_slowly_is_not_reported() -> None:
    """A large fetch response over a slow network: ten seconds, a piece each second."""

    async def work() -> None:
        async with connected() as (broker, connection):
            waiting = asyncio.ensure_future(connection.send(MetadataRequest([])))
            await asyncio.sleep(1)
            response = struct.pack(">i", broker.requests[0]) + NO_METADATA
            broker.begin_to_answer(len(response))
            for piece in response:
                await asyncio.sleep(1)
                broker.write_part(bytes([piece]))
            await waiting

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert logs == []


def test_broker_that_hangs_while_a_connection_is_opened_is_reported() -> None:
    """The kernel accepts connections for a process that is stopped; the first request has no answer."""

    async def work() -> None:
        async with serving() as broker:
            broker.identifies = False
            with pytest.raises(TimeoutError):
                await conn.create_conn("127.0.0.1", broker.port, request_timeout_ms=5_000)

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert [(line["event"], line["request"]) for line in logs] == [("kafka.not_answering", "ApiVersion")]


@pytest.mark.parametrize("error", [TimeoutError, OSError])
def test_host_that_does_not_accept_connections_is_reported_until_the_attempt_ends(
    monkeypatch: pytest.MonkeyPatch, silent: SilentBrokers, error: type[Exception]
) -> None:
    """A stopped process whose queue of connections is full, or a firewall that drops packets. No timer stays."""

    async def work() -> None:
        loop = asyncio.get_running_loop()

        async def never(*_: Any, **__: Any) -> Any:
            await asyncio.sleep(4)
            raise error

        monkeypatch.setattr(loop, "create_connection", never)
        with pytest.raises(error):
            await conn.create_conn("10.255.255.1", 9092, request_timeout_ms=60_000)
        await asyncio.sleep(20)

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert [(line["broker"], line["request"]) for line in logs] == [("10.255.255.1:9092", "connection")]
    assert silent  # until a connection is answered


@pytest.mark.parametrize("frozen_s", [3, 50])
def test_process_that_was_frozen_does_not_report_the_broker(frozen_s: float) -> None:
    """SIGSTOP, a paused virtual machine, or a callback that blocks the loop: the answer may not have been read."""

    async def work() -> None:
        async with connected() as (broker, connection):
            waiting = asyncio.ensure_future(connection.send(MetadataRequest([])))
            await asyncio.sleep(0.5)
            cast("Any", asyncio.get_running_loop())._jumping.now += frozen_s
            await asyncio.sleep(0.5)
            broker.answer()
            await waiting

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert logs == []


def test_closed_connection_is_not_checked_any_more() -> None:
    """Nor one that is used after its close: `send` raises, and starts no checks."""

    async def work() -> None:
        async with connected() as (_, connection):
            waiting = asyncio.ensure_future(connection.send(MetadataRequest([])))
            await asyncio.sleep(1)
            connection.close()
            with pytest.raises(KafkaConnectionError, match="closed"):
                await waiting
            with pytest.raises(KafkaConnectionError, match="No connection"):
                connection.send(MetadataRequest([]))
            await asyncio.sleep(20)

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert logs == []


def test_idle_connection_has_no_timer() -> None:
    """A worker has some dozens of them."""

    async def work() -> Any:
        async with connected() as (broker, connection):
            waiting = asyncio.ensure_future(connection.send(MetadataRequest([])))
            await asyncio.sleep(0.1)
            assert connection._timer is not None
            broker.answer()
            await waiting
            await asyncio.sleep(0.3)
            return connection._timer

    assert run(work(), SocketLoop) is None


def test_checks_do_not_keep_a_connection_alive(recwarn: pytest.WarningsRecorder) -> None:
    """aiokafka warns of a connection that was not closed when it is collected; a timer must not hide that."""

    async def work() -> None:
        async with serving() as broker:
            connection = await conn.create_conn("127.0.0.1", broker.port)
            waiting = asyncio.ensure_future(connection.send(MetadataRequest([])))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            del connection
            gc.collect()
            assert any("Unclosed AIOKafkaConnection" in str(one.message) for one in recwarn)

    run(work(), SocketLoop)
    recwarn.clear()


def test_token_of_sasl_without_a_header_has_a_name() -> None:
    """Brokers before 1.0 take tokens that are not requests: aiokafka keeps no request for them."""

    async def work() -> None:
        async with connected() as (_, connection):
            waiting = asyncio.ensure_future(connection._send_sasl_token(b"token"))
            await asyncio.sleep(3)
            waiting.cancel()

    with capture_logs() as logs:
        run(work(), SocketLoop)

    assert [line["request"] for line in logs] == ["SaslAuthenticate"]


def test_unsent_request_is_not_overdue_while_it_is_being_sent() -> None:
    """A large request over a slow network: the server reads a part of it each second."""

    async def work(listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(conn.create_conn(*listener.getsockname(), request_timeout_ms=60_000))
        accepted, _ = await loop.sock_accept(listener)
        with accepted:
            await loop.sock_recv(accepted, 4096)
            response = struct.pack(">i", 1) + VERSIONS
            await loop.sock_sendall(accepted, len(response).to_bytes(4) + response)
            connection = await opening
            waiting = asyncio.ensure_future(connection.send(MetadataRequest(["t" * 200] * 100_000)))
            for _ in range(8):
                await asyncio.sleep(1)
                await receive(accepted, 1_000_000)
            assert logs == []
            await asyncio.sleep(3)
            assert [line["request"] for line in logs] == ["Metadata"]
            waiting.cancel()
            connection.close()
            await asyncio.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener, capture_logs() as logs:
        listener.setblocking(False)
        run(work(listener), SocketLoop)


async def receive(accepted: socket.socket, size: int) -> None:
    """Read this many bytes."""
    loop = asyncio.get_running_loop()
    while size > 0:
        size -= len(await loop.sock_recv(accepted, min(size, 65_536)))
