"""Requests: bodies in memory and generated, upstreams that read slowly or answer early, timeouts, cancellation."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.http1 import CHUNKED, chunk, chunked, head
from tests.upstream.transport.server import Peer, connect, serving, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.upstream.connection import Connection

LARGE = bytes(range(256)) * 20_000  # 5 MB


def limits(**values: float) -> httpx.Timeout:
    return httpx.Timeout(5.0, **values)


async def test_large_body_arrives_at_an_upstream_that_reads_slowly() -> None:
    """Byte by byte the same, although it does not fit into the socket."""

    async def serve(peer: Peer) -> None:
        await asyncio.sleep(0.02)
        _, _, body = await peer.request()
        await peer.send(chunked(b"same" if body == LARGE else b"different"))
        await peer.closed()

    async with serving(serve) as server, connect() as (client, transport):
        assert (await client.post(server.url, content=LARGE)).content == b"same"
        assert transport.idle_connections == 1


async def test_generated_body_is_sent_in_chunks() -> None:
    """As it is generated."""

    async def generate() -> AsyncIterator[bytes]:
        for piece in (b"hel", b"", b"lo"):
            await asyncio.sleep(0)
            yield piece

    async def serve(peer: Peer) -> None:
        _, headers, _ = await peer.request()
        body = await peer.reader.readuntil(b"0\r\n\r\n")
        await peer.send(chunked(headers["transfer-encoding"].encode(), b" ", body))
        await peer.closed()

    async with serving(serve) as server, connect() as (client, _):
        answer = (await client.post(server.url, content=generate())).content
    assert answer == b"chunked 3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"


@pytest.mark.parametrize("kind", ["memory", "generated", "generated-slowly"])
async def test_answer_before_the_request_is_sent_is_returned(kind: str) -> None:
    """An upstream may refuse a large request without reading it. Its connection is not used again."""
    pause_s, size = (0.01, 1) if kind == "generated-slowly" else (0, 65536)

    async def generate() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x" * size
            await asyncio.sleep(pause_s)

    async def serve(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(head(b"Content-Length: 5", status=b"HTTP/1.1 413 Too Large") + b"large")
        await asyncio.sleep(0.5)

    async with serving(serve) as server, connect() as (client, transport):
        response = await client.post(server.url, content=LARGE * 4 if kind == "memory" else generate())
        assert (response.status_code, response.content) == (413, b"large")
        assert transport.open_connections == 0


async def test_answer_before_the_request_arrives_is_returned() -> None:
    """A load balancer without a backend answers on accept, and closes."""

    async def serve(peer: Peer) -> None:
        await peer.send(head(b"Connection: close", status=b"HTTP/1.0 503 Overloaded") + b"no backend")
        peer.writer.write_eof()
        await peer.closed()

    async with serving(serve) as server, connect() as (client, _):
        response = await client.get(server.url)
    assert (response.status_code, response.content) == (503, b"no backend")


async def test_connection_whose_answer_began_before_the_request_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The upstream may answer the request as well, and the next one would get that answer."""

    async def serve(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 503 Overloaded\r\n")
        await peer.request()
        await peer.send(b"Content-Length: 0\r\n\r\n")
        await peer.closed()

    async with serving(serve) as server, connect() as (client, transport):
        dial = transport._dialer.connect

        async def dial_and_wait(*arguments: Any) -> Connection:
            connection = await dial(*arguments)
            await until(lambda: connection._early)
            return connection

        monkeypatch.setattr(transport._dialer, "connect", dial_and_wait)
        for number in (1, 2):
            assert (await client.get(server.url)).status_code == 503
            assert server.connections == number
            assert transport.open_connections == 0


async def test_body_of_wrong_length_is_refused_and_closes_the_connection() -> None:
    """Half a request would be the beginning of the next one."""
    async with serving(chunked()) as server, connect() as (client, transport):
        with pytest.raises(httpx.LocalProtocolError):
            await client.post(server.url, content=b"abc", headers={"Content-Length": "4"})
        assert transport.open_connections == 0


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "127.0.0.1:80/", "http:///x"])
async def test_url_that_is_not_http_is_refused(url: str) -> None:
    """As httpx's own transport does."""
    async with connect() as (client, _):
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get(url)


async def test_upstream_that_does_not_answer_is_a_read_timeout() -> None:
    """The connection is closed."""

    async def serve(peer: Peer) -> None:
        await peer.closed()

    async with serving(serve) as server, connect(limits=limits(read=0.05)) as (client, transport):
        with pytest.raises(httpx.ReadTimeout):
            await client.get(server.url)
        assert transport.open_connections == 0


