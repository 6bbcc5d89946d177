"""Names and addresses: several of them, dead ones, and lookups that are shared."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from streamworker.upstream import dial
from tests.http1 import chunked
from tests.upstream.transport.server import connect, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator

Address = tuple[int, int, int, str, Any]


class Names:
    """A resolver with fixed answers, which counts its calls."""

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.lookups = 0
        self.error: Exception | None = None

    def getaddrinfo(self, host: str, port: int, *_: object, flags: int = 0, **__: object) -> list[Address]:
        """Take the place of socket.getaddrinfo."""
        if flags & socket.AI_NUMERICHOST:
            return list(_getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags))
        self.lookups += 1
        time.sleep(0.01)
        if self.error is not None:
            raise self.error
        return self.addresses


_getaddrinfo = socket.getaddrinfo


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Names as the test says."""
    resolver = Names()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    return resolver


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose queue of connections is full: SYN packets are not answered."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        yield listener.getsockname()[1]
        for filler in fillers:
            filler.close()


def ipv4(port: int, host: str = "127.0.0.1") -> Address:
    return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))


def ipv6(port: int) -> Address:
    return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", port, 0, 0))


def attempts() -> list[str]:
    """Return the attempts that are under way."""
    texts = map(repr, asyncio.all_tasks())
    return [text for text in texts if "_connect_socket" in text]


async def test_address_that_refuses_is_skipped(names: Names) -> None:
    """IPv6 first, which nothing listens on: the next one is tried at once."""
    async with serving(chunked(b"hello")) as server, connect() as (client, _):
        names.addresses = [ipv6(1), ipv4(server.port), ipv4(1)]
        started = time.perf_counter()
        responses = await asyncio.gather(*(client.get("http://upstream.test/") for _ in range(4)))
        assert {response.content for response in responses} == {b"hello"}
        assert server.connections == 4
        assert time.perf_counter() - started < 1.0


async def test_address_that_is_silent_is_overtaken(names: Names, silent_port: int) -> None:
    """After a quarter of a second the next one is tried beside it; the first one's socket is closed."""
    async with serving(chunked(b"hello")) as server, connect() as (client, _):
        names.addresses = [ipv6(1), ipv4(silent_port), ipv4(silent_port), ipv4(server.port)]
        started = time.perf_counter()
        assert (await client.get("http://upstream.test/")).content == b"hello"
        assert 0.1 < time.perf_counter() - started < 2.0
        await until(lambda: not attempts(), within_s=0.2)


async def test_address_that_answers_second_is_closed(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both answer in the same turn of the loop."""
    both = asyncio.Event()
    connect_socket = dial._connect_socket
    sockets: list[socket.socket] = []

    async def wait_for_both(address: Address) -> socket.socket:
        sock = await connect_socket(address)
        sockets.append(sock)
        if len(sockets) == 2:
            both.set()
        await both.wait()
        return sock

    monkeypatch.setattr(dial, "_connect_socket", wait_for_both)
    monkeypatch.setattr(dial, "NEXT_ADDRESS_S", 0.01)
    async with serving(chunked(b"hello")) as server, connect() as (client, _):
        names.addresses = [ipv4(server.port), ipv4(server.port)]
        assert (await client.get("http://upstream.test/")).content == b"hello"
        await until(lambda: len(server.peers) == 1)


async def test_addresses_that_are_all_dead_are_a_connect_error(names: Names) -> None:
    """It has the reason of each."""
    names.addresses = [ipv6(1), ipv4(1)]
    async with connect() as (client, _):
        with pytest.raises(httpx.ConnectError, match=r"upstream\.test:80") as caught:
            await client.get("http://upstream.test/")
        assert "::1" in str(caught.value)
        assert "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize("several", [False, True])
async def test_addresses_that_are_all_silent_are_a_connect_timeout(
    names: Names, silent_port: int, *, several: bool
) -> None:
    """No attempt is left."""
    names.addresses = [ipv4(silent_port)] * (2 if several else 1)
    async with connect(limits=httpx.Timeout(5.0, connect=0.4)) as (client, _):
        with pytest.raises(httpx.ConnectTimeout, match=r"within 0\.4 s"):
            await client.get("http://upstream.test/")


async def test_cancellation_between_addresses_leaks_nothing(names: Names, silent_port: int) -> None:
    """Several attempts are under way; twice is not worse than once."""
    names.addresses = [ipv4(silent_port), ipv6(1), ipv4(silent_port)]
    async with connect() as (client, _):
        for delay in (0.0, 0.02, 0.3):
            task = asyncio.create_task(client.get("http://upstream.test/"))
            await asyncio.sleep(delay)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            await until(lambda: not attempts(), within_s=0.2)


async def test_name_is_looked_up_once_for_many(names: Names) -> None:
    """A burst of connections does not fill the thread pool; a cancelled one does not disturb the others."""
    async with serving(chunked(b"hello")) as server, connect() as (client, _):
        names.addresses = [ipv4(server.port)]
        tasks = [asyncio.create_task(client.get("http://upstream.test/")) for _ in range(50)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        assert tasks[0].cancelled()
        assert {task.result().content for task in tasks[1:]} == {b"hello"}
        assert names.lookups == 1


async def test_addresses_of_a_name_take_turns(names: Names) -> None:
    """New connections are spread over the replicas behind a name."""
    async with serving(chunked()) as one, serving(chunked()) as two, connect() as (client, _):
        names.addresses = [ipv4(one.port), ipv4(two.port)]
        await asyncio.gather(*(client.get("http://upstream.test/") for _ in range(10)))
        assert (one.connections, two.connections) == (5, 5)


async def test_name_that_fails_is_looked_up_again(names: Names) -> None:
    """Neither a failed lookup nor addresses that do not answer are kept."""
    async with serving(chunked(b"hello")) as server, connect() as (client, _):
        names.error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        with pytest.raises(httpx.ConnectError, match="Temporary failure"):
            await client.get("http://upstream.test/")
        names.error = None
        names.addresses = [ipv4(1)]
        with pytest.raises(httpx.ConnectError, match=r"127\.0\.0\.1"):
            await client.get("http://upstream.test/")
        names.addresses = [ipv4(server.port)]
        assert (await client.get("http://upstream.test/")).content == b"hello"
        assert names.lookups == 3


async def test_name_that_cannot_be_encoded_is_a_connect_error(names: Names) -> None:
    """A label of more than 63 characters is UnicodeError to getaddrinfo."""
    names.error = UnicodeError("label too long")
    async with connect() as (client, _):
        with pytest.raises(httpx.ConnectError, match="label too long"):
            await client.get("http://upstream.test/")


async def test_cancelled_lookup_that_fails_later_is_silent(names: Names) -> None:
    """The event loop reports no exception that was never retrieved."""
    names.error = socket.gaierror(socket.EAI_AGAIN, "later")
    async with connect() as (client, _):
        task = asyncio.create_task(client.get("http://upstream.test/"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: names.lookups == 1)
        await asyncio.sleep(0.05)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
async def test_ipv6_address_in_a_url_is_connected_to() -> None:
    """The brackets are the URL's."""
    hosts: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hosts.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(chunked(b"hello"))
        await reader.read()
        writer.close()

    try:
        server = await asyncio.start_server(connected, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 on this host")
    port = server.sockets[0].getsockname()[1]
    async with connect() as (client, _):
        assert (await client.get(f"http://[::1]:{port}/")).content == b"hello"
    assert b"Host: [::1]:%d\r\n" % port in hosts[0]
    server.close()
    await server.wait_closed()
