"""The parser of HTTP/1.1 responses: bodies, heads, limits, faults, and the unusual cases that other parsers are tested with."""

from __future__ import annotations

import gc
import weakref

import pytest

from streamworker.upstream.http1_response import (
    MAX_FRAMING_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    ResponseParser,
    ServerDisconnected,
)
from tests.http1 import (
    BODIES,
    CHUNKED,
    FAULTS,
    UNTIL_EOF,
    Parsed,
    chunk,
    chunked,
    head,
    parse_response,
    parse_to_eof,
    single_bytes,
)


@pytest.mark.parametrize("name", BODIES)
def test_parser_whole_and_single_bytes_gives_the_body(name: str) -> None:
    """Every kind of body is decoded, and ends by itself, however the reads are cut."""
    data, body = BODIES[name]

    for pieces in ([data], single_bytes(data)):
        parsed = parse_response(pieces)
        assert (parsed.body, parsed.end) == (body, "complete")


@pytest.mark.parametrize("name", UNTIL_EOF)
def test_parser_body_without_length_ends_with_the_connection(name: str) -> None:
    """Such a body is open until EOF, and complete then."""
    data = UNTIL_EOF[name] + b"5\r\nhello"

    assert parse_response([data]).end == "open"
    for pieces in ([data], single_bytes(data)):
        parsed = parse_response(pieces, eof=True)
        assert (parsed.body, parsed.end) == (b"5\r\nhello", "complete")


@pytest.mark.parametrize("name", FAULTS)
def test_parser_framing_fault_is_found_at_its_byte_and_loses_nothing(name: str) -> None:
    """The read with the first wrong byte ends the response; all that precedes it is returned."""
    body, kept = FAULTS[name]
    data = CHUNKED + body

    whole = parse_response([data])
    assert whole.body == kept
    assert whole.end.startswith("invalid HTTP response: ")
    assert parse_response(single_bytes(data)) == whole
    assert parse_response([data[:-1], data[-1:]]) == whole
    assert parse_response([data + b"more\r\n0\r\n\r\n"]) == whole


@pytest.mark.parametrize("name", FAULTS)
def test_parser_before_the_wrong_byte_expects_more(name: str) -> None:
    """Without its last byte nothing is wrong yet: the table above is exact."""
    assert parse_response([CHUNKED + FAULTS[name][0][:-1]]).end == "open"


@pytest.mark.parametrize(
    "data",
    [
        head(b"Content-Length: 10") + b"hello",
        CHUNKED + chunk(b"hello"),
        CHUNKED + b"6\r\nhello",
        CHUNKED + chunk(b"hello") + b"0\r\n",
        CHUNKED + chunk(b"hello") + b"0\r\nA: b\r\n",
    ],
)
def test_parser_connection_ends_inside_body_is_an_error(data: bytes) -> None:
    """What has arrived is kept."""
    parsed = parse_to_eof(data)

    assert (parsed.body, parsed.end) == (
        b"hello",
        "peer closed connection without sending complete message body",
    )


