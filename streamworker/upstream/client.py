"""An upstream over HTTP/1.1: httpx as the client, aiohttp as its transport (see docs/adr).

There is one client per upstream and process. It does not limit connections, because the worker limits open
streams. It does not use HTTP/2: closing one stream early would not stop the upstream from generating, and one
stall would delay every stream.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import zlib
from contextlib import asynccontextmanager, suppress
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING

import aiohttp
import httpx
from httpx_aiohttp.transport import AiohttpResponseStream, AiohttpTransport, map_aiohttp_exceptions

from streamworker import __version__
from streamworker.errors import ConfigurationError, UpstreamError
from streamworker.model import ErrorCode, JobError
from streamworker.redaction import Redactor
from streamworker.stream.provider_errors import error_of_body, http_error, is_retriable, usage_of_body
from streamworker.stream.retry import read_advice
from streamworker.upstream.errors import Phase, translate_errors
from streamworker.upstream.pacer import CallPacer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from streamworker.config import UpstreamSettings

__all__ = ["HttpUpstream"]

ERROR_BODY_BYTES = 64 << 10
"""Bytes of an error body that are read. A terminal event carries 2 KiB of it."""

UNPACKED_BYTES = 64 << 10
"""Bytes that one step of decompression may produce."""

ERROR_BODY_TIMEOUT_S = 5.0
DRAIN_TIMEOUT_S = 0.1
WRITE_TIMEOUT_S = 30.0
KEEPALIVE_S = 15.0
_RAW = frozenset({"identity", ""})
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # zlib detects which of the two it is

CALLS_PER_TURN = 8
"""Calls that may begin in one turn of the event loop: a few milliseconds of work."""


class HttpUpstream:
    """One configured upstream. Create it inside the running event loop."""

    def __init__(self, settings: UpstreamSettings) -> None:
        self._settings = settings
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        self._redact = Redactor()
        self._pacer = CallPacer(CALLS_PER_TURN)
        # No cookies are kept, because calls of different tenants share this client.
        jar = CookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
        self._client = httpx.AsyncClient(
            # httpx's TLS context is not used: the aiohttp sessions have their own, one per process. This one
            # trusts no authority, which saves the 20 ms of loading the system's.
            transport=_Transport(client=_new_session, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)),
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
        try:
            await self._refuse_unless_event_stream(response)
            yield HttpAnswer(response, self._settings.base_url)
        finally:
            with suppress(httpx.HTTPError, aiohttp.ClientError, OSError):
                await response.aclose()

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
        """Remove secrets from a text. The key is read again, because it may have been rotated."""
        with suppress(UpstreamError):
            text = text.replace(self._key() or "\0", "***")
        return self._redact(text)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        own = {
            "accept": "text/event-stream",
            "accept-encoding": "identity",  # a compressor would hold deltas back
            "content-type": "application/json",
        }
        if key := self._key():
            own["authorization"] = f"Bearer {key}"
        return {**headers, **own}

    def _key(self) -> str | None:
        try:
            return self._settings.api_key()
        except ConfigurationError as error:  # the key was readable at the start, so a rotation failed
            raise UpstreamError(JobError(ErrorCode.AUTH, "; ".join(error.faults), retriable=True)) from error

    async def _refuse_unless_event_stream(self, response: httpx.Response) -> None:
        kind = response.headers.get("content-type", "")
        if response.status_code == 200 and kind.partition(";")[0].strip().lower() == "text/event-stream":
            return
        body = await _capped_body(response)
        error = _refusal(response.status_code, kind, body)
        raise UpstreamError(error, read_advice(response.headers, time.time()), usage_of_body(body))


class HttpAnswer:
    """The body of an event stream, in the pieces in which it arrives."""

    def __init__(self, response: httpx.Response, base_url: str) -> None:
        self._base_url = base_url
        encoding = _encoding(response)
        body: _Body = response.extensions["body"]
        if encoding in _RAW:
            self._read, self._rest = body.read, body.rest
        else:  # the upstream compressed it although `identity` was requested
            self._read, self._rest = partial(anext, _unpacked(response, encoding), b""), bytes

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the body."""
        return self

    async def __anext__(self) -> bytes:
        """Return the next bytes of the socket. Raises UpstreamError if the connection breaks."""
        try:
            data = await self._read()
        except (httpx.HTTPError, httpx.StreamError, aiohttp.ClientError, OSError):
            data = self._rest()
            if not data:
                with translate_errors(Phase.READING, self._base_url):
                    raise
        if not data:
            raise StopAsyncIteration
        return data

    async def drain(self) -> None:
        """Read the rest of the body for a moment after the stream's end, so that the connection can be reused."""
        with suppress(TimeoutError, StopAsyncIteration, UpstreamError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while True:
                    await anext(self)


class _Transport(AiohttpTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response: httpx.Response = await super().handle_async_request(request)
        assert isinstance(response.stream, AiohttpResponseStream)
        body = _Body(response.stream._aiohttp_response)  # noqa: SLF001 - no public name
        response.stream = response.extensions["body"] = (
            body  # httpx wraps the stream and passes the extension through
        )
        return response


class _Body(AiohttpResponseStream):
    """A response body that is read without the five generators between httpx and aiohttp, which cost more than
    parsing.

    No byte is lost if the connection breaks: aiohttp raises before it returns the bytes already buffered, and
    on every later read.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(response)
        self.read = response.content.readany
        """Wait for bytes; return those that arrived since the last call, and no bytes at the end."""

    def rest(self) -> bytes:
        """Return the bytes that arrived before the connection broke and were not read."""
        return self._aiohttp_response.content._read_nowait(-1)  # noqa: SLF001 - the public one raises

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate for httpx, which reads error bodies and compressed bodies."""
        with map_aiohttp_exceptions():
            try:
                while data := await self.read():
                    yield data
            except (aiohttp.ClientError, OSError):
                if rest := self.rest():
                    yield rest
                raise


def _new_session() -> aiohttp.ClientSession:
    # aiohttp's connector defaults to 100 connections, and httpx's limits do not apply to it.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def _encoding(response: httpx.Response) -> str:
    encoding: str = response.headers.get("content-encoding", "identity").strip().lower()
    return encoding


async def _unpacked(response: httpx.Response, encoding: str) -> AsyncIterator[bytes]:
    """Decompress in bounded pieces: 64 KiB can decompress to 64 MiB, which httpx would return at once."""
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise httpx.DecodingError(f"content-encoding {encoding[:40]!r} was not asked for")
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
    with suppress(TimeoutError, httpx.HTTPError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(ERROR_BODY_TIMEOUT_S):
            encoding = _encoding(response)
            async for data in response.aiter_raw() if encoding in _RAW else _unpacked(response, encoding):
                body += data
                if len(body) >= ERROR_BODY_BYTES:
                    break
    return bytes(body[:ERROR_BODY_BYTES])


def _refusal(status: int, kind: str, body: bytes) -> JobError:
    """Return the job's error for a response that is not an event stream."""
    if status >= 400:
        return http_error(status, body)
    if status != 200:
        message = f"the upstream answered {status} instead of 200; base_url has to be the final one, with /v1"
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, message, status)
    fault = error_of_body(body)
    is_error = fault.message != fault.frame.strip()
    told = kind or "no content type"
    message = fault.message if is_error else f"the upstream answered with {told} instead of an event stream"
    retriable = is_error and is_retriable(fault.status or 500, fault.kind)
    return JobError(ErrorCode.UPSTREAM_PROTOCOL, message, status, fault.frame or None, retriable)
