"""The websocket's frames: the bytes that are sent, the messages that are read, and the reasons of refusals."""

from __future__ import annotations

import json

import msgspec
import pytest

from streamworker.gateway.websocket_frames import (
    MAX_FRAME_BYTES,
    Auth,
    BadFrame,
    Cancel,
    Message,
    Ping,
    Submit,
    Subscribe,
    Unsubscribe,
    control_frame,
    event_frame,
    event_head,
    read,
    text_frame,
)

FINAL_TEXT = 0x81
SUBMIT_BYTES = 100_000


def payload_of(frame: bytes) -> bytes:
    """Read one unmasked frame with a length in as few bytes as possible (RFC 6455 section 5.2)."""
    assert frame[0] == FINAL_TEXT
    size, begin = frame[1], 2
    if size == 126:
        size, begin = int.from_bytes(frame[2:4], "big"), 4
        assert size > 125
    elif size == 127:
        size, begin = int.from_bytes(frame[2:10], "big"), 10
        assert size > 65_535
    assert size == len(frame) - begin
    return frame[begin:]


@pytest.mark.parametrize("size", [20, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537])
def test_text_frame_has_the_length_of_its_payload_in_as_few_bytes_as_possible(size: int) -> None:
    """A client must refuse a frame whose length is written otherwise."""
    value = {"text": "a" * (size - len('{"text":""}'))}
    payload = payload_of(text_frame(value))

    assert (len(payload), json.loads(payload)) == (size, value)


@pytest.mark.parametrize("id_", ["s", 'quote " and \\', "漢 🙂"])
def test_event_frame_is_the_value_beside_its_subscription_and_cursor(id_: str) -> None:
    """The value of the log is sent byte for byte."""
    payload = payload_of(event_frame(event_head(id_), b"1.2.3.ab", b'{ "seq" : 1.50 }'))

    assert payload.endswith(b',"event":{ "seq" : 1.50 }}')
    assert json.loads(payload) == {
        "type": "event",
        "id": id_,
        "cursor": "1.2.3.ab",
        "event": {"seq": 1.5},
    }


def test_control_frame_is_final_and_has_its_length_in_one_byte() -> None:
    """Opcode 8 closes; a status code and a reason follow."""
    assert control_frame(8, b"\x03\xe8bye") == b"\x88\x05\x03\xe8bye"
    assert control_frame(10, b"x" * 125) == b"\x8a\x7d" + b"x" * 125


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"type":"auth","token":"t"}', Auth("t")),
        (b'{"type":"subscribe","id":"a","job_id":"j"}', Subscribe("a", "j")),
        (
            b'{"type":"subscribe","id":"a","job_id":"j","cursor":"c","since":"s","replay":"none"}',
            Subscribe("a", "j", "c", "s", "none"),
        ),
        (b'{"type":"unsubscribe","id":"a"}', Unsubscribe("a")),
        (b'{"type":"cancel","id":"a","job_id":"j","reason":"r"}', Cancel("a", "j", "r")),
        (b'{"type":"ping"}', Ping()),
        (b'{"type":"auth","token":"\\ud83d"}', Auth("\ufffd")),
        (b'{"type":"auth","token":"\xff"}', Auth("\ufffd")),
        (b'{"type":"subscribe","id":"%b","job_id":"j"}' % (b"i" * 128), Subscribe("i" * 128, "j")),
        (
            b'{"type":"cancel","id":"a","job_id":"%b","reason":"%b"}' % (b"j" * 200, b"r" * 500),
            Cancel("a", "j" * 200, "r" * 500),
        ),
    ],
)
def test_read_of_a_message_gives_its_members(data: bytes, message: Message) -> None:
    """Limits themselves are allowed; half a character becomes U+FFFD."""
    assert read(data, SUBMIT_BYTES) == message


def test_read_of_a_submission_keeps_the_members_of_the_job_as_they_are() -> None:
    """Half a character in the job is replaced too."""
    whole = read(b'{"type":"submit","id":"a","job":{"x":[1.50, 2]},"subscribe":true,"key":"k"}', SUBMIT_BYTES)
    repaired = read(b'{"type":"submit","id":"a","job":{"x":"\\ud83d"}}', SUBMIT_BYTES)

    assert whole == Submit("a", {"x": msgspec.Raw(b"[1.50, 2]")}, subscribe=True, key="k")
    assert repaired == Submit("a", {"x": msgspec.Raw('"\ufffd"'.encode())})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the message is not JSON: Expecting value at character 0"),
        (b'{"type":"ping"', "the message is not JSON: Expecting ',' delimiter at character 14"),
        (
            b'{"type":"submit","id":"a","job":{"x":' + b"[" * 9999,
            "the message is not JSON: nested too deeply",
        ),
        (b"[]", "expected `object`, got `array`"),
        (b"{}", "object missing required field `type`"),
        (b'{"type":"secret"}', "type must be auth, subscribe, unsubscribe, submit, cancel or ping"),
        (b'{"type":"\\ud83d"}', "the message is not valid"),
        (b'{"type":"ping","secret":1}', "the message has a member that is not known"),
        (
            b'{"type":"subscribe","id":"a","job_id":"a","replay":"secret"}',
            "replay must be events, snapshot or none",
        ),
        (b'{"type":"auth","token":5}', "expected `str`, got `int` - at `$.token`"),
        (b'{"type":"unsubscribe","id":""}', "expected `str` of length >= 1 - at `$.id`"),
        (
            b'{"type":"unsubscribe","id":"%b"}' % (b"i" * 129),
            "expected `str` of length <= 128 - at `$.id`",
        ),
        (
            b'{"type":"cancel","id":"a","job_id":"j","reason":"%b"}' % (b"r" * 501),
            "expected `str` of length <= 500 - at `$.reason`",
        ),
    ],
)
def test_read_of_anything_else_says_what_is_not_valid(data: bytes, reason: str) -> None:
    """No reason repeats a value, which may be a token or a prompt."""
    with pytest.raises(BadFrame) as refused:
        read(data, SUBMIT_BYTES)

    assert str(refused.value) == reason


@pytest.mark.parametrize(
    ("around", "limit"),
    [
        (b'{"type":"auth","token":"%b"}', MAX_FRAME_BYTES),
        (b'{"type":"submit","id":"a","job":{"x":"%b"}}', SUBMIT_BYTES),
    ],
)
def test_read_of_a_message_over_the_limit_of_its_type_raises_overflow(around: bytes, limit: int) -> None:
    """A submission may be larger than the others; each may be as large as its limit."""
    fits = around % (b"x" * (limit - len(around % b"")))
    assert len(fits) == limit
    read(fits, SUBMIT_BYTES)
    with pytest.raises(OverflowError):
        read(fits + b" ", SUBMIT_BYTES)
