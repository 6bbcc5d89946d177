"""TLS: trusted authorities, client certificates, and host names."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import httpx
import pytest
import trustme

from streamworker.upstream.dial import tls_context
from streamworker.upstream.transport import HttpTransport
from tests.http1 import CHUNKED, chunk, chunked
from tests.upstream.transport.server import Peer, Push, connect, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """An authority that no system knows."""
    return trustme.CA()


@pytest.fixture
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    """The context of a server at 127.0.0.1, localhost and upstream.test."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost", "upstream.test").configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Iterator[str]:
    """The authority's certificate in a file."""
    with authority.cert_pem.tempfile(dir=str(tmp_path)) as path:
        yield path


async def test_tls_with_the_authority_of_ca_file_is_trusted(server_tls: ssl.SSLContext, ca_file: str) -> None:
    """Bodies arrive, connections are used again, and early ends are seen by the server."""
    closed = asyncio.Event()

    async def serve(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(chunked(b"x" * 100_000))
        await peer.request()
        await peer.send(CHUNKED + chunk(b"hello"))
        await peer.closed()
        closed.set()

    transport = HttpTransport(ssl_context=tls_context(ca_file))
    async with serving(serve, tls=server_tls) as server, connect(transport) as (client, _):
        assert (await client.get(server.url)).content == b"x" * 100_000
        async with client.stream("GET", server.url) as response:
            subscriber = Push(response).subscribe()
            await subscriber.ended.wait()
            assert subscriber.body == b"x" * 100_000
        async with client.stream("GET", server.url) as response:
            subscriber = Push(response).subscribe()
            await until(lambda: subscriber.body == b"hello")
        await closed.wait()
        assert server.connections == 1


async def test_tls_of_an_unknown_authority_is_refused(server_tls: ssl.SSLContext) -> None:
    """The error says why; no connection is left."""
    async with serving(chunked(), tls=server_tls) as server, connect() as (client, _):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            await client.get(server.url)
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


async def test_tls_of_another_name_is_refused(server_tls: ssl.SSLContext, ca_file: str) -> None:
    """The certificate is checked for the host of the URL, or for `sni_hostname`."""
    transport = HttpTransport(ssl_context=tls_context(ca_file))
    async with serving(chunked(), tls=server_tls) as server, connect(transport) as (client, _):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(server.url, extensions={"sni_hostname": "other.test"})


async def test_tls_names_the_host_in_its_handshake(server_tls: ssl.SSLContext, ca_file: str) -> None:
    """SNI chooses the certificate at shared addresses."""
    names: list[str | None] = []

    def note(_: ssl.SSLObject, name: str | None, __: ssl.SSLContext) -> None:
        names.append(name)

    server_tls.sni_callback = note
    transport = HttpTransport(ssl_context=tls_context(ca_file))
    async with serving(chunked(), tls=server_tls) as server, connect(transport) as (client, _):
        await client.get(server.url, extensions={"sni_hostname": "upstream.test"})
        await client.get(f"https://localhost:{server.port}/")
    assert names == ["upstream.test", "localhost"]


async def test_tls_presents_a_client_certificate(
    authority: trustme.CA, server_tls: ssl.SSLContext, ca_file: str, tmp_path: Path
) -> None:
    """Without it the server ends the connection."""
    authority.configure_trust(server_tls)
    server_tls.verify_mode = ssl.CERT_REQUIRED
    certificate = authority.issue_cert("worker@example.com")
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(str(cert_file))
    certificate.private_key_pem.write_to_path(str(key_file))

    async with serving(chunked(b"hello"), tls=server_tls) as server:
        with_it = HttpTransport(ssl_context=tls_context(ca_file, str(cert_file), str(key_file)))
        async with connect(with_it) as (client, _):
            assert (await client.get(server.url)).content == b"hello"
        async with connect(HttpTransport(ssl_context=tls_context(ca_file))) as (client, _):
            with pytest.raises(httpx.TransportError):
                await client.get(server.url)


async def test_tls_to_a_server_without_tls_is_a_connect_error() -> None:
    """The cause is SSLError, by which a caller can ask whether the server speaks plain HTTP."""

    async def serve(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(serve) as server, connect() as (client, _):
        with pytest.raises(httpx.ConnectError) as caught:
            await client.get(f"https://127.0.0.1:{server.port}/")
        assert isinstance(caught.value.__cause__, ssl.SSLError)


async def test_tls_handshake_that_does_not_end_is_a_connect_timeout() -> None:
    """The connect timeout is for everything before the request."""

    async def serve(peer: Peer) -> None:
        await peer.closed()

    limits = httpx.Timeout(5.0, connect=0.05)
    async with serving(serve) as server, connect(limits=limits) as (client, _):
        with pytest.raises(httpx.ConnectTimeout, match=r"within 0\.05 s"):
            await client.get(f"https://127.0.0.1:{server.port}/")
        await until(lambda: not server.peers)


async def test_tls_cancelled_at_every_step_leaks_nothing(server_tls: ssl.SSLContext, ca_file: str) -> None:
    """Also in the middle of a handshake."""
    transport = HttpTransport(ssl_context=tls_context(ca_file))
    async with serving(chunked(b"hello"), tls=server_tls) as server, connect(transport) as (client, _):
        was_done, turns = False, 0
        while not was_done:
            turns += 1
            task = asyncio.create_task(client.get(server.url))
            for _ in range(turns):
                await asyncio.sleep(0)
            was_done = task.done()
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: transport.open_connections == transport.idle_connections)
        assert turns > 3


def test_tls_context_has_the_system_authorities_and_those_of_the_file(ca_file: str) -> None:
    """`ca_file` comes on top."""
    system = ssl.create_default_context().cert_store_stats()["x509_ca"]

    assert tls_context(ca_file).cert_store_stats()["x509_ca"] == system + 1
    assert tls_context(ca_file) is tls_context(ca_file)


@pytest.mark.parametrize("files", [("missing.pem",), ("", "missing.pem")])
def test_tls_context_with_a_file_that_cannot_be_read_is_an_error(files: tuple[str, ...]) -> None:
    """A missing file raises OSError, for the check of the configuration."""
    with pytest.raises(OSError, match="No such file"):
        tls_context(*files)
