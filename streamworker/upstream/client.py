"""An upstream over HTTP/1.1: httpx as the client, `HttpTransport` as its transport (see docs/adr).

There is one client per upstream and process. It does not limit connections, because the worker limits open
streams.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING

import httpx

from streamworker import __version__
from streamworker.errors import ConfigurationError, UpstreamError
from streamworker.model import ErrorCode, JobError
from streamworker.pump import Pump
from streamworker.redaction import Redactor
from streamworker.stream.provider_errors import http_error
from streamworker.stream.retry import read_advice, with_advice
from streamworker.upstream.dial import TlsFiles, tls_context
from streamworker.upstream.errors import Phase, read_error, translate_errors
from streamworker.upstream.pacer import CallPacer
from streamworker.upstream.transport import HttpTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from streamworker.config import UpstreamSettings
    from streamworker.upstream.body import Body

__all__ = ["HttpUpstream"]

ERROR_BODY_BYTES = 64 << 10
"""Bytes of an error body that are read. A terminal event carries 2 KiB of it."""

UNPACKED_BYTES = 64 << 10
"""Bytes that one step of decompression may produce."""

ERROR_BODY_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 0.1
WRITE_TIMEOUT_S = 30.0
_CODINGS = frozenset({"br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd"})
"""Content codings of the IANA registry. Other names (`identity`, `none`, `utf-8`) do not change the body."""

_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # zlib detects which of the two it is

CALLS_PER_TURN = 8
"""Calls that may begin in one turn of the event loop: a few milliseconds of work."""


class HttpUpstream:
    """One configured upstream. Create it inside the running event loop.

    Any transport of httpx can be used; `HttpTransport`, the default, alone pushes bodies and costs nothing per stream.
    """

    def __init__(
        self, settings: UpstreamSettings, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._settings = settings
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._pacer = CallPacer(CALLS_PER_TURN)
        self._sent = httpx.Request("POST", self._url)
        # No cookies are kept, because calls of different tenants share this client.
        jar = CookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
        self._client = httpx.AsyncClient(
            transport=transport or _new_transport(settings),
            cookies=jar,  # not an httpx.Cookies, which would be copied without the policy
            headers={"user-agent": f"streamworker/{__version__}"},
            timeout=httpx.Timeout(
                connect=settings.connect_timeout_s, read=None, write=WRITE_TIMEOUT_S, pool=None
            ),
            trust_env=False,
            follow_redirects=False,
        )

    @asynccontextmanager
    async def call(self, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[HttpAnswer]:
        """Open a streaming completion; entering waits for the response. Raises UpstreamError."""
        await self._pacer()
        with translate_errors(Phase.CALLING, self._settings.base_url):
            request = self._client.build_request(
                "POST", self._url, content=body, headers=self._headers(headers)
            )
            response = await self._client.send(request, stream=True)
        # Neither the prompt nor more than needed of the response is kept while the answer streams.
        response.request = self._sent
        del request, body
        answer = HttpAnswer(response, self._settings.base_url)
        try:
            if not response.is_success:
                raise await _refusal(response)
            del response
            yield answer
        finally:
            await answer.close()

    async def models(self) -> list[str]:
        """List the models that the upstream offers, for `streamworker check`. Raises UpstreamError."""
        url = self._settings.base_url.rstrip("/") + "/models"
        with translate_errors(Phase.CALLING, self._settings.base_url):
            response = await self._client.get(
                url, headers=self._headers({}), timeout=self._settings.connect_timeout_s
            )
        if response.status_code != 200:
            raise UpstreamError(http_error(response.status_code, response.content[:ERROR_BODY_BYTES]))
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    def scrub(self, text: str) -> str:
        """Remove secrets from a text. They are read again, because they may have been rotated."""
        return Redactor(self._settings.secrets())(text)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        own = {
            "accept": "text/event-stream, application/json",  # some servers refuse the first alone
            "accept-encoding": "identity",  # a compressor would hold deltas back
            "content-type": "application/json",
        }
        try:
            configured = {name.lower(): value for name, value in self._settings.header_values().items()}
            if key := self._settings.api_key():
                own["authorization"] = f"Bearer {key}"
        except ConfigurationError as error:  # the key was readable at the start, so a rotation failed
            raise UpstreamError(JobError(ErrorCode.AUTH, "; ".join(error.faults), retriable=True)) from error
        return {**headers, **configured, **own}


def _new_transport(settings: UpstreamSettings) -> HttpTransport:
    files = (settings.ca_file, settings.cert_file, settings.key_file)
    context = TlsFiles(*(str(file or "") for file in files)) if any(files) else tls_context
    if settings.base_url.startswith("https:"):
        context()  # now: it blocks the loop for 20 ms
    return HttpTransport(ssl_context=context, proxy=settings.proxy)


class HttpAnswer:
    """The body of a response with a success status, in the pieces in which it arrives.

    Where the transport pushes bodies and this one is not compressed, a subscriber is called from the loop's read
    callback; else a task reads the body for it.
    """

    __slots__ = ("_base_url", "_close", "_feed", "_is_raw", "_pieces", "_pump", "content_type", "status")

    def __init__(self, response: httpx.Response, base_url: str) -> None:
        codings = _codings(response)
        self.status = response.status_code
        self.content_type = response.headers.get("content-type", "")
        self._base_url = base_url
        self._feed: Body | None = response.extensions.get("body_feed")
        self._is_raw = not codings
        self._close = response.aclose
        self._pump: Pump | None = None
        # The upstream may compress the body although `identity` was requested.
        if codings:
            self._pieces = _unpacked(response, codings)
        elif self._feed is None:
            self._pieces = response.aiter_raw()
        else:  # the response takes more memory than the whole rest of its stream, and is not needed any more
            self._pieces, self._close = aiter(self._feed), self._feed.aclose

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the body."""
        return self

    async def __anext__(self) -> bytes:
        """Return the next bytes of the socket. Raises UpstreamError if the connection breaks."""
        with translate_errors(Phase.READING, self._base_url, self.status):
            return await anext(self._pieces)

    def subscribe(self, on_data: Callable[[bytes], None], on_end: Callable[[Exception | None], None]) -> None:
        """Push the body to a subscriber."""
        if self._feed is None or not self._is_raw:
            self._pump = Pump(self)
            self._pump.start(on_data, on_end)
            return

        def end(error: httpx.TransportError | None) -> None:
            on_end(None if error is None else UpstreamError(read_error(error, self.status)))

        self._feed.subscribe(on_data, end)

    def pause_reading(self) -> None:
        """Stop reading from the socket."""
        if self._pump is not None:
            self._pump.pause()
        elif self._feed is not None:
            self._feed.pause_reading()

    def resume_reading(self) -> None:
        """Resume reading from the socket."""
        if self._pump is not None:
            self._pump.resume()
        elif self._feed is not None:
            self._feed.resume_reading()

    async def drain(self) -> None:
        """Let the rest of the body arrive for a moment after the stream's end, so that the connection can be reused."""
        if self._pump is not None:
            await self._pump.stop()
        if self._feed is not None:
            self._feed.drain(DRAIN_TIMEOUT_S)
            return
        with suppress(TimeoutError, StopAsyncIteration, UpstreamError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while True:
                    await anext(self)

    async def close(self) -> None:
        """Close the connection, unless the body is complete or drained."""
        if self._pump is not None:
            await self._pump.stop()
        with suppress(httpx.HTTPError, OSError):
            await self._close()


def _codings(response: httpx.Response) -> list[str]:
    names = response.headers.get("content-encoding", "").lower().split(",")
    return [name.strip() for name in names if name.strip() in _CODINGS]


async def _unpacked(response: httpx.Response, codings: list[str]) -> AsyncIterator[bytes]:
    """Decompress in bounded pieces: 64 KiB can decompress to 64 MiB, which httpx would return at once."""
    if len(codings) > 1 or codings[0] not in {"gzip", "x-gzip", "deflate"}:
        raise httpx.DecodingError(f"content-encoding {', '.join(codings)!r} was not asked for")
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    async for data in response.aiter_raw():
        rest = data
        while True:
            try:
                piece = unpacker.decompress(rest, UNPACKED_BYTES)
            except zlib.error as error:
                raise httpx.DecodingError(str(error)) from error
            if piece:
                yield piece
                await asyncio.sleep(0)  # one read may decompress to hours of keep-alives
            rest = unpacker.unconsumed_tail
            if unpacker.eof and unpacker.unused_data:  # gzip may have several members
                rest, unpacker = unpacker.unused_data, zlib.decompressobj(_GZIP_OR_ZLIB)
            elif unpacker.eof or (not rest and len(piece) < UNPACKED_BYTES):
                break


async def _capped_body(response: httpx.Response) -> bytes:
    body = bytearray()
    with suppress(TimeoutError, httpx.HTTPError, OSError):
        async with asyncio.timeout(ERROR_BODY_TIMEOUT_S):
            codings = _codings(response)
            async for data in _unpacked(response, codings) if codings else response.aiter_raw():
                body += data
                if len(body) >= ERROR_BODY_BYTES:
                    break
    return bytes(body[:ERROR_BODY_BYTES])


async def _refusal(response: httpx.Response) -> UpstreamError:
    """Return the error for a response without a success status."""
    status = response.status_code
    body = await _capped_body(response)
    advice = read_advice(response.headers, time.time(), status=status)
    if status >= 400:
        return UpstreamError(with_advice(http_error(status, body), advice), advice)
    message = f"the upstream answered {status} instead of 200; base_url has to be the final one, with /v1"
    return UpstreamError(JobError(ErrorCode.UPSTREAM_PROTOCOL, message, status))
