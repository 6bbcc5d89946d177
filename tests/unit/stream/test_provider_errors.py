"""Errors of upstreams in every known shape."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from streamworker.model import ErrorCode, StreamError
from streamworker.stream.provider_errors import (
    body_error,
    error_in,
    error_of_body,
    has_words,
    http_error,
    is_retriable,
    may_be_error,
    to_job_error,
)
from streamworker.text import RAW_TEXT_LIMIT, truncate


@pytest.mark.parametrize(
    ("payload", "message", "status", "kind"),
    [
        pytest.param(
            {"error": {"message": "m", "type": "server_error", "param": None, "code": None}},
            "m",
            None,
            "server_error",
            id="openai",
        ),
        pytest.param(
            {"error": {"message": "m", "type": "t", "code": "insufficient_quota"}},
            "m",
            None,
            "insufficient_quota",
            id="openai with a code",
        ),
        pytest.param(
            {"error": {"message": "m", "type": "BadRequestError", "param": None, "code": 400}},
            "m",
            400,
            "BadRequestError",
            id="vllm",
        ),
        pytest.param(
            {"error": {"object": "error", "message": "m", "code": 400}}, "m", 400, None, id="sglang"
        ),
        pytest.param(
            {"object": "error", "message": "m", "type": "t", "code": 400},
            "m",
            400,
            "t",
            id="older vllm, flat",
        ),
        pytest.param(
            {"type": "error", "message": "m", "code": 529}, "m", 529, "error", id="flat, by its type"
        ),
        pytest.param({"error": {"code": 500, "message": "m", "type": "t"}}, "m", 500, "t", id="llama.cpp"),
        pytest.param(
            {"error": {"code": "server_error", "message": "m"}, "choices": [{"finish_reason": "error"}]},
            "m",
            None,
            "server_error",
            id="openrouter",
        ),
        pytest.param({"error": "m", "error_type": "generation"}, "m", None, "generation", id="tgi, a string"),
        pytest.param({"code": "c", "error": "m"}, "m", None, "c", id="xai, a string and a code"),
        pytest.param({"code": 503, "error": "m"}, "m", 503, None, id="a string and a number"),
        pytest.param({"choices": [{}], "x_groq": {"error": "m"}}, "m", None, None, id="groq"),
        pytest.param(
            {"error": {"message": "m", "type": "None", "param": "None", "code": "500"}},
            "m",
            500,
            None,
            id="litellm",
        ),
        pytest.param({"error": {"detail": "m"}}, "m", None, None, id="detail"),
        pytest.param(
            {"error": {"msg": "m", "code": "700"}}, "m", None, None, id="a number that is not a status"
        ),
        pytest.param(
            {"error": {"error": "m", "code": True}}, "m", None, None, id="a boolean is not a number"
        ),
        pytest.param({"error": {"a": 1}}, '{"a":1}', None, None, id="an object without a message"),
        pytest.param({"error": {"message": ["m"]}}, '["m"]', None, None, id="a message that is not a string"),
        pytest.param({"error": ["m"]}, "m", None, None, id="a list"),
        pytest.param({"error": [5]}, "[5]", None, None, id="a list without words"),
        pytest.param({"error": True}, "true", None, None, id="a boolean"),
        pytest.param({"error": "a", "message": "b"}, "a: b", None, None, id="two texts"),
        pytest.param({"error": "a b", "message": "b"}, "a b", None, None, id="one text inside of the other"),
        pytest.param(
            {"choices": [{"error": {"code": 502, "message": "m"}}]}, "m", 502, None, id="in a choice"
        ),
        pytest.param(
            {"choices": None, "error_type": "t", "error_message": "m"},
            "m",
            None,
            "t",
            id="members with a prefix",
        ),
        pytest.param({"errorCode": "c", "errorMessage": "m"}, "m", None, "c", id="members in camel case"),
        pytest.param({"errcode": 40001, "errmsg": "m"}, "m", None, None, id="members without an underscore"),
        pytest.param(
            {"base_resp": {"status_code": 1008, "status_msg": "m"}}, "m", 402, "1008", id="minimax, no money"
        ),
        pytest.param(
            {"base_resp": {"status_code": 1000, "status_msg": "m"}}, "m", 500, None, id="minimax, unknown"
        ),
        pytest.param(
            {"base_resp": {"status_code": "1004", "status_msg": "m"}}, "m", 401, None, id="minimax, digits"
        ),
        pytest.param({"detail": "m"}, "m", None, None, id="fastapi"),
        pytest.param(
            {"code": "InvalidParameter", "message": "m"}, "m", None, "InvalidParameter", id="dashscope"
        ),
        pytest.param(
            {"code": 429, "message": "m", "choices": []}, "m", 429, None, id="a number beside a message"
        ),
        pytest.param(
            {"success": False, "errors": [{"code": 1, "message": "m"}]}, "m", None, None, id="cloudflare"
        ),
        pytest.param(
            {"success": False, "errors": ["m", {"message": "n"}]}, "m", None, None, id="a list of texts"
        ),
        pytest.param({"success": False, "msg": "m"}, "m", None, None, id="no success"),
        pytest.param(
            {"choices": [{"delta": {}}], "error_code": 1305, "error_msg": "m"},
            "m",
            None,
            None,
            id="members with a prefix beside choices",
        ),
        pytest.param(
            {"choices": [{"delta": {}}], "code": 10013, "message": "m"},
            "m",
            None,
            None,
            id="a failing number beside choices",
        ),
        pytest.param(
            {"choices": [{"delta": {}}], "code": "10013", "message": "m"},
            "m",
            None,
            None,
            id="the digits of a failing number beside choices",
        ),
        pytest.param(
            {"choices": [{"delta": {"error": {"message": "m", "code": 500}}}]},
            "m",
            500,
            None,
            id="in a delta",
        ),
        pytest.param({"choices": [{"message": {"error": "m"}}]}, "m", None, None, id="in a message"),
        pytest.param(
            {"choices": [{"delta": {}}], "success": False, "message": "m"},
            "m",
            None,
            None,
            id="no success beside choices",
        ),
        pytest.param(
            {"error": {"code": 503, "error": {"message": "m"}}}, "m", 503, None, id="words in a deeper object"
        ),
        pytest.param(
            {"error": {"code": 503, "error": {"message": "m", "code": 400, "type": "t"}}},
            "m",
            400,
            "t",
            id="the deeper object says more",
        ),
        pytest.param({"detail": {"error": "m"}}, "m", None, None, id="a detail that is an object"),
        pytest.param({"status": "failed", "message": "m"}, "m", None, None, id="a status in words"),
        pytest.param({"statusCode": 500, "message": "m"}, "m", 500, None, id="a status in a number"),
        pytest.param({"message": "m", "request_id": "1"}, "m", None, None, id="a message alone"),
        pytest.param({"fault": {"faultstring": "m"}}, "m", None, None, id="apigee"),
        pytest.param(
            {"fault": {"faultstring": "m", "detail": {"errorcode": "e"}}},
            "m",
            None,
            None,
            id="apigee, a code",
        ),
    ],
)
def test_error_in_every_known_shape_is_read(
    payload: dict[str, Any], message: str, status: int | None, kind: str | None
) -> None:
    """Message, status and kind are found wherever they are; the frame is what was sent."""
    frame = msgspec.json.encode(payload).decode()

    assert error_in(payload, "message") == StreamError(message, frame, status, kind)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"error": None},
        {"error": {}},
        {"error": ""},
        {"error": [], "choices": []},
        {"x_groq": {"error": None}},
        {"x_groq": {"id": "r"}},
        {"x_groq": "error"},
        {"object": "chat.completion.chunk", "message": "m"},
        {"moderation": {"output": {"type": "error"}}},
        {"error": {"message": "", "type": "", "param": "", "code": None}},
        {"error": {"message": "", "code": 0}},
        {"error": {"message": "Success", "code": "0"}},
        {"error": {"message": "None", "type": "None"}},
        {"error": [{"message": ""}]},
        {"error": " "},
        {"choices": [{"error": {}}, {"error": None}, 5]},
        {"code": 0, "message": "Success"},
        {"code": 200, "message": "fine", "sid": "1"},
        {"base_resp": {"status_code": 0, "status_msg": ""}},
        {"base_resp": "error"},
        {"success": True, "errors": [], "message": "m", "result": 1},
        {"status": "completed", "message": "m"},
        {"type": "progress", "message": "loading"},
        {"error_count": 1, "error_code": 0, "error_message": None},
        {"code": "x", "choices": [{"delta": {}}], "message": "m"},
        {"message": {"role": "assistant"}, "id": "1"},
    ],
)
def test_error_in_empty_members_is_none(payload: dict[str, Any]) -> None:
    """An empty `error` member is not an error."""
    assert error_in(payload, "message") is None


def test_error_in_event_called_error_is_the_object_itself() -> None:
    """A flat object is an error if its event is called `error`, unless it has choices."""
    assert error_in({"message": "m", "code": 429}, "error") == StreamError(
        "m", '{"message":"m","code":429}', 429, None
    )
    assert error_in({"message": "m", "choices": [{}]}, "error") is None


@pytest.mark.parametrize(
    ("body", "message", "status", "kind"),
    [
        (b'{"error":{"message":"m","code":"c"}}', "m", None, "c"),
        (b'{"error":"Unauthorized"}', "Unauthorized", None, None),
        (b'{"object":"error","message":"m","code":404}', "m", 404, None),
        (b'{"detail":"Not Found"}', "Not Found", None, None),
        (b'{"detail":[{"loc":["body"]}]}', '[{"loc":["body"]}]', None, None),
        (b'{"message":"m","id":"i"}', "m", None, None),
        (b'{"message":"m","choices":[1]}', "m", None, None),
        (b'[{"error":{"message":"m","code":429,"status":"RESOURCE_EXHAUSTED"}}]', "m", 429, None),
        (
            b'{"error":{"message":"m","type":"insufficient_quota","code":"x"}}',
            "m",
            None,
            "insufficient_quota",
        ),
        (b'{"error":{"message":"m","type":"Not_Found_Error","code":"x"}}', "m", None, "Not_Found_Error"),
        (b'data: {"error":{"message":"m","code":"c"}}\n\ndata: [DONE]\n\n', "m", None, "c"),
        (b'event: error\ndata: {"message":"m"}', "m", None, None),
        (b": busy\n\ndata: later\n\n", ": busy\n\ndata: later", None, None),
        (
            b'{"object": "chat.completion", "choices": [{}]}',
            '{"object": "chat.completion", "choices": [{}]}',
            None,
            None,
        ),
        (b'{"error": {"a": 1}}', '{"a":1}', None, None),
        (b"<html> bad gateway </html>\n", "<html> bad gateway </html>", None, None),
        (b"[]", "[]", None, None),
        (b"5", "5", None, None),
        (b"[5]", "[5]", None, None),
        (b"\xff", "\ufffd", None, None),
        (b"", "", None, None),
    ],
)
def test_error_of_body_reads_json_html_text_and_nothing(
    body: bytes, message: str, status: int | None, kind: str | None
) -> None:
    """Every body gives a message, and its text is the frame."""
    assert error_of_body(body) == StreamError(message, body.decode("utf-8", "replace"), status, kind)


@pytest.mark.parametrize(
    ("status", "body", "code", "retriable"),
    [
        (400, b"{}", ErrorCode.UPSTREAM_REJECTED, False),
        (401, b"{}", ErrorCode.AUTH, False),
        (403, b"{}", ErrorCode.AUTH, False),
        (404, b"{}", ErrorCode.UPSTREAM_REJECTED, False),
        (408, b"{}", ErrorCode.UPSTREAM_REJECTED, True),
        (409, b"{}", ErrorCode.UPSTREAM_REJECTED, True),
        (429, b"{}", ErrorCode.RATE_LIMITED, True),
        (429, b'{"error":{"code":"insufficient_quota"}}', ErrorCode.QUOTA, False),
        (429, b'{"error":{"type":"insufficient_quota","code":"429"}}', ErrorCode.QUOTA, False),
        (429, b'{"error":{"type":"invalid_request_error"}}', ErrorCode.RATE_LIMITED, True),
        (
            503,
            b'{"error":{"type":"busy","code":"invalid_request_error"}}',
            ErrorCode.UPSTREAM_UNAVAILABLE,
            True,
        ),
        (400, b'{"error":{"type":"busy"}}', ErrorCode.UPSTREAM_REJECTED, False),
        (500, b"{}", ErrorCode.UPSTREAM_UNAVAILABLE, True),
        (529, b"{}", ErrorCode.UPSTREAM_UNAVAILABLE, True),
        (302, b"{}", ErrorCode.UPSTREAM_UNAVAILABLE, True),
    ],
)
def test_http_error_maps_status_to_code_and_to_whether_it_may_succeed_later(
    status: int, body: bytes, code: ErrorCode, retriable: bool
) -> None:
    """The status decides, unless the body says that retrying does not help."""
    error = http_error(status, body)

    assert (error.code, error.http_status, error.retriable) == (code, status, retriable)


def test_http_error_with_empty_body_states_the_status() -> None:
    """An empty body gives a message with the status and no frame."""
    error = http_error(502, b"")

    assert (error.message, error.upstream) == ("the upstream answered 502 with an empty body", None)


@pytest.mark.parametrize(
    ("sent", "code", "retriable"),
    [
        (StreamError("m", "f"), ErrorCode.UPSTREAM_ERROR, True),
        (StreamError("m", "f", 400), ErrorCode.UPSTREAM_ERROR, False),
        (StreamError("m", "f", 429), ErrorCode.UPSTREAM_ERROR, True),
        (StreamError("m", "f", 500, "BadRequestError"), ErrorCode.UPSTREAM_ERROR, False),
        (StreamError("m", "f", protocol=True), ErrorCode.UPSTREAM_PROTOCOL, True),
    ],
)
def test_to_job_error_keeps_the_upstreams_words(sent: StreamError, code: ErrorCode, retriable: bool) -> None:
    """An error inside a 200 stream keeps the response's own status."""
    error = to_job_error(sent)

    assert (error.code, error.message, error.http_status, error.upstream) == (code, "m", 200, "f")
    assert error.retriable is retriable


