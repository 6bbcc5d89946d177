"""HTTP proxies: tunnels, plain HTTP, credentials, refusals."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import pytest
import trustme

from streamworker.upstream.dial import tls_context
from streamworker.upstream.transport import HttpTransport
from tests.http1 import CHUNKED, chunk, chunked, head
from tests.upstream.transport.server import Peer, Server, connect, serving, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """An authority that no system knows."""
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    """The context of a server at 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def trust(authority: trustme.CA, tmp_path: Path) -> ssl.SSLContext:
    """The client's context."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tls_context(str(tmp_path / "ca.pem"))


class Tunnels:
    """A proxy, and what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, dict[str, str]]] = []
        self.server = Server("http")

    async def serve(self, peer: Peer) -> None:
        """Connect the client to what it asks for."""
        first, headers, _ = await peer.request()
        self.requests.append((first, headers))
        host, _, port = first.split()[1].decode().rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            await peer.send(head(status=b"HTTP/1.1 200 Connection established"))
            await asyncio.gather(_copy(peer.reader, writer), _copy(reader, peer.writer))
        finally:
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def tunnels(tls: ssl.SSLContext | None = None) -> AsyncIterator[Tunnels]:
    """Run a proxy."""
    proxy = Tunnels()
    async with serving(proxy.serve, tls=tls) as proxy.server:
        yield proxy


