"""HTTP responses for tests: the parser fed with pieces, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamworker.upstream.http1_response import ResponseParser

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "BODIES",
    "CHUNKED",
    "FAULTS",
    "UNTIL_EOF",
    "Parsed",
    "chunk",
    "chunked",
    "head",
    "parse_response",
    "parse_to_eof",
    "single_bytes",
]


class Parsed(NamedTuple):
    """What a parser made of a response."""

    status: int | None
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    end: str
    """"complete", "open" where more was expected, or the text of the error."""


def parse_response(pieces: Iterable[bytes], *, method: str = "POST", eof: bool = False) -> Parsed:
    """Feed a parser until the response ends, or the pieces do; with `eof`, the connection ends there too."""
    parser = ResponseParser(method)
    body = b""
    for piece in pieces:
        body += parser.feed(piece)
        if parser.is_complete or parser.error is not None:
            break
    if eof:
        parser.feed_eof()
    return _parsed(parser, body)


def parse_to_eof(data: bytes) -> Parsed:
    """Parse a whole response whose connection ends after it."""
    return parse_response([data], eof=True)


def single_bytes(data: bytes) -> list[bytes]:
    """Cut into single bytes."""
    return [data[at : at + 1] for at in range(len(data))]


def head(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """Return a response's head."""
    return b"\r\n".join((status, *lines, b"", b""))


def chunk(data: bytes) -> bytes:
    """Return one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked(*pieces: bytes) -> bytes:
    """Return a response with one chunk for each piece, and its end."""
    return head(b"Transfer-Encoding: chunked") + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


CHUNKED = head(b"Transfer-Encoding: chunked")

BODIES = {
    "length": (head(b"Content-Length: 5") + b"hello", b"hello"),
    "empty": (head(b"Content-Length: 0"), b""),
    "chunked": (chunked(b"hel", b"lo"), b"hello"),
    "chunked-empty": (chunked(), b""),
    "chunk-size-in-both-cases": (CHUNKED + b"aA\r\n" + b"x" * 0xAA + b"\r\n0\r\n\r\n", b"x" * 0xAA),
    "chunk-size-with-zeros": (CHUNKED + b"0" * 30 + b"5\r\nhello\r\n000\r\n\r\n", b"hello"),
    "chunk-size-then-spaces": (CHUNKED + b"5   \t \r\nhello\r\n0\r\n\r\n", b"hello"),
    "chunk-extensions": (CHUNKED + b'5;a;b=c;d="e;\\"f"\r\nhello\r\n0;x=y\r\n\r\n', b"hello"),
    "trailers": (CHUNKED + chunk(b"hello") + b"0\r\nA: b\r\nContent-Length: 9\r\n\r\n", b"hello"),
    "length-and-chunked": (
        head(b"Content-Length: 3", b"Transfer-Encoding: chunked") + chunk(b"hello") + b"0\r\n\r\n",
        b"hello",
    ),
    "chunked-twice": (
        head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + chunk(b"hello") + b"0\r\n\r\n",
        b"hello",
    ),
    "chunked-in-1.0": (
        head(b"Transfer-Encoding: chunked", status=b"HTTP/1.0 200 OK") + chunk(b"hello") + b"0\r\n\r\n",
        b"hello",
    ),
    "length-in-1.0": (head(b"Content-Length: 5", status=b"HTTP/1.0 200 OK") + b"hello", b"hello"),
    "204": (head(b"Content-Length: 5", status=b"HTTP/1.1 204 No Content"), b""),
    "304": (head(b"Content-Length: 5", status=b"HTTP/1.1 304 Not Modified"), b""),
    "upgrade-is-an-offer": (
        head(b"Upgrade: h2c", b"Connection: upgrade", b"Content-Length: 5") + b"hello",
        b"hello",
    ),
    "binary": (chunked(bytes(range(256))), bytes(range(256))),
}
"""Responses that end by themselves."""

UNTIL_EOF = {
    "no-length": head(),
    "1.0": head(status=b"HTTP/1.0 200 OK"),
    "identity": head(b"Transfer-Encoding: identity"),
    "close": head(b"Connection: close"),
}
"""Heads of responses that the end of the connection ends."""

FAULTS = {
    "size-not-hex": (chunk(b"hello") + b"z", b"hello"),
    "size-negative": (chunk(b"hello") + b"-", b"hello"),
    "size-empty": (chunk(b"hello") + b"\r", b"hello"),
    "size-prefixed": (chunk(b"hello") + b"0x", b"hello"),
    "size-then-text": (chunk(b"hello") + b"5 x", b"hello"),
    "size-too-large": (chunk(b"hello") + b"1" + b"0" * 16, b"hello"),
    "size-then-nul": (b"10\x00", b""),
    "size-bare-lf": (chunk(b"hello") + b"5\n", b"hello"),
    "size-bare-cr": (chunk(b"hello") + b"5\rx", b"hello"),
    "excess-data": (b"5\r\nhello!", b"hello"),
    "data-bare-lf": (b"5\r\nhello\n", b"hello"),
    "data-bare-cr": (b"5\r\nhello\r_", b"hello"),
    "data-without-end": (b"5\r\nhello_", b"hello"),
    "extension-bare-lf": (b"5;a\n", b""),
    "extension-empty": (b"5;\r", b""),
    "last-chunk-bare-lf": (chunk(b"hello") + b"0\n", b"hello"),
    "end-bare-lf": (chunk(b"hello") + b"0\r\n\n", b"hello"),
    "trailer-without-colon": (chunk(b"hello") + b"0\r\nno ", b"hello"),
    "trailer-bare-lf": (chunk(b"hello") + b"0\r\na: b\n", b"hello"),
}
"""Chunked bodies up to the byte that is wrong, and what precedes it."""


def _parsed(parser: ResponseParser, body: bytes) -> Parsed:
    end = "complete" if parser.is_complete else "open" if parser.error is None else str(parser.error)
    if parser.head is None:
        return Parsed(None, b"", [], body, end)
    return Parsed(parser.head.status, parser.head.reason, parser.head.headers, body, end)