def test_is_retriable_kind_is_compared_without_case() -> None:
    """Providers write kinds in upper and lower case."""
    assert not is_retriable(500, "Context_Length_Exceeded")
    assert is_retriable(500, "anything_else")


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "abc"),
        ("🐟🐟", 7, "🐟"),
        ("🐟", 3, ""),
        ("a\ud83d", 2, "a\ud83d"),
        ("üü", 3, "ü"),
    ],
)
def test_truncate_never_splits_a_character(text: str, limit: int, short: str) -> None:
    """The limit is in bytes, and the cut is between characters."""
    assert truncate(text, limit) == short


def test_error_in_long_frames_and_messages_is_cut() -> None:
    """An upstream cannot make a terminal event large."""
    error = error_in({"error": {"message": "🐟" * 5000}}, "message")

    assert error is not None
    assert len(error.message.encode()) == RAW_TEXT_LIMIT
    assert RAW_TEXT_LIMIT - 4 < len(error.frame.encode()) <= RAW_TEXT_LIMIT


@pytest.mark.parametrize(
    ("error", "after_s"),
    [
        ({"message": "Please try again in 1.2s."}, 1.2),
        ({"message": "Try again in 6m0s"}, 360.0),
        ({"message": "please retry after 20 seconds"}, 20.0),
        ({"message": "Please retry in 32.5s."}, 32.5),
        ({"message": "retry in 120ms"}, 0.12),
        ({"message": "wait 5 minutes"}, 300.0),
        ({"message": "try again later"}, None),
        ({"message": "retry 3 times"}, None),
        ({"message": "m" * 400 + " try again in 2s"}, None),
        ({"message": "m", "retry_after": 3}, 3.0),
        ({"message": "m", "retry_after_ms": 250}, 0.25),
        ({"message": "m", "details": [{"retryDelay": "7s"}]}, 7.0),
        ({"message": "m", "metadata": {"headers": {"Retry-After": "9"}}}, 9.0),
        ({"message": "m", "retry_after": "soon"}, None),
        ({"message": "m", "retry_after": -1}, None),
    ],
)
def test_error_in_names_the_delay_before_the_next_call(error: dict[str, Any], after_s: float | None) -> None:
    """As a member, in Google's RetryInfo, or in words near the beginning of the message."""
    found = error_in({"error": error}, "message")

    assert found is not None
    assert found.retry_after_s == after_s
    assert to_job_error(found).retry_after_ms == (
        msgspec.UNSET if after_s is None else math.ceil(after_s * 1000)
    )


