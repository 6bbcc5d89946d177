"""The bytes of event streams: a delta of the live path is the same as one of a replay, in a chunk."""

from __future__ import annotations

import json

import pytest

from streamworker.gateway.feeds import FeedEvent
from streamworker.gateway.frames import NDJSON, SSE, Framing, chunk
from tests.streams import parse

VALUES = [
    b'{"type":"delta","seq":1}',
    b"{}",
    b'{"a":\n"b"}',
    b'{"a":\r\n"b",\r"c":1}',
    b'{"a":\r"b"}',
    b"{" + b" " * 70_000 + b"}",
    '{"text":"é 漢 🙂"}'.encode(),
]


@pytest.mark.parametrize("framing", [SSE, NDJSON])
@pytest.mark.parametrize("value", VALUES)
def test_delta_is_the_event_in_a_chunk(framing: Framing, value: bytes) -> None:
    """Whether it was replayed or came live makes no difference to the client."""
    event = FeedEvent("delta", "7.12.3.9f2c01ab", value, 3, "a")

    assert framing.delta(b"7.12.3.9f2c01ab", value) == chunk(framing.event(event))


@pytest.mark.parametrize("framing", [SSE, NDJSON])
def test_delta_for_several_clients_is_framed_once(framing: Framing) -> None:
    """They get the same two objects of the log, and the same frame."""
    cursor, value = b"7.12.3.9f2c01ab", bytes(bytearray(b'{"seq":3}'))
    first = framing.delta(cursor, value)

    assert framing.delta(cursor, value) is first
    assert framing.delta(b"7.13.3.9f2c01ab", value) != first
    assert framing.delta(cursor, bytes(bytearray(b'{"seq":4}'))) == first.replace(b"3}", b"4}")
    assert framing.delta(cursor, value) == first


def test_delta_of_one_format_is_not_that_of_another() -> None:
    """Clients of both may follow one job."""
    cursor, value = b"7.12.3.9f2c01ab", b'{"seq":3}'
    frames = [SSE.delta(cursor, value), NDJSON.delta(cursor, value), SSE.delta(cursor, value)]

    assert frames[0] == frames[2] != frames[1]


@pytest.mark.parametrize("value", [*VALUES, b"\n{}\r"])
def test_event_is_one_event_of_its_format_whatever_line_ends_its_value_has(value: bytes) -> None:
    """Line ends may be between the tokens of a value that another program has written."""
    event = FeedEvent("delta", "7.12.3.9f2c01ab", value, 3, "a")
    [sent] = parse(SSE.event(event)).events
    line = NDJSON.event(event)

    assert (sent.type, sent.last_event_id) == ("delta", "7.12.3.9f2c01ab")
    assert sent.data.splitlines() == value.splitlines()
    assert (line.count(b"\n"), line.count(b"\r"), line[-1:]) == (1, 0, b"\n")
    assert json.loads(line) == {"cursor": "7.12.3.9f2c01ab", "event": json.loads(value)}


def test_events_of_the_gateway_have_the_cursor_behind_which_a_client_resumes() -> None:
    """`closing` has none; as a server-sent event it says when to reconnect."""
    position, closing = {"type": "position"}, {"type": "closing", "reason": "drain"}
    [placed] = parse(SSE.own("position", position, "7.12.w")).events
    [closed] = parse(SSE.own("closing", closing)).events

    assert (placed.type, placed.last_event_id, placed.data) == ("position", "7.12.w", b'{"type":"position"}')
    assert (placed.retry, closed.type, closed.last_event_id) == (None, "closing", "")
    assert closed.retry in range(1000, 5001)
    assert json.loads(closed.data) == closing
    assert NDJSON.own("position", position, "7.12.w") == b'{"cursor":"7.12.w","event":{"type":"position"}}\n'
    assert json.loads(NDJSON.own("closing", closing)) == {"cursor": None, "event": closing}


def test_stream_opens_with_the_time_of_reconnection_and_without_an_event() -> None:
    """Newline-delimited JSON has no such field."""
    opened = parse(SSE.opening())

    assert opened.reconnection_time in range(1000, 5001)
    assert (opened.events, NDJSON.opening()) == ([], b"")


def test_keep_alive_is_not_an_event() -> None:
    """A comment, and a blank line, which parsers of either format ignore."""
    assert parse(SSE.opening() + SSE.keep_alive * 3).events == []
    assert (SSE.keep_alive, NDJSON.keep_alive) == (b":\n", b"\n")