async def test_upstream_that_falls_silent_is_a_read_timeout() -> None:
    """The time begins anew with each read; what arrived is kept."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(4):
            await asyncio.sleep(0.05)
            await peer.send(chunk(b"x"))
        await peer.closed()

    async with serving(serve) as server, connect(limits=limits(read=0.15)) as (client, transport):
        body = b""
        async with client.stream("GET", server.url) as response:
            with pytest.raises(httpx.ReadTimeout):
                async for data in response.aiter_raw():
                    body += data
        assert body == b"xxxx"
        assert transport.open_connections == 0


async def test_upstream_that_does_not_read_is_a_write_timeout() -> None:
    """The connection is closed."""
    stop = asyncio.Event()

    async def serve(_: Peer) -> None:
        await stop.wait()

    async with serving(serve) as server, connect(limits=limits(write=0.05)) as (client, transport):
        with pytest.raises(httpx.WriteTimeout):
            await client.post(server.url, content=LARGE * 4)
        assert transport.open_connections == 0
        stop.set()


async def test_upstream_that_hangs_up_before_it_answers_is_a_protocol_error() -> None:
    """On a new connection there is nothing to try again."""
    for reset in (False, True):

        async def serve(peer: Peer, *, reset: bool = reset) -> None:
            await peer.request()
            if reset:
                peer.reset()

        async with serving(serve) as server, connect() as (client, _):
            with pytest.raises(httpx.RemoteProtocolError, match="Server disconnected"):
                await client.get(server.url)
            assert server.connections == 1


async def test_cancellation_at_any_moment_leaks_nothing() -> None:
    """Once or twice, while connecting, sending, waiting for the head, reading, or between; what is not cut is right."""
    rng = random.Random(7)

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await asyncio.sleep(rng.random() * 0.002)
            await peer.send(CHUNKED + chunk(b"hel"))
            await asyncio.sleep(rng.random() * 0.002)
            await peer.send(chunk(b"lo") + b"0\r\n\r\n")

    async with serving(serve) as server, connect() as (client, transport):

        async def call() -> bytes:
            async with client.stream("POST", server.url, content=b"x" * 100_000) as response:
                return b"".join([data async for data in response.aiter_raw()])

        async def cancelled(delay_s: float, *, twice: bool) -> bytes | None:
            task = asyncio.create_task(call())
            await asyncio.sleep(delay_s)
            task.cancel()
            if twice:
                await asyncio.sleep(0)
                task.cancel()
            try:
                return await task
            except asyncio.CancelledError:
                return None

        for _ in range(15):
            calls = [cancelled(rng.random() * 0.02, twice=rng.random() < 0.5) for _ in range(20)]
            for result in await asyncio.gather(*calls):
                assert result in {None, b"hello"}
        await until(lambda: transport.open_connections == transport.idle_connections)
        assert await call() == b"hello"


async def test_cancellation_at_every_step_leaks_nothing() -> None:
    """The call is cancelled after 0, 1, 2 … turns of the loop, until it is done before that."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        for turns in range(1000):
            task = asyncio.create_task(client.get(server.url))
            for _ in range(turns):
                await asyncio.sleep(0)
            was_done = task.done()
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: transport.open_connections == transport.idle_connections)
            if was_done:
                break
        assert was_done
        assert turns > 3


async def test_cancellation_after_the_response_does_not_close_a_connection_that_others_use() -> None:
    """The exchange is over, and the connection in the pool, before the caller has run again."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        release = transport._pool.release
        task = asyncio.create_task(client.get(server.url))

        def cancel_and_release(connection: Connection) -> None:
            task.cancel()
            release(connection)

        transport._pool.release = cancel_and_release  # type: ignore[method-assign]
        await asyncio.wait([task])
        assert task.cancelled()
        assert transport.idle_connections == 1
        transport._pool.release = release  # type: ignore[method-assign]
        assert (await client.get(server.url)).content == b"hello"
        assert server.connections == 1


async def test_connection_taken_before_its_last_caller_has_run_serves_both() -> None:
    """The two callers of a connection do not wake each other's wait."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        release = transport._pool.release
        tasks = [asyncio.create_task(client.get(server.url))]

        def release_and_take(connection: Connection) -> None:
            release(connection)
            if len(tasks) == 1:
                tasks.append(asyncio.create_task(client.get(server.url)))

        transport._pool.release = release_and_take  # type: ignore[method-assign]
        await until(lambda: len(tasks) == 2)
        responses = await asyncio.gather(*tasks)
        assert {response.content for response in responses} == {b"hello"}
        assert server.connections == 1


async def test_connection_lost_before_the_request_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing will arrive on it any more that could end the wait."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        dial = transport._dialer.connect

        async def dial_and_lose(*arguments: Any) -> Connection:
            connection = await dial(*arguments)
            connection.abort()
            await asyncio.sleep(0.01)
            return connection

        monkeypatch.setattr(transport._dialer, "connect", dial_and_lose)
        async with asyncio.timeout(1):
            with pytest.raises(httpx.RemoteProtocolError, match="Server disconnected"):
                await client.get(server.url)
