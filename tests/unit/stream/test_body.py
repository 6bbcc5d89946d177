"""The form of a body: an event stream or a JSON document."""

from __future__ import annotations

import pytest

from streamworker.stream.body import BodyForm, is_json, looks_like_event_stream
from tests.streams import bytewise


def fed(*pieces: bytes, max_bytes: int = 100) -> tuple[bytes, bytes | None]:
    """Return the bytes for the parser and the document."""
    form = BodyForm(max_bytes)
    stream = b"".join(form.feed(piece) for piece in pieces)
    return stream, form.document


@pytest.mark.parametrize(
    ("body", "stream", "document"),
    [
        (b"data: {}\n\n", b"data: {}\n\n", None),
        (b": ping\n\n{}", b": ping\n\n{}", None),
        (b"<html>", b"<html>", None),
        (b"", b"", None),
        (b"\xef\xbb\xbf\r\n data: {}", b"\xef\xbb\xbf\r\n data: {}", None),
        (b'{"a":1}', b"", b'{"a":1}'),
        (b"\xef\xbb\xbf\n {\n}\n", b"\xef\xbb\xbf\n ", b"{\n}\n"),
        (b"[1]", b"", b"[1]"),
        (b'{"a":"data: x"}', b"", b'{"a":"data: x"}'),
        (b'{"a":1}\ndata: {}\n\n', b'{"a":1}\ndata: {}\n\n', None),
        (b'{"a":1}\r\n\r\n: c\r\ndata: {}', b'{"a":1}\r\n\r\n: c\r\ndata: {}', None),
        (b'{\n"data": 1}', b"", b'{\n"data": 1}'),
    ],
)
def test_body_form_is_decided_by_the_first_bytes_for_every_chunking(
    body: bytes, stream: bytes, document: bytes | None
) -> None:
    """Brackets begin a document, unless a field of an event stream follows on a line of its own."""
    assert fed(body) == fed(*bytewise(body)) == (stream, document)


@pytest.mark.parametrize("tail", [b"x" * 20, b"x\ndata: {}"])
def test_body_form_document_is_bounded_alike_for_every_chunking(tail: bytes) -> None:
    """A document at the limit is kept; one byte more overflows, whatever follows."""
    whole, pieces = BodyForm(10), BodyForm(10)
    whole.feed(b"{" + b"x" * 9)
    assert (whole.overflowed, whole.document) == (False, b"{" + b"x" * 9)
    whole.feed(tail)
    for piece in bytewise(b"{" + b"x" * 9 + tail):
        pieces.feed(piece)

    assert whole.overflowed
    assert pieces.overflowed
    assert whole.document == pieces.document == b""


@pytest.mark.parametrize(
    ("opening", "is_stream"),
    [
        (b"data: x", True),
        (b"\xef\xbb\xbfevent: x", True),
        (b": comment", True),
        (b"\n\nretry: 1", True),
        (b"<html>\n<p>data: x", False),
        (b"Bad Gateway", False),
        (b"", False),
    ],
)
def test_looks_like_event_stream_has_a_field_at_the_start_of_a_line(opening: bytes, is_stream: bool) -> None:
    """For the message of an error: a page is not an event stream."""
    assert looks_like_event_stream(opening) is is_stream


def test_is_json_of_a_document_is_true_if_it_is_whole() -> None:
    """A connection may break after the document's last byte."""
    assert is_json(b'{"a":1}\n')
    assert not is_json(b'{"a":1')
