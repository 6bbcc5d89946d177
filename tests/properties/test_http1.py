"""The HTTP/1.1 parser does not depend on how its input is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fuzz.http1 import SEEDS, http_response
from tests.http1 import chunked, parse_response

RESPONSES = st.sampled_from(SEEDS)
JUNK = st.sampled_from(
    [b"\r\n", b"\n", b"\r", b" ", b":", b";", b"0", b"3", b"\0", b",", b"chunked", b"HTTP/1.1 "]
) | st.binary(max_size=3)


def cut(response: bytes, data: st.DataObject) -> list[bytes]:
    """Cut a response anywhere."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(response)), max_size=20)))
    return [response[a:b] for a, b in zip([0, *cuts], [*cuts, len(response)], strict=True)]


@given(data=st.data(), eof=st.booleans())
def test_http_parser_any_cuts_give_the_same_result(data: st.DataObject, *, eof: bool) -> None:
    """Reads may be cut anywhere."""
    response = b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" + data.draw(RESPONSES)

    assert parse_response(cut(response, data), eof=eof) == parse_response([response], eof=eof)


@given(st.lists(st.binary(min_size=1, max_size=300)), st.data())
def test_http_parser_any_chunks_and_cuts_give_the_same_body(parts: list[bytes], data: st.DataObject) -> None:
    """The body does not depend on how it is cut into chunks, nor the chunks into reads."""
    response = chunked(*parts)

    parsed = parse_response(cut(response, data))

    assert (parsed.body, parsed.end) == (b"".join(parts), "complete")


@given(RESPONSES, st.data())
def test_http_parser_damaged_responses_hold_the_invariants(response: bytes, data: st.DataObject) -> None:
    """Wherever bytes are inserted or replaced, the result is the same for all cuts, and nothing is raised."""
    start = data.draw(st.integers(0, len(response)))
    end = data.draw(st.integers(start, min(len(response), start + 3)))

    http_response(response[:start] + data.draw(JUNK) + response[end:])
