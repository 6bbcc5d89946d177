"""Bodies over a socket: every kind, every fault, pulled and pushed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest

from streamworker.upstream.http1_response import MAX_HEAD_BYTES, MAX_HEADERS
from tests.http1 import BODIES, CHUNKED, FAULTS, UNTIL_EOF, chunk, chunked, head
from tests.upstream.transport.server import Peer, Push, connect, serving

DONE = b"data: [DONE]\n\n"


async def pull(response: httpx.Response) -> tuple[bytes, httpx.TransportError | None]:
    """Read a body to its end."""
    body = b""
    try:
        async for data in response.aiter_raw():
            body += data
    except httpx.TransportError as error:
        return body, error
    return body, None


async def push(response: httpx.Response) -> tuple[bytes, httpx.TransportError | None]:
    """Subscribe to a body, and wait for its end."""
    subscriber = Push(response).subscribe()
    await subscriber.ended.wait()
    assert len(subscriber.ends) == 1
    return subscriber.body, subscriber.ends[0]


READERS = pytest.mark.parametrize("read", [pull, push])
Reader = Callable[[httpx.Response], Awaitable[tuple[bytes, httpx.TransportError | None]]]


@READERS
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("by_byte", [False, True])
async def test_body_of_every_kind_arrives(name: str, read: Reader, *, by_byte: bool) -> None:
    """Whole, and byte by byte."""
    data, body = BODIES[name]

    async def serve(peer: Peer) -> None:
        await peer.request()
        await (peer.send_single_bytes(data) if by_byte else peer.send(data))
        await peer.closed()

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        assert await read(response) == (body, None)


@READERS
@pytest.mark.parametrize("name", UNTIL_EOF)
async def test_body_without_length_ends_with_the_connection(name: str, read: Reader) -> None:
    """And the connection is not used again."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(UNTIL_EOF[name] + b"hel")
        await peer.send(b"lo")

    async with serving(serve) as server, connect() as (client, transport):
        async with client.stream("GET", server.url) as response:
            assert await read(response) == (b"hello", None)
        assert transport.idle_connections == 0


@READERS
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("later", [False, True])
async def test_framing_fault_is_reported_within_100_ms_and_loses_nothing(
    name: str, read: Reader, *, later: bool
) -> None:
    """The server neither ends nor closes: only the faulty byte itself can end the response."""
    body, kept = FAULTS[name]
    sent_at = 0.0

    async def serve(peer: Peer) -> None:
        nonlocal sent_at
        await peer.request()
        start = CHUNKED + chunk(DONE)
        if later:
            await peer.send(start + body[:-1])
            await asyncio.sleep(0.01)
        sent_at = time.perf_counter()
        await peer.send(body[-1:] if later else start + body)
        await peer.closed()

    async with serving(serve) as server, connect() as (client, transport):
        async with client.stream("GET", server.url) as response:
            received, error = await read(response)
            took = time.perf_counter() - sent_at
        assert received == DONE + kept
        assert isinstance(error, httpx.RemoteProtocolError)
        assert took < 0.1
        assert transport.open_connections == 0


@READERS
@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (head(b"Content-Length: 10") + b"hello", "without sending complete message body"),
        (CHUNKED + chunk(b"hello"), "without sending complete message body"),
        (CHUNKED + b"9\r\nhello", "without sending complete message body"),
    ],
)
async def test_connection_that_ends_inside_a_body_is_an_error(sent: bytes, words: str, read: Reader) -> None:
    """EOF is RemoteProtocolError."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(sent)

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        body, error = await read(response)
    assert body == b"hello"
    assert isinstance(error, httpx.RemoteProtocolError)
    assert words in str(error)


@READERS
async def test_connection_reset_inside_a_body_is_a_read_error(read: Reader) -> None:
    """What was received before is kept."""
    received = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + chunk(b"hello"))
        await received.wait()
        peer.reset()

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        received.set()
        body, error = await read(response)
    assert body == b"hello"
    assert isinstance(error, httpx.ReadError)


@READERS
async def test_excess_data_after_a_body_costs_the_connection_alone(read: Reader) -> None:
    """The body is whole; the next request gets a connection of its own."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(chunked(b"hello") + b"junk")
        await peer.closed()

    async with serving(serve) as server, connect() as (client, transport):
        for _ in range(2):
            async with client.stream("GET", server.url) as response:
                assert await read(response) == (b"hello", None)
        assert server.connections == 2
        assert transport.idle_connections == 0


