"""Open connections: names, addresses (RFC 8305), sockets, proxies and TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import defaultdict
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import httpx

from streamworker.upstream.connection import Connection, Origin, Owner, Route
from streamworker.upstream.http1_request import request_head
from streamworker.upstream.http1_response import ResponseParser

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.upstream.proxy import Proxy

__all__ = ["Dialer", "TlsFiles", "tls_context"]

NEXT_ADDRESS_S = 0.25
"""How long an address may take before the next one is tried beside it (RFC 8305, Connection Attempt Delay)."""

LOOKUP_S = 10.0
"""How long the addresses of a name are used again. It only has to serve a burst of new connections."""

MAX_LOOKUPS = 256

KEEPALIVE_OPTIONS = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))
"""A model may think for minutes: probes keep NAT entries alive, and find a host that is gone after 90 s."""

_P = TypeVar("_P", bound=asyncio.Protocol)

Address = tuple[int, int, int, str, Any]
"""Family, type, protocol, canonical name and socket address, as of getaddrinfo."""


@cache
def tls_context(ca_file: str = "", cert_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """Return a client context with the system's authorities, those in `ca_file`, and a client certificate.

    It takes 20 ms to make, and is shared. Raises OSError, or ssl.SSLError, where a file cannot be read.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file:
        context.load_verify_locations(cafile=ca_file)
    if cert_file:
        context.load_cert_chain(cert_file, key_file or None)
    return context


class TlsFiles:
    """Makes the TLS context of certificate files that may be replaced while the program runs.

    Called for each new connection. Where a file has changed and cannot be read, the context that was made before goes on
    to be used: the files may be in the middle of their replacement. Raises OSError, or ssl.SSLError, at the first call.
    """

    def __init__(self, ca_file: str = "", cert_file: str = "", key_file: str = "") -> None:
        self._files = (ca_file, cert_file, key_file)
        self._context: ssl.SSLContext | None = None
        self._seen: list[tuple[int, int]] = []

    def __call__(self) -> ssl.SSLContext:
        """Return the context of the files as they are now."""
        try:
            stats = [Path(file).stat() for file in self._files if file]
            seen = [(stat.st_mtime_ns, stat.st_ino) for stat in stats]
            if self._context is None or seen != self._seen:
                self._context, self._seen = tls_context.__wrapped__(*self._files), seen
        except OSError:
            if self._context is None:
                raise
        return self._context


class Dialer:
    """Open connections to origins, directly or through a proxy."""

    def __init__(
        self,
        find_proxy: Callable[[str, str, int], Proxy | None],
        make_context: Callable[[], ssl.SSLContext] = tls_context,
    ) -> None:
        self._find_proxy = find_proxy
        self._make_context = make_context
        self._resolver = _Resolver()

    async def connect(self, origin: Origin, owner: Owner, timeout_s: float | None) -> Connection:
        """Open a connection within `timeout_s` for everything: lookup, TCP, proxy and TLS.

        Raises httpx.ConnectTimeout, httpx.ConnectError, or httpx.ProxyError where a proxy refuses the tunnel.
        """
        proxy = self._find_proxy(origin.scheme, origin.host, origin.port)
        peer = f"{origin.host}:{origin.port}" if proxy is None else f"the proxy {proxy.host}:{proxy.port}"
        try:
            async with asyncio.timeout(timeout_s):
                return await self._connect(origin, owner, proxy)
        except TimeoutError as error:
            if error.errno is None:
                raise httpx.ConnectTimeout(f"no connection to {peer} within {timeout_s:g} s") from error
            raise httpx.ConnectTimeout(
                f"no connection to {peer}: {error}"
            ) from error  # the kernel's own limit
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"no connection to {peer}: {_text(error)}") from error

    async def _connect(self, origin: Origin, owner: Owner, proxy: Proxy | None) -> Connection:
        is_tls = origin.scheme == "https"
        if proxy is None:
            make = partial(Connection, origin, owner)
            context = self._make_context() if is_tls else None
            return await self._open(make, origin.host, origin.port, context, origin.server_name)
        context = self._make_context() if proxy.is_tls else None
        if is_tls:
            tunnel = await self._open(_Tunnel, proxy.host, proxy.port, context, proxy.host)
            return await self._through(tunnel, origin, owner, proxy)
        authority = _authority(origin, default_port=80)
        route = Route(b"http://" + authority, proxy.headers)
        make = partial(Connection, origin, owner, route)
        return await self._open(make, proxy.host, proxy.port, context, proxy.host)

    async def _open(
        self,
        make: Callable[[], _P],
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        server_name: str,
    ) -> _P:
        """Open a connection with or without TLS, and give it the protocol that `make` returns."""
        try:
            sock = await _connect_first(await self._resolver.addresses(host, port))
        except OSError:
            self._resolver.forget(host, port)
            raise
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(
            make, sock=sock, ssl=context, server_hostname=server_name if context is not None else None
        )
        return protocol

    async def _through(self, tunnel: _Tunnel, origin: Origin, owner: Owner, proxy: Proxy) -> Connection:
        """Turn a connection to a proxy into a TLS connection to the origin."""
        try:
            await tunnel.establish(_authority(origin), proxy)
            connection = Connection(origin, owner)
            transport = await asyncio.get_running_loop().start_tls(
                tunnel.transport, connection, self._make_context(), server_hostname=origin.server_name
            )
        except BaseException:
            tunnel.transport.abort()
            raise
        if transport is None:  # the connection was closed during the handshake
            raise ConnectionResetError("the connection was lost during the TLS handshake")
        connection.connection_made(transport)
        return connection


