"""What is fuzzed of HTTP/1.1: the parser of responses."""

from __future__ import annotations

from streamworker.upstream.http1_response import MAX_FRAMING_BYTES
from tests.http1 import parse_response, single_bytes

__all__ = ["http_response"]


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