async def test_head_of_64_kib_and_200_headers_beside_the_usual_ones_is_accepted() -> None:
    """What servers are known to send; the usual fields come on top."""
    lines = [b"X-%d: %b" % (number, b"y" * 324) for number in range(200)]
    answer = head(*lines, b"Content-Type: text/event-stream", b"Content-Length: 2", b"Server: x")
    assert sum(map(len, lines)) > 64 << 10
    async with serving(answer + b"ok") as server, connect() as (client, _):
        response = await client.get(server.url)

    assert response.content == b"ok"


async def test_head_of_the_largest_size_and_number_is_accepted() -> None:
    """Both limits at once."""
    lines = [b"X-%d: y" % number for number in range(MAX_HEADERS - 2)]
    room = MAX_HEAD_BYTES - len(head(*lines, b"Content-Length: 2", b"Y: "))
    answer = head(*lines, b"Content-Length: 2", b"Y: " + b"y" * room)
    assert len(answer) == MAX_HEAD_BYTES

    async with serving(answer + b"ok") as server, connect() as (client, _):
        response = await client.get(server.url)

    assert response.content == b"ok"
    assert len(response.headers) == MAX_HEADERS


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (head(b"Y: " + b"y" * MAX_HEAD_BYTES), f"larger than {MAX_HEAD_BYTES} bytes"),
        (
            head(*[b"X-%d: y" % number for number in range(MAX_HEADERS + 1)]),
            f"more than {MAX_HEADERS} headers",
        ),
        (head(status=b"HTTP/1.1 101 Switching Protocols"), "101"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not begin with HTTP/"),
    ],
)
async def test_head_that_is_refused_says_why(answer: bytes, words: str) -> None:
    """The error names the limit."""
    async with serving(answer) as server, connect() as (client, transport):
        with pytest.raises(httpx.RemoteProtocolError, match=words):
            await client.get(server.url)
        assert transport.open_connections == 0


async def test_response_has_what_httpx_expects_of_it() -> None:
    """Status, reason, version, headers in order, and their encoding."""
    answer = head(b"A: 1", b"a: 2", b"Content-Length: 0", status=b"HTTP/1.0 529 Site is overloaded")
    async with serving(answer) as server, connect() as (client, _):
        response = await client.get(server.url)

    assert (response.status_code, response.reason_phrase) == (529, "Site is overloaded")
    assert response.http_version == "HTTP/1.0"
    assert response.headers.get_list("a") == ["1", "2"]


async def test_interim_responses_are_skipped() -> None:
    """Also where the final one comes much later."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(head(status=b"HTTP/1.1 100 Continue"))
        await asyncio.sleep(0.01)
        await peer.send(head(b"Link: </>", status=b"HTTP/1.1 103 Early Hints") + chunked(b"hello"))
        await peer.closed()

    async with serving(serve) as server, connect() as (client, _):
        assert (await client.get(server.url)).content == b"hello"


async def test_head_request_waits_for_no_body() -> None:
    """Although the head announces one."""
    async with serving(head(b"Content-Length: 5")) as server, connect() as (client, _):
        assert (await client.head(server.url)).content == b""


async def test_slow_reader_bounds_what_is_buffered() -> None:
    """The server cannot send more than the buffers of two sockets and of one body hold."""
    piece = chunk(b"x" * 65536)
    sent = 0

    async def serve(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(512):  # 32 MiB
            await peer.send(piece)
            sent += 65536
        await peer.send(b"0\r\n\r\n")
        await peer.closed()

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        feed = response.extensions["body_feed"]
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.05)
        assert sent < 16 << 20
        assert feed.buffered_bytes <= 65536 + 262144
        size = 0
        async for data in response.aiter_raw():
            assert len(data) <= 65536 + 262144
            size += len(data)
    assert size == 32 << 20
