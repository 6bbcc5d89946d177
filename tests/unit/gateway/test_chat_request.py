"""Bodies and headers of chat-completions requests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamworker.gateway.chat_request import ChatRequest, InvalidChatRequest, read_request

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def read(
    body: bytes | dict[str, Any] | None = None, on_disconnect: str = "cancel", **headers: str
) -> ChatRequest:
    """Read a request; header names have underscores here."""
    raw = body if type(body) is bytes else json.dumps(body or BODY).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_request(raw, named, timeout_s=600, on_disconnect=on_disconnect)


def faults(body: bytes | dict[str, Any] | None = None, **headers: str) -> list[str]:
    """Return what is wrong with a request."""
    with pytest.raises(InvalidChatRequest) as raised:
        read(body, **headers)
    return raised.value.faults


def test_body_is_kept_byte_for_byte() -> None:
    """Order, blanks, numbers of any size and unknown members."""
    raw = b' {"n": 1.0e3, "messages":[1], "seed":123456789012345678901, "model" : "m", "x": {"y": null}}\n'

    assert bytes(read(raw).body) == raw


@pytest.mark.parametrize(
    ("members", "stream", "usage"),
    [
        ({}, False, False),
        ({"stream": None}, False, False),
        ({"stream": False}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": None}, True, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ({"stream": True, "stream_options": {"include_usage": None, "x": 1}}, True, False),
    ],
)
def test_stream_and_usage_are_as_asked_for(members: dict[str, Any], stream: bool, usage: bool) -> None:
    """Absent and null are false."""
    request = read(BODY | members)

    assert (request.model, request.is_stream, request.include_usage) == ("m", stream, usage)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff{}", "the body is not UTF-8 (byte 0)"),
        (b"[]", "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
        (b'"text"', "the body is not a JSON object"),
        (b"[" * 1000 + b"]" * 1000, "nested too deeply"),
        (b'{"model":NaN}', "the body is not JSON"),
    ],
)
def test_body_that_is_not_an_object_is_refused(body: bytes, fault: str) -> None:
    """The fault never repeats the body."""
    assert fault in faults(body)[0]


def test_every_fault_is_named() -> None:
    """All at once, with their paths; the first one is `param`."""
    body = {"messages": [], "stream": "yes", "stream_options": {"include_usage": 1}}
    with pytest.raises(InvalidChatRequest) as raised:
        read(body, Streamworker_Timeout="soon", Streamworker_On_Disconnect="stop")

    assert raised.value.param == "model"
    assert raised.value.faults == [
        "model: is required: a non-empty string",
        "messages: is required: a non-empty array",
        "stream: is neither true nor false",
        "stream_options.include_usage: is neither true nor false",
        "Streamworker-Timeout: is not a positive number of seconds",
        "Streamworker-On-Disconnect: is neither cancel nor continue",
    ]
    assert str(raised.value) == "; ".join(raised.value.faults)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": []}, "stream_options"),
    ],
)
def test_member_of_another_type_is_a_fault(members: dict[str, Any], fault: str) -> None:
    """Members that the gateway acts on are checked; others are the upstream's business."""
    [named] = faults(BODY | members)

    assert named.startswith(f"{fault}: ")


def test_body_with_a_half_of_a_character_is_accepted() -> None:
    """A lone surrogate escape is JSON; a worker repairs it."""
    raw = b'{"model":"m","messages":[{"role":"user","content":"\\ud83d"}]}'

    assert bytes(read(raw).body) == raw


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, 600), ("5", 5), ("0.5", 0.5), (" 30 ", 30), ("601", 600), ("1e9", 600), ("600", 600)],
)
def test_timeout_is_lowered_by_the_header(header: str | None, expected: float) -> None:
    """It cannot be raised above the setting."""
    request = read() if header is None else read(Streamworker_Timeout=header)

    assert request.timeout_s == expected


@pytest.mark.parametrize("header", ["", "0", "-1", "nan", "inf", "-inf", "5s", "1_0", "٥", "0x5", "soon"])
def test_timeout_that_is_not_a_positive_number_is_a_fault(header: str) -> None:
    """A client that misspells it does not wait for ten minutes."""
    [fault] = faults(Streamworker_Timeout=header)

    assert fault == "Streamworker-Timeout: is not a positive number of seconds"


@pytest.mark.parametrize("default", ["cancel", "continue"])
@pytest.mark.parametrize(("header", "cancels"), [("cancel", True), ("continue", False), (" Cancel ", True)])
def test_header_decides_what_a_disconnect_does(default: str, header: str, cancels: bool) -> None:
    """Without it the setting does."""
    assert read(on_disconnect=default, Streamworker_On_Disconnect=header).cancels is cancels
    assert read(on_disconnect=default).cancels is (default == "cancel")
