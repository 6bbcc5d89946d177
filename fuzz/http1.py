"""What is fuzzed of HTTP/1.1: the parser of responses."""

from __future__ import annotations

from streamworker.upstream.http1_response import MAX_FRAMING_BYTES
from tests.http1 import BODIES, CHUNKED, FAULTS, UNTIL_EOF, head, parse_response, single_bytes

__all__ = ["SEEDS", "http_response"]

SEEDS = (
    *(data for data, _ in BODIES.values()),
    *(CHUNKED + data for data, _ in FAULTS.values()),
    *(data + b"hello" for data in UNTIL_EOF.values()),
    head(b"A: multi-line", b" header", b"\tmore", b"B: \t ", b"Content-Length: 0"),
    b"HTTP/1.1 200 OK\nA: b\nContent-Length: 0\n\n",
    head(status=b"HTTP/1.1 100 Continue")
    + head(b"Connection: close", status=b"HTTP/1.1 103 x")
    + BODIES["chunked"][0],
    head(b"Content-Length: 4", status=b"HTTP/1.0 102 x") + BODIES["length"][0],
    head(b"Upgrade: x", b"Connection: upgrade", status=b"HTTP/1.1 101 x"),
    head(b"Transfer-Encoding: chunked\r\n ") + b"5\r\nhello\r\n0\r\n\r\n",
)
"""Where fuzzing begins."""


def http_response(data: bytes) -> None:
    """An HTTP response: whole, byte by byte and in two pieces it gives the same head, body and end."""
    data = data[:MAX_FRAMING_BYTES]  # this limit alone depends on where the reads are cut
    for eof in (False, True):
        whole = parse_response([data], eof=eof)
        assert parse_response(single_bytes(data), eof=eof) == whole
        middle = data[0] * len(data) // 256 if data else 0
        assert parse_response([data[:middle], data[middle:]], eof=eof) == whole
    assert whole.end != "open"
    assert len(whole.body) <= len(data)