@pytest.mark.parametrize(
    ("content_type", "body", "code", "message", "retriable"),
    [
        ("application/json", b'{"error":{"message":"m"}}', "upstream_protocol", "m", True),
        ("text/event-stream", b'{"error":{"message":"m"}}', "upstream_error", "m", True),
        ("text/event-stream; x", b'{"error":{"message":"m","code":400}}', "upstream_error", "m", False),
        (
            "application/json",
            b'{"error":{"message":"insufficient balance"}}',
            "upstream_protocol",
            "insufficient balance",
            False,
        ),
        (
            "text/html",
            b"<p>",
            "upstream_protocol",
            "the upstream answered with text/html instead of an event stream",
            False,
        ),
        (
            "",
            b"",
            "upstream_protocol",
            "the upstream answered with no content type instead of an event stream",
            False,
        ),
    ],
)
def test_body_error_of_a_success_response(
    content_type: str, body: bytes, code: str, message: str, retriable: bool
) -> None:
    """The upstream's own words if there are any, else what it sent instead of a stream."""
    error = body_error(200, content_type, body)

    assert (error.code, error.message, error.retriable) == (code, message, retriable)


def test_body_error_of_another_success_names_its_status() -> None:
    """A job that was accepted for later gives no answer."""
    error = body_error(202, "application/json", b'{"id":1}')

    assert error.message == "the upstream answered 202 with application/json instead of an event stream"
    assert (error.http_status, error.retriable) == (202, False)


