"""The bytes of an HTTP/1.1 request."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

__all__ = ["request_bytes", "request_head"]

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_TARGET = re.compile(rb"[\x21-\x7e]+").fullmatch
_FORBIDDEN_IN_VALUE = re.compile(rb"[\x00\r\n]").search


def request_head(method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Encode the request line and the header fields. Raises httpx.LocalProtocolError, which names no value."""
    token = method.encode("ascii", "replace")
    if not _NAME(token):
        raise httpx.LocalProtocolError("the request's method is not a valid token")
    if not _TARGET(target):
        raise httpx.LocalProtocolError("the request's target is not valid")
    lines = [b"%b %b HTTP/1.1" % (token, target)]
    for name, value in headers:
        if not _NAME(name):
            raise httpx.LocalProtocolError("the name of a request header is not a valid token")
        if _FORBIDDEN_IN_VALUE(value) or value != value.strip(b" \t"):
            raise httpx.LocalProtocolError(f"the value of the request header {name.decode()!r} is not valid")
        lines.append(b"%b: %b" % (name, value))
    lines += (b"", b"")
    return b"\r\n".join(lines)


async def request_bytes(
    request: httpx.Request, *, target_prefix: bytes = b"", headers: tuple[tuple[bytes, bytes], ...] = ()
) -> AsyncGenerator[bytes, None]:
    """Yield a request in pieces to be written: head and body as one where the body is in memory.

    Raises httpx.LocalProtocolError where the request cannot be written as HTTP/1.1.
    """
    head = request_head(
        request.method, target_prefix + request.url.raw_path, [*request.headers.raw, *headers]
    )
    stream = request.stream
    if not isinstance(stream, httpx.AsyncByteStream):
        raise TypeError("the request's body has to be bytes or an asynchronous stream")
    if "transfer-encoding" in request.headers:
        yield head
        async for piece in stream:
            if piece:
                yield b"%x\r\n%b\r\n" % (len(piece), piece)
        yield b"0\r\n\r\n"
        return
    left = _content_length(request.headers)
    if isinstance(stream, httpx.ByteStream):
        body = b"".join([piece async for piece in stream])
        _check_length(left - len(body))
        yield head + body
        return
    yield head
    async for piece in stream:
        left -= len(piece)
        _check_length(min(left, 0))
        yield piece
    _check_length(left)


def _content_length(headers: httpx.Headers) -> int:
    value = headers.get("content-length", "0")
    if not (value.isascii() and value.isdigit()):
        raise httpx.LocalProtocolError("the request's content-length is not a number")
    return int(value)


def _check_length(left: int) -> None:
    if left:
        raise httpx.LocalProtocolError("the request's body does not have the length its head announces")
