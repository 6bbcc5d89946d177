"""Bodies that are pushed: registration, backpressure, early ends, draining."""

from __future__ import annotations

import asyncio
from functools import partial

import httpx

from tests.http1 import CHUNKED, chunk, chunked
from tests.upstream.transport.server import Peer, Push, connect, serving, until


async def test_subscriber_gets_the_bytes_behind_the_head_at_once() -> None:
    """Registration delivers it, the end included, before it returns."""
    async with (
        serving(chunked(b"hel", b"lo")) as server,
        connect() as (client, transport),
        client.stream("GET", server.url) as response,
    ):
        await until(lambda: transport.idle_connections == 1)
        subscriber = Push(response).subscribe()
        assert (subscriber.body, subscriber.ends) == (b"hello", [None])
        assert subscriber.feed.is_complete


async def test_subscriber_is_called_from_the_read() -> None:
    """One call per read, with all of the body in it."""
    go = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        await go.wait()
        await peer.send(chunk(b"a") + chunk(b"b"))
        await peer.closed()

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        subscriber = Push(response).subscribe()
        assert subscriber.pieces == []
        go.set()
        await until(lambda: subscriber.body != b"")
        assert subscriber.pieces == [b"ab"]
        assert subscriber.ends == []
        assert not subscriber.feed.is_complete


async def test_paused_subscriber_is_not_called_and_the_server_is_held_back() -> None:
    """After `resume_reading()` everything arrives."""
    sent = 0

    async def serve(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(256):
            await peer.send(chunk(b"x" * 65536))
            sent += 65536
        await peer.send(b"0\r\n\r\n")
        await peer.closed()

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        feed = response.extensions["body_feed"]
        size, calls, ended = 0, 0, asyncio.Event()

        def on_data(data: bytes) -> None:
            nonlocal size, calls
            size += len(data)
            calls += 1
            feed.pause_reading()
            feed.pause_reading()

        feed.subscribe(on_data, lambda _: ended.set())
        await until(lambda: calls > 0)
        first, before = calls, -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.05)
        assert calls == first
        assert sent < 16 << 20
        while not ended.is_set():
            feed.resume_reading()
            feed.resume_reading()
            await asyncio.sleep(0)
        assert size == 16 << 20


async def test_connection_of_a_paused_subscriber_is_used_again() -> None:
    """A connection that returns to the pool reads, or it would not notice that the server closes it."""
    go = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        await go.wait()
        await peer.send(chunk(b"hello") + b"0\r\n\r\n")
        await peer.closed()

    async with serving(serve) as server, connect() as (client, transport):
        async with client.stream("GET", server.url) as response:
            feed = response.extensions["body_feed"]
            feed.subscribe(lambda _: feed.pause_reading(), lambda _: None)
            go.set()
            await until(lambda: transport.idle_connections == 1)
        for peer in server.peers:
            peer.writer.close()
        await until(lambda: transport.open_connections == 0)


async def test_subscriber_may_close_from_its_callback() -> None:
    """It is not called again, and the server sees the connection close."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + chunk(b"a"))
        await asyncio.sleep(0.01)
        await peer.send(chunk(b"b") + b"z")
        await peer.closed()
        closed.set()

    async with (
        serving(serve) as server,
        connect() as (client, _),
        client.stream("GET", server.url) as response,
    ):
        pieces: list[bytes] = []
        ends: list[httpx.TransportError | None] = []

        def on_data(data: bytes) -> None:
            pieces.append(data)
            if b"b" in data:
                coroutine = response.extensions["body_feed"].aclose()
                try:  # it does not wait for anything
                    coroutine.send(None)
                except StopIteration:
                    return
                raise AssertionError

        response.extensions["body_feed"].subscribe(on_data, ends.append)
        await closed.wait()
        assert b"".join(pieces) == b"ab"
        assert ends == []


async def test_drained_body_that_ends_in_time_keeps_the_connection() -> None:
    """The end of the framing may come a moment after the last event."""
    go = asyncio.Event()

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(CHUNKED + chunk(b"data: [DONE]\n\n"))
            await go.wait()
            await peer.send(chunk(b"\n") + b"0\r\n\r\n")

    async with serving(serve) as server, connect() as (client, transport):
        for _ in range(2):
            go.clear()
            async with client.stream("GET", server.url) as response:
                subscriber = Push(response).subscribe()
                await until(partial(len, subscriber.pieces))
                subscriber.feed.drain(5.0)
            assert transport.open_connections == 1
            go.set()
            await until(lambda: transport.idle_connections == 1)
            assert subscriber.ends == []
            assert subscriber.body == b"data: [DONE]\n\n"
        assert server.connections == 1


async def test_drained_body_that_does_not_end_closes_the_connection() -> None:
    """Neither after the time nor after the bytes that were allowed."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + chunk(b"data: [DONE]\n\n"))
        await peer.closed()
        closed.set()

    async with serving(serve) as server, connect() as (client, _):
        async with client.stream("GET", server.url) as response:
            response.extensions["body_feed"].drain(0.02)
        await closed.wait()


async def test_drained_body_that_is_large_closes_the_connection() -> None:
    """An upstream that goes on generating is stopped."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        try:
            await peer.request()
            await peer.send(CHUNKED)
            while True:
                await peer.send(chunk(b"x" * 4096))
        finally:
            closed.set()

    async with serving(serve) as server, connect() as (client, _):
        async with client.stream("GET", server.url) as response:
            response.extensions["body_feed"].drain(60.0)
        await closed.wait()


async def test_drained_body_that_is_complete_needs_nothing() -> None:
    """The connection is in the pool already."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        async with client.stream("GET", server.url) as response:
            subscriber = Push(response).subscribe()
            await subscriber.ended.wait()
            subscriber.feed.drain(0.0)
        assert transport.idle_connections == 1


async def test_pull_and_push_meet_the_same_end_when_the_transport_closes() -> None:
    """Both get ReadError; nothing waits for ever."""
    async with serving(CHUNKED + chunk(b"hello")) as server, connect() as (client, transport):
        pulled = await client.send(client.build_request("GET", server.url), stream=True)
        pushed = await client.send(client.build_request("GET", server.url), stream=True)
        subscriber = Push(pushed).subscribe()

        async def read() -> httpx.TransportError | None:
            try:
                async for _ in pulled.aiter_raw():
                    pass
            except httpx.TransportError as error:
                return error
            return None

        reader = asyncio.create_task(read())
        await until(lambda: subscriber.body == b"hello")
        await transport.aclose()
        assert isinstance(await reader, httpx.ReadError)
        assert [type(end) for end in subscriber.ends] == [httpx.ReadError]
