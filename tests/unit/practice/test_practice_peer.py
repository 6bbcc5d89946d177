"""One connection of the practice upstream: requests as any client sends them, and clients that leave."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.practice import peer as module
from streamworker.practice.peer import BadRequestError, ClientGoneError, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIMIT_S = 5


class Pair:
    """A peer, and its client."""

    def __init__(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.peer = peer
        self.reader = reader
        self.writer = writer

    async def send(self, *parts: bytes) -> None:
        """Send parts as the client, each in a packet of its own."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def received(self) -> bytes:
        """Return everything that the client is sent until the connection is closed."""
        return await asyncio.wait_for(self.reader.read(), LIMIT_S)

    def leave(self) -> None:
        """Close the client's side."""
        self.writer.close()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Return a connected pair."""
    here, there = socket.socketpair()
    server = await asyncio.open_connection(sock=here)
    client = await asyncio.open_connection(sock=there)
    made = Pair(Peer(*server), *client)
    yield made
    await made.peer.close()
    client[1].close()


def post(body: bytes, *headers: bytes) -> bytes:
    """Return a request with a body."""
    lines = [b"POST /v1/x HTTP/1.1", b"Host: h", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_request_is_whole_however_it_arrives(pair: Pair, size: int) -> None:
    """Names of headers are in lower case, the body byte for byte."""
    text = post(b'{"a": 1}', b"X-One: \xe9")
    sending = asyncio.create_task(pair.send(*(text[at : at + size] for at in range(0, len(text), size))))
    request = await asyncio.wait_for(pair.peer.next_request(), LIMIT_S)
    await sending

    assert request is not None
    assert (request.method, request.target, request.body) == ("POST", "/v1/x", b'{"a": 1}')
    assert request.headers["x-one"] == "\xe9"


async def test_connection_without_a_request_ends_cleanly(pair: Pair) -> None:
    """Clients open connections in advance."""
    pair.leave()

    assert await asyncio.wait_for(pair.peer.next_request(), LIMIT_S) is None


async def test_connection_that_is_reset_ends_like_a_closed_one(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no answer either."""

    async def reset(_: int) -> bytes:
        raise ConnectionResetError

    monkeypatch.setattr(pair.peer._reader, "read", reset)

    assert await pair.peer.next_request() is None


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"not HTTP\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
async def test_request_that_is_not_http_is_refused(pair: Pair, text: bytes, status: int) -> None:
    """The answer closes the connection."""
    await pair.send(text)
    with pytest.raises(BadRequestError) as refused:
        await asyncio.wait_for(pair.peer.next_request(), LIMIT_S)
    assert refused.value.status == status
    await pair.peer.refuse(status, {"error": "no"})
    await pair.peer.close()
    answer = await pair.received()

    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in answer.lower()
    assert answer.endswith(b'{"error":"no"}')


@pytest.mark.parametrize(("size", "is_refused"), [(10, False), (11, True)])
async def test_body_is_bounded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, size: int, *, is_refused: bool
) -> None:
    """The limit itself is allowed."""
    monkeypatch.setattr(module, "MAX_REQUEST_BYTES", 10)
    await pair.send(post(b"x" * size))
    if is_refused:
        with pytest.raises(BadRequestError, match="over 10 bytes") as refused:
            await pair.peer.next_request()
        assert refused.value.status == 413
    else:
        request = await pair.peer.next_request()
        assert request is not None
        assert len(request.body) == size


async def test_client_that_waits_for_100_continue_gets_it(pair: Pair) -> None:
    """curl sends a large body only then."""
    text = post(b"body", b"Expect: 100-continue")
    reading = asyncio.create_task(pair.peer.next_request())
    await pair.send(text[:-4])
    line = await asyncio.wait_for(pair.reader.readline(), LIMIT_S)
    assert line.startswith(b"HTTP/1.1 100")
    await pair.send(text[-4:])
    request = await asyncio.wait_for(reading, LIMIT_S)

    assert request is not None
    assert request.body == b"body"


async def test_requests_follow_one_another_on_a_connection(pair: Pair) -> None:
    """Also where the second one was sent before the first answer."""
    await pair.send(post(b"one") + post(b"two"))
    bodies = []
    for _ in range(2):
        request = await asyncio.wait_for(pair.peer.next_request(), LIMIT_S)
        assert request is not None
        bodies.append(request.body)
        await pair.peer.reply_json(200, {})
        assert pair.peer.reuse()

    assert bodies == [b"one", b"two"]