@pytest.mark.parametrize("data", [b"", b"H", head(b"A: b")[:-1], head(status=b"HTTP/1.1 100 Continue")])
def test_parser_connection_ends_before_the_head_is_an_error(data: bytes) -> None:
    """A connection that ends before a byte is distinguished from one that ends later."""
    parser = ResponseParser("POST")
    if data:
        parser.feed(data)

    parser.feed_eof()

    assert isinstance(parser.error, ServerDisconnected) == (not data)
    assert parser.error is not None


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (head(b"A: a a a  a a "), [(b"A", b"a a a  a a")]),
        (head(b"A:", b"B: \t \t "), [(b"A", b""), (b"B", b"")]),
        (
            head(b"A: multi-line", b" header", b"\tmore", b"B: c"),
            [(b"A", b"multi-line header\tmore"), (b"B", b"c")],
        ),
        (b"HTTP/1.1 200 OK\nA: b\nC: d\n\n", [(b"A", b"b"), (b"C", b"d")]),
        (b"HTTP/1.1 200 OK\r\nA: b\n\r\n", [(b"A", b"b")]),
        (head(b"Set-Cookie: ___utm=kUd\x01UpAt; path=/"), [(b"Set-Cookie", b"___utm=kUd\x01UpAt; path=/")]),
        (head(b"A: caf\xc3\xa9 \xe9"), [(b"A", b"caf\xc3\xa9 \xe9")]),
        (head(b"a: 1", b"A: 2"), [(b"a", b"1"), (b"A", b"2")]),
        (b"\r\n\r\n" + head(b"A: b"), [(b"A", b"b")]),
    ],
    ids=["spaces", "empty", "folded", "lf", "mixed", "control", "latin-1", "twice", "leading-crlf"],
)
def test_parser_unusual_headers_are_accepted(data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """What RFC 9112 asks recipients to accept, and what servers are known to send."""
    for pieces in ([data], single_bytes(data)):
        assert parse_response(pieces, eof=True) == Parsed(200, b"OK", headers, b"", "complete")


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (b"HTTP/1.1 200", 200, b""),
        (b"HTTP/1.0 200 ", 200, b""),
        (b"HTTP/1.1 529 Site is overloaded", 529, b"Site is overloaded"),
        (b"HTTP/1.1 200 \xc3\xa9t\xe9", 200, b"\xc3\xa9t\xe9"),
        (b"HTTP/1.1 999 x", 999, b"x"),
    ],
)
def test_parser_status_line_variants_are_accepted(status: bytes, code: int, reason: bytes) -> None:
    """The reason phrase may be missing, and statuses may be new."""
    data = head(b"Content-Length: 0", status=status)

    for pieces in ([data], single_bytes(data)):
        parsed = parse_response(pieces)
        assert (parsed.status, parsed.reason, parsed.end) == (code, reason, "complete")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not begin with HTTP/"),
        (b"<html>", "does not begin with HTTP/"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "does not begin with HTTP/"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "HTTP version 2.0"),
        (b"HTTP/0.9 200 OK\r\n\r\n", "HTTP version 0.9"),
        (b"HTTP/1.1 20", "open"),
        (b"HTTP/1.1 2000 ", "Invalid response status"),
        (b"HTTP/1.1 099 x\r\n\r\n", "status code 99"),
        (b"HTTP/1.1 200 OK\x00xxx\r\n\r\n", "NUL"),
        (head(b"  folded: line"), "Invalid header token"),
        (head(b"foo : line"), "Invalid header token"),
        (head(b"foo\t: line"), "Invalid header token"),
        (head(b"Content-Length : 5"), "white space"),
        (head(b"Transfer-Encoding : chunked"), "white space"),
        (head(b"Connection upgrade: x"), "white space"),
        (head(b"Connection\t: close"), "Invalid header token"),
        (head(b": line"), "Invalid header token"),
        (head(b"no colon"), "Invalid header token"),
        (head(b"a: b\x00c"), "the header 'a' contains a NUL"),
        (head(b"a: b\rc"), "Missing expected LF"),
        (head(b"Content-Length: 3", b"Content-Length: 4"), "Duplicate Content-Length"),
        (head(b"Content-Length: 3, 3"), "Invalid character in Content-Length"),
        (head(b"Content-Length: +3"), "Invalid character in Content-Length"),
        (head(b"Content-Length: " + b"9" * 30), "Content-Length overflow"),
        (head(b"Transfer-Encoding: gzip, chunked"), "transfer-encoding 'gzip, chunked' is not supported"),
        (head(b"Transfer-Encoding: gzip"), "transfer-encoding 'gzip' is not supported"),
        (head(b"Transfer-Encoding: chunked\t"), "is not supported"),
        (head(b"Transfer-Encoding: " + b"x" * 99), "transfer-encoding '" + "x" * 40 + "' is not supported"),
        (
            head(b"Content-Length: 4", status=b"HTTP/1.0 102 Processing") + head(b"Content-Length: 0"),
            "an interim response announces a body and a close",
        ),
        (head(b"Upgrade: x", b"Connection: upgrade", status=b"HTTP/1.1 101 Switching Protocols"), "101"),
        (head(status=b"HTTP/1.1 101 Switching Protocols") + b"abc", "101"),
    ],
)
def test_parser_invalid_head_is_an_error_that_says_so(data: bytes, words: str) -> None:
    """Nothing of the response is believed."""
    for pieces in ([data], single_bytes(data)):
        parsed = parse_response(pieces)
        assert words in parsed.end
        assert parsed.status is None


