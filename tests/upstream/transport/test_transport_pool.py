"""Connections that are used again, or must not be: age, health, and upstreams that close without a word."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from streamworker.upstream.transport import HttpTransport
from tests.http1 import CHUNKED, chunk, chunked, head
from tests.upstream.transport.server import Peer, connect, serving, until


async def test_connection_is_used_again() -> None:
    """One after another needs one; two at once need two, and the more recent one is taken first."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        for _ in range(3):
            assert (await client.post(server.url, content=b"x")).content == b"hello"
        assert server.connections == 1
        await asyncio.gather(client.get(server.url), client.get(server.url))
        assert server.connections == 2
        assert transport.idle_connections == transport.open_connections == 2


async def test_most_recent_connection_is_taken_first() -> None:
    """Those that are not needed any more grow old, and are closed."""
    requests: list[Peer] = []

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            requests.append(peer)
            await peer.send(chunked())

    async with serving(serve) as server, connect() as (client, _):
        await asyncio.gather(*(client.get(server.url) for _ in range(3)))
        requests.clear()
        for _ in range(5):
            await client.get(server.url)
        assert len(set(requests)) == 1


async def test_connections_of_other_origins_are_not_used() -> None:
    """Neither another port's nor another TLS name's."""
    async with serving(chunked()) as one, serving(chunked()) as two, connect() as (client, _):
        await client.get(one.url)
        await client.get(two.url)
        await client.get(one.url, extensions={"sni_hostname": "other"})
        assert (one.connections, two.connections) == (2, 1)


async def test_idle_connection_is_closed_after_its_time() -> None:
    """Before the upstream does it; the timer goes on for those that came later."""
    async with serving(chunked()) as server, connect(HttpTransport(keepalive_s=0.4)) as (client, transport):
        await asyncio.gather(client.get(server.url), client.get(server.url))
        await asyncio.sleep(0.15)
        await client.get(server.url)
        await until(lambda: transport.idle_connections == 1)
        await until(lambda: transport.open_connections == 0)
        await client.get(server.url)
        assert server.connections == 3


@pytest.mark.parametrize("reset", [False, True])
async def test_idle_connection_that_the_upstream_closed_is_replaced(*, reset: bool) -> None:
    """The event loop has not seen it: the socket is asked."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        await asyncio.gather(*(client.get(server.url) for _ in range(3)))
        for peer in list(server.peers):
            peer.reset() if reset else peer.writer.transport.abort()
        time.sleep(0.01)  # noqa: ASYNC251 - the loop must not run
        await asyncio.sleep(0)
        assert (await client.get(server.url)).content == b"hello"
        await until(lambda: transport.open_connections == 1)


async def test_idle_connection_that_is_found_dead_takes_the_others_with_it() -> None:
    """The socket is asked, because the loop may not have seen it. Its siblings have the same server and age."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        await asyncio.gather(*(client.get(server.url) for _ in range(3)))
        (idle,) = transport._pool._idle.values()
        connection = next(reversed(idle))
        address = connection._transport.get_extra_info("sockname")  # type: ignore[union-attr]
        (peer,) = (peer for peer in server.peers if peer.writer.get_extra_info("peername") == address)
        assert connection.is_usable
        peer.writer.transport.abort()
        await asyncio.sleep(0)
        assert not connection.is_usable
        assert (await client.get(server.url)).content == b"hello"
        assert transport.open_connections == 1