async def test_connection_with_an_unfinished_answer_is_not_used_again(pair: Pair) -> None:
    """The next answer would be read as a part of it."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    await pair.peer.send_head(200, [("content-type", "text/event-stream")])
    assert not pair.peer.reuse()
    await pair.peer.end_body()

    assert pair.peer.reuse()


@pytest.mark.parametrize(
    ("options", "head", "body"),
    [
        ({}, b"transfer-encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n"),
        ({"length": 3}, b"content-length: 3", b"abc"),
        ({"closes": True}, b"connection: close", b"abc"),
    ],
)
async def test_body_is_framed_as_its_head_says(
    pair: Pair, options: dict[str, Any], head: bytes, body: bytes
) -> None:
    """In chunks, of a known length, or up to the end of the connection."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    await pair.peer.send_head(200, [("content-type", "text/plain")], **options)
    await pair.peer.send_body(b"abc")
    await pair.peer.end_body()
    await pair.peer.close()
    answer = await pair.received()
    sent_head, _, sent_body = answer.partition(b"\r\n\r\n")

    assert sent_head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head in sent_head.lower()
    assert sent_body == body


async def test_torn_chunk_never_ends(pair: Pair) -> None:
    """Its length promises more than is sent: a client that reads it as an end is wrong."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    await pair.peer.send_head(200, [])
    await pair.peer.send_torn(b"abc")
    await pair.peer.close()
    _, _, body = (await pair.received()).partition(b"\r\n\r\n")
    length, _, data = body.partition(b"\r\n")

    assert data == b"abc"
    assert int(length, 16) > len(data)


async def test_old_client_gets_a_body_without_chunks(pair: Pair) -> None:
    """HTTP/1.0 has none."""
    await pair.send(b"GET / HTTP/1.0\r\n\r\n")
    await pair.peer.next_request()
    await pair.peer.send_head(200, [])
    await pair.peer.send_body(b"abc")
    await pair.peer.end_body()
    assert not pair.peer.reuse()
    await pair.peer.close()

    assert (await pair.received()).endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize(("status", "reason"), [(404, b"Not Found"), (529, b""), (524, b"")])
async def test_status_without_a_name_is_sent(pair: Pair, status: int, reason: bytes) -> None:
    """Providers use numbers that no standard has."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    await pair.peer.reply_json(status, {})

    assert await asyncio.wait_for(pair.reader.readline(), LIMIT_S) == b"HTTP/1.1 %d %b\r\n" % (status, reason)


# Clients that leave


async def test_client_that_leaves_ends_a_pause(pair: Pair) -> None:
    """Also one without end, and although nothing is written: an upstream that goes on generating costs money."""
    async with pair.peer.watched():
        pausing = asyncio.create_task(pair.peer.pause(None))
        await asyncio.sleep(0.01)
        assert not pausing.done()
        pair.leave()
        with pytest.raises(ClientGoneError):
            await asyncio.wait_for(pausing, LIMIT_S)
        for seconds in (None, 0, 60):
            with pytest.raises(ClientGoneError):
                await asyncio.wait_for(pair.peer.pause(seconds), LIMIT_S)
        with pytest.raises(ClientGoneError):
            await pair.peer.send(b"x")
    assert not pair.peer.reuse()


async def test_pause_ends_by_itself(pair: Pair) -> None:
    """Its timer does not wake a later one."""
    async with pair.peer.watched():
        await asyncio.wait_for(pair.peer.pause(0.01), LIMIT_S)
        await asyncio.wait_for(pair.peer.pause(-1), LIMIT_S)
        pausing = asyncio.create_task(pair.peer.pause(None))
        await asyncio.sleep(0.03)
        assert not pausing.done()
        pausing.cancel()


async def test_next_request_that_comes_early_is_kept(pair: Pair) -> None:
    """It is read while the former answer streams, and does not mean that the client has left."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    async with pair.peer.watched():
        await pair.send(post(b"two"))
        await asyncio.sleep(0.01)
        await pair.peer.reply_json(200, {})
    assert pair.peer.reuse()
    request = await asyncio.wait_for(pair.peer.next_request(), LIMIT_S)

    assert request is not None
    assert request.body == b"two"


async def test_client_that_sends_too_much_early_is_taken_for_gone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sends is not kept without a limit."""
    monkeypatch.setattr(module, "_MAX_EARLY_BYTES", 10)
    async with pair.peer.watched():
        await pair.send(b"x" * 11)
        watch = [task for task in asyncio.all_tasks() if "_watch" in str(task.get_coro())]
        await asyncio.wait_for(asyncio.wait(watch), LIMIT_S)
        await pair.send(b"y" * 100)
        await asyncio.sleep(0.01)

    assert len(pair.peer._http.trailing_data[0]) <= 11