def test_parser_interim_responses_are_skipped() -> None:
    """100 and 103 may come several times, with headers, and may announce a close that is not theirs to announce."""
    data = (
        head(status=b"HTTP/1.1 100 Continue")
        + head(b"Connection: close", b"Link: </>", status=b"HTTP/1.1 103 Early Hints")
        + head(b"Content-Length: 4", status=b"HTTP/1.1 102 Processing")
        + head(status=b"HTTP/1.0 102 Processing")
        + head(b"A: b", b"Content-Length: 2", status=b"HTTP/1.1 201 Created")
        + b"ok"
    )

    for pieces in ([data], single_bytes(data)):
        parsed = parse_response(pieces)
        assert parsed == Parsed(201, b"Created", [(b"A", b"b"), (b"Content-Length", b"2")], b"ok", "complete")


def test_parser_head_request_has_no_body() -> None:
    """The length that a response to HEAD announces is not waited for."""
    for data in (head(b"Content-Length: 5"), CHUNKED):
        parsed = parse_response(single_bytes(data), method="HEAD")
        assert (parsed.body, parsed.end) == (b"", "complete")


def test_parser_tunnel_has_no_body() -> None:
    """RFC 9110: a 2xx response to CONNECT has neither Content-Length nor Transfer-Encoding, or they are ignored."""
    for data in (head(b"Content-Length: 5"), CHUNKED, head()):
        assert parse_response([data], method="CONNECT").end == "complete"
    refused = head(b"Content-Length: 5", status=b"HTTP/1.1 407 x")
    assert parse_response([refused], method="CONNECT").end == "open"