async def test_idle_connection_that_has_received_bytes_is_not_used() -> None:
    """An unrequested "408" is not the answer to the next request."""

    async def serve(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(chunked(b"hello"))
            await asyncio.sleep(0)
            await peer.send(head(b"Content-Length: 0", status=b"HTTP/1.1 408 Request Timeout"))

    async with serving(serve) as server, connect() as (client, transport):
        await client.get(server.url)
        await until(lambda: transport.open_connections == 0)
        assert (await client.get(server.url)).status_code == 200
        assert server.connections == 2


@pytest.mark.parametrize("reset", [False, True])
async def test_used_connection_that_ends_before_a_byte_is_replaced_by_a_new_one(*, reset: bool) -> None:
    """At once, once, and with the whole request. All idle connections of the origin are closed."""
    requests: list[bytes] = []

    async def serve(peer: Peer) -> None:
        while True:
            _, _, body = await peer.request()
            requests.append(body)
            if len(requests) == 4 and reset:
                peer.reset()
            if len(requests) == 4:
                return
            await peer.send(chunked(b"hello"))

    async with serving(serve) as server, connect() as (client, transport):
        await asyncio.gather(*(client.post(server.url, content=b"warm") for _ in range(3)))
        assert (await client.post(server.url, content=b"again")).content == b"hello"
        assert requests[3:] == [b"again", b"again"]
        assert server.connections == 4
        assert transport.open_connections == 1


async def test_new_connection_that_ends_before_a_byte_is_an_error() -> None:
    """A request is not repeated for ever: one idle connection, one new one."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        if server.connections == 1:
            await peer.send(chunked(b"hello"))
            await peer.request()

    async with serving(serve) as server, connect() as (client, _):
        await client.get(server.url)
        with pytest.raises(httpx.RemoteProtocolError, match="Server disconnected"):
            await client.get(server.url)
        assert server.connections == 2


async def test_used_connection_that_ends_after_a_byte_is_an_error() -> None:
    """The upstream has begun to answer: the request may not be sent again."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(chunked(b"hello"))
        await peer.request()
        await peer.send(b"H")

    async with serving(serve) as server, connect() as (client, _):
        await client.get(server.url)
        with pytest.raises(httpx.RemoteProtocolError, match="inside the response's head"):
            await client.get(server.url)
        assert server.connections == 1


async def test_generated_body_gets_a_new_connection() -> None:
    """It could not be sent again."""

    async def body() -> object:
        yield b""

    async with serving(chunked()) as server, connect() as (client, _):
        await client.get(server.url)
        await client.post(server.url, content=body(), headers={"content-length": "0"})  # type: ignore[arg-type]
        assert server.connections == 2


async def test_thousand_idle_connections_that_all_die_fail_no_request() -> None:
    """Half are closed and half reset, at the moment when a thousand requests are sent."""
    number = 1000
    waiting = 0
    full = asyncio.Event()

    async def serve(peer: Peer) -> None:
        nonlocal waiting
        while True:
            await peer.request()
            waiting += 1
            if waiting == number:
                full.set()
            await full.wait()
            await peer.send(chunked(b"hello"))

    async with serving(serve) as server, connect() as (client, transport):
        await asyncio.gather(*(client.get(server.url) for _ in range(number)))
        assert transport.idle_connections == number
        for count, peer in enumerate(list(server.peers)):
            peer.reset() if count % 2 else peer.writer.transport.abort()
        responses = await asyncio.gather(*(client.get(server.url) for _ in range(number)))
        assert {response.content for response in responses} == {b"hello"}
        assert server.connections <= 2 * number


async def test_thousand_used_connections_that_die_on_the_next_request_fail_no_request() -> None:
    """They look alive when they are taken: each is replaced without the caller noticing."""
    number = 1000
    waiting = 0
    full = asyncio.Event()

    async def serve(peer: Peer) -> None:
        nonlocal waiting
        await peer.request()
        waiting += 1
        if waiting == number:
            full.set()
        await full.wait()
        await peer.send(chunked(b"hello"))
        await peer.request()

    async with serving(serve) as server, connect() as (client, transport):
        await asyncio.gather(*(client.get(server.url) for _ in range(number)))
        assert transport.idle_connections == number
        responses = await asyncio.gather(*(client.get(server.url) for _ in range(number)))
        assert {response.content for response in responses} == {b"hello"}
        assert server.connections == 2 * number


async def test_response_that_is_closed_early_closes_the_socket() -> None:
    """At once, so that the upstream stops generating."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + chunk(b"hello"))
        await peer.closed()
        closed.set()

    async with serving(serve) as server, connect() as (client, transport):
        async with client.stream("GET", server.url):
            pass
        assert transport.open_connections == 0
        async with asyncio.timeout(1):
            await closed.wait()


async def test_response_that_is_complete_frees_the_connection_before_it_is_read() -> None:
    """The pool does not wait for a slow reader."""
    async with serving(chunked(b"hello")) as server, connect() as (client, transport):
        async with client.stream("GET", server.url) as response:
            await until(lambda: transport.idle_connections == 1)
            assert (await client.get(server.url)).content == b"hello"
            assert await response.aread() == b"hello"
        assert server.connections == 1


async def test_transport_that_is_closed_leaves_nothing_open() -> None:
    """Idle connections, open bodies and requests without an answer."""

    async def serve(peer: Peer) -> None:
        first, _, _ = await peer.request()
        if b"/open" in first:
            await peer.send(CHUNKED)
        elif b"/idle" in first:
            await peer.send(chunked())
        await peer.closed()

    async with serving(serve) as server, connect() as (client, transport):
        await client.get(server.url + "idle", extensions={"sni_hostname": "other"})
        body = await client.send(client.build_request("GET", server.url + "open"), stream=True)
        asked = asyncio.create_task(client.get(server.url + "wait"))
        await until(lambda: transport.open_connections == 3)
        await asyncio.sleep(0.01)
        await transport.aclose()
        with pytest.raises(httpx.ReadError):
            await asked
        with pytest.raises(httpx.ReadError):
            await body.aread()
        assert transport.open_connections == 0