@pytest.mark.parametrize(
    ("payload", "event_type", "expected"),
    [
        ({"code": "InternalError", "message": "m"}, "message", True),
        ({"status": "failed", "message": "m"}, "message", True),
        ({"detail": "m"}, "message", True),
        ({"exception": "m"}, "message", True),
        ({}, "error", True),
        ({}, "message", False),
        ({"message": "m"}, "message", False),
        ({"code": "0", "message": "m"}, "message", False),
        ({"code": "200", "message": "m"}, "message", False),
        ({"code": "ok", "message": "m"}, "message", False),
        ({"code": "InternalError", "message": "Success"}, "message", False),
        ({"code": "InternalError", "message": {"role": "assistant"}}, "message", False),
        ({"detail": {}}, "message", False),
    ],
)
def test_chunk_that_may_be_an_error_has_a_name_and_words(
    payload: dict[str, Any], event_type: str, expected: bool
) -> None:
    """Whether it is one, the rest of the stream shows."""
    assert may_be_error(payload | {"choices": [{"delta": {}}]}, event_type) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", True),
        ("", False),
        (1.5, False),
        (None, False),
        ([1, ["a"]], True),
        ({"a": {"b": 1}}, False),
        ({}, False),
    ],
)
def test_words_are_texts_at_any_depth(value: Any, expected: bool) -> None:
    """Names of members are not words."""
    assert has_words(value) is expected