@pytest.mark.parametrize(
    ("data", "is_reusable"),
    [
        (head(b"Content-Length: 2") + b"ok", True),
        (chunked(b"ok"), True),
        (head(status=b"HTTP/1.1 204 x"), True),
        (head(b"Connection: keep-alive", b"Content-Length: 2", status=b"HTTP/1.0 200 OK") + b"ok", True),
        (head(b"Content-Length: 2", status=b"HTTP/1.0 200 OK") + b"ok", False),
        (head(b"Connection: close", b"Content-Length: 2") + b"ok", False),
        (head(b"Connection: x, Close", b"Content-Length: 2") + b"ok", False),
        (head(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", False),
        (head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", False),
        (head(b"Content-Length: 2") + b"ok!", False),
        (chunked(b"ok") + head(b"Content-Length: 0"), False),
        (head(status=b"HTTP/1.1 204 x") + b"body", False),
    ],
)
def test_parser_says_whether_the_connection_can_be_used_again(data: bytes, *, is_reusable: bool) -> None:
    """Not after a close that was announced, bytes beyond the end, or two ways to find the end."""
    parser = ResponseParser("POST")

    parser.feed(data)

    assert parser.is_complete
    assert parser.is_reusable is is_reusable


def test_parser_excess_data_does_not_touch_the_body() -> None:
    """What follows a complete body is not part of it, even where it looks like a response."""
    for excess in (b"junk", b"\r\n", head(b"Content-Length: 3") + b"abc"):
        parsed = parse_response([chunked(b"hello") + excess])
        assert (parsed.status, parsed.body, parsed.end) == (200, b"hello", "complete")


def test_parser_head_of_the_limit_is_accepted_and_one_byte_more_is_refused() -> None:
    """The limit is exact, includes interim responses, and is named."""
    interim = head(status=b"HTTP/1.1 100 Continue")
    rest = len(interim) + len(head(b"A: ", b"Content-Length: 5"))
    fits = interim + head(b"A: " + b"x" * (MAX_HEAD_BYTES - rest), b"Content-Length: 5")
    beyond = interim + head(b"A: " + b"x" * (MAX_HEAD_BYTES - rest + 1), b"Content-Length: 5")
    assert len(fits) == MAX_HEAD_BYTES

    for size in (1 << 20, 4096, 7):
        pieces = [(fits + b"hello")[at : at + size] for at in range(0, len(fits) + 5, size)]
        assert parse_response(pieces).end == "complete"
        pieces = [(beyond + b"hello")[at : at + size] for at in range(0, len(beyond) + 5, size)]
        assert parse_response(pieces).end == f"the response's head is larger than {MAX_HEAD_BYTES} bytes"


def test_parser_as_many_headers_as_the_limit_are_accepted_and_one_more_is_refused() -> None:
    """The limit is exact, and is named."""
    lines = [b"X-%d: y" % number for number in range(MAX_HEADERS - 1)]

    assert parse_response([head(*lines, b"Content-Length: 0")]).end == "complete"
    assert (
        parse_response([head(*lines, b"A: b", b"Content-Length: 0")]).end
        == f"the response has more than {MAX_HEADERS} headers"
    )


def test_parser_endless_interim_responses_are_refused() -> None:
    """They count as part of the head."""
    interim = head(status=b"HTTP/1.1 102 Processing")

    parsed = parse_response([interim] * (MAX_HEAD_BYTES // len(interim) + 1))

    assert parsed.end == f"the response's head is larger than {MAX_HEAD_BYTES} bytes"


@pytest.mark.parametrize(
    "framing",
    [b"5;" + b"x" * 4094, b"0" * 4096, b"0\r\nA: " + b"x" * 4090],
    ids=["extension", "size", "trailer"],
)
def test_parser_endless_framing_is_refused(framing: bytes) -> None:
    """Framing that never leads to a byte of the body is bounded."""
    more = b"0" * 4096
    reads = [CHUNKED + chunk(b"hello"), framing, *[more] * (MAX_FRAMING_BYTES // len(more))]

    parsed = parse_response(reads)

    assert parsed.body == b"hello"
    assert parsed.end in {
        f"more than {MAX_FRAMING_BYTES} bytes of chunk framing without a byte of the body",
        "invalid HTTP response: Chunk size overflow",
    }


def test_parser_long_stream_of_small_reads_has_no_limit() -> None:
    """The bound on framing begins anew with each byte of the body."""
    parser = ResponseParser("POST")
    parser.feed(CHUNKED)

    for _ in range(MAX_FRAMING_BYTES // 4):
        parser.feed(b"1\r\n")
        assert parser.feed(b"x") == b"x"
        parser.feed(b"\r\n")
    for _ in range(MAX_FRAMING_BYTES // 4):
        parser.feed(b"1\r\n")
        assert parser.feed(b"x\r\n1\r\ny\r\n") == b"xy"

    assert parser.error is None


def test_parser_as_many_trailers_as_the_limit_are_accepted_and_one_more_is_refused() -> None:
    """Trailers have a limit of their own."""
    lines = b"".join(b"X-%d: y\r\n" % number for number in range(MAX_HEADERS))

    assert parse_response([CHUNKED + b"0\r\n" + lines + b"\r\n"]).end == "complete"
    assert (
        parse_response([CHUNKED + b"0\r\n" + lines + b"A: b\r\n\r\n"]).end
        == f"the response has more than {MAX_HEADERS} trailer fields"
    )


@pytest.mark.parametrize(
    "reads",
    [
        [chunked(b"x")],
        [CHUNKED, chunk(b"x") + b"0\r\n\r\n"],
        [CHUNKED + b"z"],
        [CHUNKED, chunk(b"x") + b"z"],
        [head(b"a b: c")],
    ],
)
def test_parser_that_has_ended_is_freed_without_the_garbage_collector(reads: list[bytes]) -> None:
    """llhttp's callbacks refer to the parser: the cycle is broken when the response ends."""

    class Traced(ResponseParser):
        __slots__ = ("__weakref__",)

    parser = Traced("POST")
    trace = weakref.ref(parser)
    gc.disable()
    try:
        for data in reads:
            parser.changed = False
            parser.feed(data)
        del parser
        assert trace() is None
    finally:
        gc.enable()


def test_parser_ignores_what_it_is_fed_after_the_end() -> None:
    """Neither bytes nor EOF change a response that has ended."""
    parser = ResponseParser("POST")
    parser.feed(chunked(b"x"))

    assert parser.feed(b"more") == b""
    parser.feed_eof()

    assert parser.is_complete
    assert parser.error is None


def test_parser_releases_headers_and_still_reads_the_body() -> None:
    """A stream is open for minutes, and its headers were taken at its beginning."""
    parser = ResponseParser("POST")
    parser.release_headers()  # nothing is known yet
    assert parser.head is None
    parser.feed(b"HTTP/1.1 200 OK\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n")
    parser.release_headers()

    assert parser.head is not None
    assert (parser.head.status, parser.head.headers) == (200, [])
    assert parser.feed(b"2\r\nab\r\n0\r\n\r\n") == b"ab"
    assert parser.is_complete