async def test_tunnel_carries_tls_to_the_origin(tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    """One CONNECT for several requests; the proxy is given the credentials, the origin is not."""
    headers: list[dict[str, str]] = []

    async def serve(peer: Peer) -> None:
        while True:
            headers.append((await peer.request())[1])
            await peer.send(chunked(b"x" * 100_000))

    async with serving(serve, tls=tls) as origin, tunnels() as proxy:
        transport = HttpTransport(
            ssl_context=trust, proxy=f"http://user:pa%20ss@127.0.0.1:{proxy.server.port}"
        )
        async with connect(transport) as (client, _):
            for _ in range(3):
                assert (await client.get(origin.url)).content == b"x" * 100_000
    assert [first for first, _ in proxy.requests] == [b"CONNECT 127.0.0.1:%d HTTP/1.1" % origin.port]
    assert proxy.requests[0][1]["proxy-authorization"] == "Basic dXNlcjpwYSBzcw=="
    assert all("proxy-authorization" not in sent for sent in headers)


async def test_tunnel_through_a_tls_proxy(tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    """TLS in TLS."""
    async with serving(chunked(b"hello"), tls=tls) as origin, tunnels(tls) as proxy:
        transport = HttpTransport(ssl_context=trust, proxy=f"https://127.0.0.1:{proxy.server.port}")
        async with connect(transport) as (client, _):
            assert (await client.get(origin.url)).content == b"hello"


async def test_tunnel_is_closed_with_the_response(tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    """The origin stops generating also behind a proxy."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + chunk(b"hello"))
        await peer.closed()
        closed.set()

    async with serving(serve, tls=tls) as origin, tunnels() as proxy:
        transport = HttpTransport(ssl_context=trust, proxy=f"http://127.0.0.1:{proxy.server.port}")
        async with connect(transport) as (client, _), client.stream("GET", origin.url):
            pass
        await closed.wait()


async def test_plain_http_goes_to_the_proxy_in_absolute_form() -> None:
    """RFC 9112, 3.2.2; the Host header stays the origin's."""
    requests: list[tuple[bytes, dict[str, str]]] = []

    async def serve(peer: Peer) -> None:
        while True:
            first, headers, _ = await peer.request()
            requests.append((first, headers))
            await peer.send(chunked(b"hello"))

    async with serving(serve) as proxy:
        transport = HttpTransport(proxy=f"http://user@127.0.0.1:{proxy.port}")
        async with connect(transport) as (client, _):
            await client.get("http://upstream.test/v1/x?y")
            await client.get("http://upstream.test:8000/")
            await client.get("http://[::1]:8000/")
    assert [first for first, _ in requests] == [
        b"GET http://upstream.test/v1/x?y HTTP/1.1",
        b"GET http://upstream.test:8000/ HTTP/1.1",
        b"GET http://[::1]:8000/ HTTP/1.1",
    ]
    assert [headers["host"] for _, headers in requests] == [
        "upstream.test",
        "upstream.test:8000",
        "[::1]:8000",
    ]
    assert {headers["proxy-authorization"] for _, headers in requests} == {"Basic dXNlcjo="}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            head(b"Content-Length: 3", status=b"HTTP/1.1 407 Proxy Authentication Required") + b"no!",
            "refused the tunnel: 407 Proxy Auth",
        ),
        (head(status=b"HTTP/1.1 502 Bad Gateway"), "refused the tunnel: 502 Bad Gateway"),
        (b"SSH-2.0-x\r\n", "does not begin with HTTP/"),
        (b"", "Server disconnected"),
        (b"HTTP/1.1 2", "inside the response's head"),
    ],
)
async def test_proxy_that_opens_no_tunnel_is_a_proxy_error(answer: bytes, words: str) -> None:
    """The error has the proxy's words, and no credentials."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer)

    async with serving(serve) as proxy:
        transport = HttpTransport(proxy=f"http://user:secret@127.0.0.1:{proxy.port}")
        async with connect(transport) as (client, _):
            with pytest.raises(httpx.ProxyError, match=words) as caught:
                await client.get("https://upstream.test/")
            assert "secret" not in str(caught.value)
            assert "c2VjcmV0" not in repr(caught.value)


async def test_proxy_that_cannot_be_reached_is_a_connect_error() -> None:
    """The error names the proxy, without credentials."""
    transport = HttpTransport(proxy="http://user:secret@127.0.0.1:1")
    async with connect(transport) as (client, _):
        for url in ("https://upstream.test/", "http://upstream.test/"):
            with pytest.raises(httpx.ConnectError, match=r"the proxy 127\.0\.0\.1:1") as caught:
                await client.get(url)
            assert "secret" not in str(caught.value)


async def test_proxy_that_does_not_answer_is_a_connect_timeout() -> None:
    """The connect timeout covers the tunnel."""

    async def serve(peer: Peer) -> None:
        await peer.closed()

    async with serving(serve) as proxy:
        transport = HttpTransport(proxy=f"http://127.0.0.1:{proxy.port}")
        async with connect(transport, limits=httpx.Timeout(5.0, connect=0.05)) as (client, _):
            with pytest.raises(httpx.ConnectTimeout):
                await client.get("https://upstream.test/")
            await until(lambda: not proxy.peers)


async def test_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "env" reads the variables when the transport is made; NO_PROXY makes exceptions."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    async with serving(chunked(b"proxied")) as proxy, serving(chunked(b"direct")) as origin:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        async with connect(HttpTransport(proxy="env")) as (client, _):
            assert (await client.get(origin.url)).content == b"proxied"
        async with connect(HttpTransport()) as (client, _):
            assert (await client.get(origin.url)).content == b"direct"
        monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
        async with connect(HttpTransport(proxy="env")) as (client, _):
            assert (await client.get(origin.url)).content == b"direct"


async def test_tunnel_cancelled_at_every_step_leaks_nothing(
    tls: ssl.SSLContext, trust: ssl.SSLContext
) -> None:
    """Neither the proxy's connection nor one in the middle of the handshake behind it."""
    async with serving(chunked(b"hello"), tls=tls) as origin, tunnels() as proxy:
        transport = HttpTransport(ssl_context=trust, proxy=f"http://127.0.0.1:{proxy.server.port}")
        async with connect(transport) as (client, _):
            was_done, turns = False, 0
            while not was_done:
                turns += 1
                task = asyncio.create_task(client.get(origin.url))
                for _ in range(turns):
                    await asyncio.sleep(0)
                was_done = task.done()
                task.cancel()
                await asyncio.wait([task])
            assert turns > 5
            assert transport.open_connections == transport.idle_connections
        await until(lambda: not proxy.server.peers)


async def test_transport_with_an_invalid_proxy_is_refused_without_the_proxy() -> None:
    """When it is made, so that a configuration can be checked."""
    with pytest.raises(ValueError, match="proxy") as caught:
        HttpTransport(proxy="socks5://user:secret@127.0.0.1:1")
    assert "secret" not in str(caught.value)
