"""The bytes of event streams: a delta of the live path is the same as one of a replay, in a chunk."""

from __future__ import annotations

import pytest

from streamworker.gateway import websocket_frames
from streamworker.gateway.feeds import FeedEvent
from streamworker.gateway.frames import NDJSON, SSE, Framing, chunk

VALUES = [
    b'{"type":"delta","seq":1}',
    b"{}",
    b'{"a":\n"b"}',
    b'{"a":\r\n"b",\r"c":1}',
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


@pytest.mark.parametrize(("size", "head"), [(10, b"\x81\x40"), (200, b"\x81\x7e"), (70_000, b"\x81\x7f")])
def test_event_frame_has_the_length_of_its_payload(size: int, head: bytes) -> None:
    """In seven, sixteen or 64 bits."""
    frame = websocket_frames.event_frame(websocket_frames.event_head("s"), b"1.2.3.ab", b"x" * size)

    assert frame.startswith(head[:2])
    assert frame.endswith(b'{"type":"event","id":"s","cursor":"1.2.3.ab","event":' + b"x" * size + b"}")