async def test_answer_to_a_client_that_has_reset_is_not_an_error_of_the_server(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task ends quietly; a refusal is not even tried again."""

    async def broken() -> None:
        raise BrokenPipeError

    await pair.send(b"not HTTP\r\n\r\n")
    with pytest.raises(BadRequestError):
        await pair.peer.next_request()
    monkeypatch.setattr(pair.peer._writer, "drain", broken)
    with pytest.raises(ClientGoneError):
        await pair.peer.send(b"x")
    await pair.peer.refuse(400, {})


async def test_refusal_after_an_answer_began_sends_nothing(pair: Pair) -> None:
    """HTTP has no place for it."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    await pair.peer.send_head(200, [], length=5)
    await pair.peer.send_body(b"ab")
    await pair.peer.refuse(500, {"error": "late"})
    await pair.peer.close()

    assert b"late" not in await pair.received()


async def test_unread_bytes_do_not_delay_the_end(pair: Pair) -> None:
    """A client that does not read would keep the connection for ever."""
    pair.peer._writer.transport.set_write_buffer_limits(high=1 << 30)
    await pair.peer.send(b"x" * (4 << 20))
    assert pair.peer._writer.transport.get_write_buffer_size() > 0

    await asyncio.wait_for(pair.peer.close(), LIMIT_S)


# Details of the connection


async def test_body_of_known_length_after_a_chunked_one_has_no_chunks(pair: Pair) -> None:
    """How a body is framed is a matter of its own head, not of the answer before it."""
    await pair.send(post(b"one") + post(b"two"))
    await pair.peer.next_request()
    await pair.peer.send_head(200, [])
    await pair.peer.send_body(b"first")
    await pair.peer.end_body()
    assert pair.peer.reuse()
    await pair.peer.next_request()
    await pair.peer.send_head(200, [], length=6)
    await pair.peer.send_body(b"second")
    await pair.peer.end_body()
    await pair.peer.close()

    assert (await pair.received()).endswith(b"\r\n\r\nsecond")


async def test_first_byte_has_a_time_for_each_request(pair: Pair) -> None:
    """The account of calls has it; later bytes do not change it."""
    loop = asyncio.get_running_loop()
    await pair.send(post(b"one") + post(b"two"))
    await pair.peer.next_request()
    assert pair.peer.first_byte_at is None
    began = loop.time()
    await pair.peer.send_head(200, [])
    first = pair.peer.first_byte_at
    assert first is not None
    assert began <= first <= loop.time()
    await asyncio.sleep(0.002)
    await pair.peer.send_body(b"x")
    await pair.peer.end_body()
    assert pair.peer.first_byte_at == first
    assert pair.peer.reuse()
    await pair.peer.next_request()

    assert pair.peer.first_byte_at is None


@pytest.mark.parametrize("seconds", [0, -1, 0.02])
async def test_short_pause_ends_and_lets_other_tasks_run(pair: Pair, seconds: float) -> None:
    """A stream without pauses must not keep the loop from all others."""
    ran: list[int] = []
    loop = asyncio.get_running_loop()
    loop.call_soon(ran.append, 1)
    began = loop.time()
    await asyncio.wait_for(pair.peer.pause(seconds), LIMIT_S)

    assert ran == [1]
    assert seconds - 1e-3 <= loop.time() - began < 0.9


async def test_client_that_leaves_when_a_pause_is_over_is_not_an_error(pair: Pair) -> None:
    """Timer and watch may both end it, in one turn of the loop; without a pause there is nothing to end."""
    pausing = asyncio.get_running_loop().create_future()
    module._release(pausing)
    module._release(pausing)
    module._release(None)

    assert pausing.result() is None
    pair.leave()


async def test_client_that_leaves_after_an_early_request_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as is kept for the next request may come early."""
    monkeypatch.setattr(module, "_MAX_EARLY_BYTES", len(post(b"two")))
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    async with pair.peer.watched():
        pausing = asyncio.create_task(pair.peer.pause(None))
        await pair.send(post(b"two"))
        await asyncio.sleep(0.01)
        assert not pausing.done()
        pair.leave()
        with pytest.raises(ClientGoneError):
            await asyncio.wait_for(pausing, LIMIT_S)


async def test_watch_has_ended_behind_its_block(pair: Pair) -> None:
    """It must not read the next request's bytes."""
    before = asyncio.all_tasks()
    async with pair.peer.watched():
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks() - before) == 1

    assert asyncio.all_tasks() == before


async def test_connection_whose_client_has_gone_is_not_used_again(pair: Pair) -> None:
    """Although request and answer are whole."""
    await pair.send(post(b"one"))
    await pair.peer.next_request()
    async with pair.peer.watched():
        await pair.peer.reply_json(200, {})
        pair.leave()
        with pytest.raises(ClientGoneError):
            await asyncio.wait_for(pair.peer.pause(None), LIMIT_S)

    assert not pair.peer.reuse()


async def test_connection_has_no_buffer_above_the_sockets(pair: Pair) -> None:
    """What was counted as sent is in the kernel, so that a reset behind it loses nothing."""
    assert pair.peer._writer.transport.get_write_buffer_limits() == (0, 0)


async def test_reset_is_one_for_the_client() -> None:
    """RST, not FIN: a client must be able to tell a broken connection from a finished one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        await peer.next_request()
        peer.reset()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        writer.write(post(b"one"))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), LIMIT_S)
    finally:
        writer.close()
        server.close()