class _Tunnel(asyncio.Protocol):
    """A connection to a proxy, until the proxy has connected it to the origin (RFC 9110, CONNECT)."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._parser = ResponseParser("CONNECT")
        self._changed = asyncio.get_running_loop().create_future()

    async def establish(self, authority: bytes, proxy: Proxy) -> None:
        """Ask for the tunnel. Raises httpx.ProxyError where the proxy does not open it."""
        head = request_head("CONNECT", authority, [(b"Host", authority), *proxy.headers])
        self.transport.write(head)
        await self._changed
        answer = self._parser.head
        if answer is None:
            raise httpx.ProxyError(f"the proxy {proxy.host}:{proxy.port}: {self._parser.error}")
        if not 200 <= answer.status < 300:
            reason = answer.reason[:100].decode("latin-1")
            raise httpx.ProxyError(
                f"the proxy {proxy.host}:{proxy.port} refused the tunnel: {answer.status} {reason}"
            )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Read the proxy's answer."""
        self._parser.feed(data)
        self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        del exc
        self._parser.feed_eof()
        self._check()

    def _check(self) -> None:
        if self._parser.changed and not self._changed.done():
            self._changed.set_result(None)


class _Resolver:
    """Cache the addresses of names for LOOKUP_S, and share lookups that are in progress."""

    def __init__(self) -> None:
        self._lookups: dict[tuple[str, int], tuple[float, asyncio.Future[list[Address]]]] = {}
        self._turn = 0

    async def addresses(self, host: str, port: int) -> list[Address]:
        """Return the addresses of a host in the order in which to try them; each call begins with another one.

        Raises OSError or UnicodeError.
        """
        try:  # an address, which needs no lookup
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        except socket.gaierror:
            pass
        found = await asyncio.shield(self._lookup(host, port))
        self._turn += 1
        return _interleaved(found, self._turn)

    def forget(self, host: str, port: int) -> None:
        """Look a name up anew: its addresses do not answer."""
        self._lookups.pop((host, port), None)

    def _lookup(self, host: str, port: int) -> asyncio.Future[list[Address]]:
        loop = asyncio.get_running_loop()
        known = self._lookups.get((host, port))
        if known is not None:
            expires, future = known
            if not future.done() or expires > loop.time():
                return future
        if len(self._lookups) >= MAX_LOOKUPS:
            self._lookups.clear()
        # An executor's future instead of a task: when all waiters are cancelled, no task is left.
        lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        future = cast("asyncio.Future[list[Address]]", loop.run_in_executor(None, lookup))
        future.add_done_callback(partial(self._forget_failed, host, port))
        self._lookups[host, port] = (loop.time() + LOOKUP_S, future)
        return future

    def _forget_failed(self, host: str, port: int, future: asyncio.Future[list[Address]]) -> None:
        if future.cancelled() or future.exception() is not None:
            self.forget(host, port)


def _interleaved(addresses: list[Address], turn: int) -> list[Address]:
    """Alternate between the families, in the order of the resolver; rotate the addresses of each."""
    families: defaultdict[int, list[Address]] = defaultdict(list)
    for address in addresses:
        families[address[0]].append(address)
    rotated = [family[turn % len(family) :] + family[: turn % len(family)] for family in families.values()]
    return [address for address in chain.from_iterable(zip_longest(*rotated)) if address is not None]


async def _connect_first(addresses: list[Address]) -> socket.socket:
    """Connect to the first address that answers (RFC 8305, "happy eyeballs"). Raises OSError."""
    if len(addresses) == 1:
        return await _connect_socket(addresses[0])
    errors: list[BaseException] = []
    pending: set[asyncio.Task[socket.socket]] = set()
    try:
        for address in addresses:
            pending.add(asyncio.create_task(_connect_socket(address)))
            if (sock := await _race(pending, errors, NEXT_ADDRESS_S)) is not None:
                return sock
        while pending:
            if (sock := await _race(pending, errors, None)) is not None:
                return sock
    finally:
        for task in pending:
            task.cancel()
            task.add_done_callback(_close_socket)
    texts = dict.fromkeys(map(_text, errors))
    raise OSError("; ".join(texts) or "the name has no address")


async def _race(
    pending: set[asyncio.Task[socket.socket]], errors: list[BaseException], timeout_s: float | None
) -> socket.socket | None:
    """Return the socket of the first attempt that succeeds; None after the timeout, or where one has failed."""
    done, _ = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        error = task.exception()
        if error is None:
            pending.discard(task)
            return task.result()
        pending.discard(task)
        errors.append(error)
    return None


async def _connect_socket(address: Address) -> socket.socket:
    family, kind, protocol, _, socket_address = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE_OPTIONS:
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        await asyncio.get_running_loop().sock_connect(sock, socket_address)
    except BaseException:
        sock.close()
        raise
    return sock


def _close_socket(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket of an attempt that came second."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _authority(origin: Origin, *, default_port: int | None = None) -> bytes:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return (host if origin.port == default_port else f"{host}:{origin.port}").encode("ascii")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
