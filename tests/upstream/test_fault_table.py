"""The result of a job when its upstream fails: one table, played with sockets against the real client.

A row is played on every call of one job, which may make three. It states the number of tries, the wait before each
further try, the terminal event's `error.code`, `error.retriable` and `status`, and words of the upstream in the error's
message. Time is simulated.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager
from email.utils import formatdate
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from streamworker.model import ErrorCode, Status
from tests.streams import NOW, chunk, data
from tests.turnable import SocketLoop, run
from tests.upstream.one_job import CONNECT_S, FIRST_DELTA_S, IDLE_S, Outcome, run_job
from tests.upstream.raw import EVENT_STREAM, Peer, chunked, response, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractContextManager

MAX_TRIES = 3
PING_S = 10.0
DONE = data(b"[DONE]")
ROLE = data(chunk({"role": "assistant"}))
WORD = data(chunk({"content": "half "}))
FINISH = data(chunk({}, "stop"))
JSON = b"content-type: application/json\r\n"
HTML = b"<html><h1>Bad gateway</h1></html>"
COMPLETION = json.dumps({"object": "chat.completion", "choices": [{"message": {"content": "all"}}]}).encode()

REJECTED, AUTH, LIMITED = ErrorCode.UPSTREAM_REJECTED, ErrorCode.AUTH, ErrorCode.RATE_LIMITED
QUOTA = ErrorCode.QUOTA
UNAVAILABLE, PROTOCOL, ERROR = (
    ErrorCode.UPSTREAM_UNAVAILABLE,
    ErrorCode.UPSTREAM_PROTOCOL,
    ErrorCode.UPSTREAM_ERROR,
)
TRUNCATED, NO_DELTA, IDLE = ErrorCode.TRUNCATED, ErrorCode.TIMEOUT_FIRST_DELTA, ErrorCode.TIMEOUT_IDLE
COMPLETED, FAILED, INTERRUPTED = Status.COMPLETED, Status.FAILED, Status.INTERRUPTED


# The parts of a row


class Then(Enum):
    """What the server does after it has sent its bytes."""

    WAIT = "for the next call on the same connection, in silence"
    CLOSE = "the connection is closed (FIN)"
    RESET = "the connection is reset (RST)"
    PING = "comments for ever"


class Act(NamedTuple):
    """The response to one call."""

    says: bytes = b""
    then: Then = Then.WAIT


class Delay(NamedTuple):
    """The bounds of each wait between two tries, in seconds. With `doubles` the upper bound doubles per try."""

    least: float
    most: float
    doubles: bool = False


NONE = None
BACKOFF = Delay(0, 1, doubles=True)
HELD = Delay(0, 0)
"""The job's own backoff where the upstream is held or limited: the queue decides when the next call is made."""

HELD_CALLS = 6
"""Calls of a job that waits for 60 s: one per probe, or one per pause."""


def after(seconds: float, within: float = 0.0) -> Delay:
    """Return the wait that the upstream asked for; `within` is what a date in whole seconds loses."""
    return Delay(seconds - within - 1e-6, seconds + 1e-6)


class Row(NamedTuple):
    """What the upstream does on every call, and the expected result."""

    act: Act | Callable[[], Act]
    tries: int
    delay: Delay | None
    code: ErrorCode | None
    retriable: bool = False
    status: Status = FAILED
    words: str | None = None
    http_status: int | None = None
    frame: str | None = None


def refused(status: int, body: bytes = b"{}", headers: bytes = JSON) -> Act:
    """Return a response with a Content-Length."""
    return Act(response(status, body, headers))


def advised(status: int, *headers: bytes, body: bytes = b"{}") -> Act:
    """Return a response with headers about another try."""
    return refused(status, body, JSON + b"".join(header + b"\r\n" for header in headers))


def stream(*events: bytes, ends: bool = True, then: Then = Then.WAIT) -> Act:
    """Return an event stream with chunked coding, whose body is complete or not."""
    return Act(chunked(*events, ends=ends), then)


def until_close(*events: bytes) -> Act:
    """Return an event stream that ends with the connection, so that any end looks complete."""
    head = b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"connection: close\r\n\r\n"
    return Act(head + b"".join(events), Then.CLOSE)


def of_length(length: int, body: bytes) -> Act:
    """Return an event stream with a Content-Length."""
    head = b"HTTP/1.1 200 OK\r\n" + EVENT_STREAM + b"content-length: %d\r\n\r\n" % length
    return Act(head + body, Then.CLOSE)


# The rows: before the response

NO_ANSWER = {
    "close before the head": Row(Act(b"", Then.CLOSE), 3, BACKOFF, UNAVAILABLE, True),
    "reset before the head": Row(Act(b"", Then.RESET), 3, BACKOFF, UNAVAILABLE, True),
    "close inside the head": Row(Act(b"HTTP/1.1 200 O", Then.CLOSE), 3, BACKOFF, UNAVAILABLE, True),
    "reset inside the head": Row(Act(b"HTTP/1.1 200 O", Then.RESET), 3, BACKOFF, UNAVAILABLE, True),
    "silence before the head": Row(Act(), 3, BACKOFF, NO_DELTA, True),
    "no HTTP": Row(Act(b"220 smtp.example ESMTP\r\n\r\n"), 1, NONE, PROTOCOL),
}

# The status

STATUSES = {
    "201": Row(refused(201), 1, NONE, PROTOCOL, http_status=201),
    "204": Row(refused(204, b"", EVENT_STREAM), 1, NONE, PROTOCOL, http_status=204),
    "301": Row(refused(301), 1, NONE, PROTOCOL, http_status=301),
    "307": Row(refused(307), 1, NONE, PROTOCOL, http_status=307),
    "400": Row(refused(400), 1, NONE, REJECTED, http_status=400),
    "401": Row(refused(401), HELD_CALLS, HELD, AUTH, http_status=401),
    "402": Row(refused(402), 1, NONE, QUOTA, http_status=402),
    "403": Row(refused(403), 1, NONE, AUTH, http_status=403),
    "404": Row(refused(404), 1, NONE, REJECTED, http_status=404),
    "408": Row(refused(408), 3, BACKOFF, REJECTED, True, http_status=408),
    "409": Row(refused(409), 3, BACKOFF, REJECTED, True, http_status=409),
    "424": Row(refused(424), 3, BACKOFF, REJECTED, True, http_status=424),
    "425": Row(refused(425), 3, BACKOFF, REJECTED, True, http_status=425),
    "499": Row(refused(499), 3, BACKOFF, REJECTED, True, http_status=499),
    "498": Row(refused(498), 1, NONE, REJECTED, http_status=498),
    "498 for lack of capacity": Row(
        refused(498, b'{"error":{"message":"flex tier capacity exceeded"}}'), 3, BACKOFF, REJECTED, True
    ),
    "413": Row(refused(413), 1, NONE, REJECTED, http_status=413),
    "422": Row(refused(422), 1, NONE, REJECTED, http_status=422),
    "429": Row(refused(429), HELD_CALLS, HELD, LIMITED, True, http_status=429),
    "500": Row(refused(500), 3, BACKOFF, UNAVAILABLE, True, http_status=500),
    "502": Row(refused(502), 3, BACKOFF, UNAVAILABLE, True, http_status=502),
    "503": Row(refused(503), 3, BACKOFF, UNAVAILABLE, True, http_status=503),
    "504": Row(refused(504), 3, BACKOFF, UNAVAILABLE, True, http_status=504),
    "524": Row(refused(524), 3, BACKOFF, UNAVAILABLE, True, http_status=524),
    "529": Row(refused(529), 3, BACKOFF, UNAVAILABLE, True, http_status=529),
}

# The headers about another try


def dated(seconds: float, status: int = 503) -> Callable[[], Act]:
    """Return a response with an HTTP date this far from now."""
    return lambda: advised(status, b"retry-after: " + formatdate(time.time() + seconds, usegmt=True).encode())


def busy(*headers: bytes) -> Act:
    return advised(503, *headers)


HEADERS = {
    "retry-after in seconds": Row(busy(b"retry-after: 7"), 3, after(7), UNAVAILABLE, True),
    "retry-after with a fraction": Row(busy(b"retry-after: 1.5"), 3, after(1.5), UNAVAILABLE, True),
    "retry-after with blanks": Row(busy(b"retry-after:   2  "), 3, after(2), UNAVAILABLE, True),
    "retry-after on a 429": Row(advised(429, b"retry-after: 3"), HELD_CALLS, HELD, LIMITED, True),
    "retry-after-ms": Row(busy(b"retry-after-ms: 250.5"), 3, after(0.2505), UNAVAILABLE, True),
    "retry-after-ms goes first": Row(
        busy(b"retry-after: 9", b"retry-after-ms: 40"), 3, after(0.04), UNAVAILABLE, True
    ),
    "retry-after-ms that is none": Row(
        busy(b"retry-after: 9", b"retry-after-ms: soon"), 3, after(9), UNAVAILABLE, True
    ),
    "retry-after at a date": Row(dated(30), 3, after(30, within=2.5), UNAVAILABLE, True),
    "retry-after at a date gone by": Row(dated(-3600), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after at once": Row(busy(b"retry-after: 0"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after at a date too far": Row(dated(3600), 1, NONE, UNAVAILABLE, True),
    "retry-after of nan": Row(busy(b"retry-after: nan"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after of inf": Row(busy(b"retry-after: inf"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after of 1e400": Row(busy(b"retry-after: 1e400"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after below zero": Row(busy(b"retry-after: -5"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after of words": Row(busy(b"retry-after: later"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after of nothing": Row(busy(b"retry-after: "), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after-ms of nan": Row(busy(b"retry-after-ms: nan"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after-ms below zero": Row(busy(b"retry-after-ms: -1"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after at the longest": Row(busy(b"retry-after: 120"), 3, after(120), UNAVAILABLE, True),
    "retry-after beyond the longest": Row(busy(b"retry-after: 120.5"), 1, NONE, UNAVAILABLE, True),
    "retry-after-ms beyond the longest": Row(busy(b"retry-after-ms: 120500"), 1, NONE, UNAVAILABLE, True),
    "retry-after of a million": Row(busy(b"retry-after: 1000000"), 1, NONE, UNAVAILABLE, True),
    "retry-after where nothing helps": Row(advised(400, b"retry-after: 1"), 1, NONE, REJECTED),
    "x-should-retry false": Row(busy(b"x-should-retry: false"), 1, NONE, UNAVAILABLE, True),
    "x-should-retry true": Row(advised(404, b"x-should-retry: TRUE"), 3, BACKOFF, REJECTED),
    "x-should-retry true of a bad request": Row(advised(400, b"x-should-retry: true"), 3, BACKOFF, REJECTED),
    "x-should-retry true of a refused key": Row(
        advised(401, b"x-should-retry: true"), HELD_CALLS, HELD, AUTH
    ),
    "x-should-retry false of a limit": Row(advised(429, b"x-should-retry: false"), 1, NONE, LIMITED, True),
    "x-should-retry true with a delay": Row(
        advised(404, b"x-should-retry: true", b"retry-after: 4"), 3, after(4), REJECTED
    ),
    "x-should-retry true with a delay too long": Row(
        busy(b"x-should-retry: true", b"retry-after: 600"), 1, NONE, UNAVAILABLE, True
    ),
    "x-should-retry of something else": Row(busy(b"x-should-retry: maybe"), 3, BACKOFF, UNAVAILABLE, True),
    "retry-after sent twice": Row(busy(b"retry-after: 2", b"retry-after: 2"), 3, after(2), UNAVAILABLE, True),
    "retry-after sent twice with different delays": Row(
        busy(b"retry-after: 1", b"retry-after: 3"), 3, after(3), UNAVAILABLE, True
    ),
    "retry-after with a unit": Row(busy(b"retry-after: 2s"), 3, after(2), UNAVAILABLE, True),
    "retry-after in minutes": Row(busy(b"retry-after: 1m30s"), 3, after(90), UNAVAILABLE, True),
    "resets of a limit": Row(
        advised(429, b"x-ratelimit-reset-requests: 1s", b"x-ratelimit-reset-tokens: -1"),
        HELD_CALLS,
        HELD,
        LIMITED,
        True,
    ),
    "resets of the limit that is used up": Row(
        advised(
            429,
            b"x-ratelimit-remaining-requests: 9",
            b"x-ratelimit-reset-requests: 1s",
            b"x-ratelimit-remaining-tokens: 0",
            b"x-ratelimit-reset-tokens: 0m25s",
        ),
        3,
        HELD,
        LIMITED,
        True,
    ),
    "resets beyond the longest": Row(
        advised(429, b"x-ratelimit-reset-requests: 6m0s", b"x-ratelimit-reset-tokens: -1"),
        1,
        HELD,
        LIMITED,
        True,
    ),
    "resets beside a retry-after": Row(
        advised(429, b"retry-after: 3", b"x-ratelimit-reset-requests: 6m0s"), HELD_CALLS, HELD, LIMITED, True
    ),
    "resets without a limit": Row(busy(b"x-ratelimit-reset-requests: 6m0s"), 3, BACKOFF, UNAVAILABLE, True),
}

# The body of an error

BODIES = {
    "openai": (b'{"error":{"message":"m","type":"server_error","param":null,"code":null}}', "m"),
    "a numeric code": (b'{"error":{"message":"m","type":"t","param":null,"code":503}}', "m"),
    "a code in digits": (b'{"error":{"message":"m","type":"None","param":"None","code":"503"}}', "m"),
    "an error string": (b'{"error":"m"}', "m"),
    "tgi": (b'{"error":"m","error_type":"overloaded"}', "m"),
    "flat": (b'{"object":"error","message":"m","type":"t","param":null,"code":503}', "m"),
    "detail": (b'{"detail":"m"}', "m"),
    "detail in a list": (b'{"detail":[{"loc":["body"],"msg":"m"}]}', '[{"loc":["body"],"msg":"m"}]'),
    "message and id": (b'{"message":"m","id":"req_1"}', "m"),
    "anthropic": (b'{"type":"error","error":{"type":"overloaded_error","message":"m"}}', "m"),
    "google, in an array": (b'[{"error":{"code":503,"message":"m","status":"UNAVAILABLE"}}]', "m"),
    "an array of nothing": (b"[]", "[]"),
    "a string": (b'"m"', '"m"'),
    "html": (HTML, HTML.decode()),
    "text": (b"upstream request timeout\n", "upstream request timeout"),
    "an event stream": (b'data: {"error":{"message":"m"}}\n\ndata: [DONE]\n\n', "m"),
    "an event stream with an event called error": (b'event: error\ndata: {"message":"m"}\n\n', "m"),
    "nothing": (b"", "the upstream answered 503 with an empty body"),
    "no text": (b"\xff\xfe", "\ufffd\ufffd"),
    "json cut off": (b'{"error":{"mess', '{"error":{"mess'),
}
SHAPES = {
    f"503: {name}": Row(refused(503, body), 3, BACKOFF, UNAVAILABLE, True, words=words, http_status=503)
    for name, (body, words) in BODIES.items()
}
NO_CREDIT = b'{"error":{"message":"m","type":"insufficient_quota","param":null,"code":"insufficient_quota"}}'
MEANINGS = {
    "429: empty account": Row(refused(429, NO_CREDIT), 1, NONE, QUOTA, words="m"),
    "429: empty account, told by the type alone": Row(
        refused(429, b'{"error":{"message":"m","type":"insufficient_quota","code":"429"}}'), 1, NONE, QUOTA
    ),
    "429: empty account, beside another code": Row(
        refused(429, b'{"error":{"message":"m","type":"insufficient_quota","code":"billing"}}'),
        1,
        NONE,
        QUOTA,
    ),
    "429: empty account, with a delay": Row(advised(429, b"retry-after: 1", body=NO_CREDIT), 1, NONE, QUOTA),
    "429: empty account, as an event stream": Row(
        refused(429, b"data: " + NO_CREDIT + b"\n\n", EVENT_STREAM), 1, NONE, QUOTA, words="m"
    ),
    "429: empty account at GLM": Row(
        refused(429, '{"error":{"code":"1113","message":"余额不足"}}'.encode()),
        1,
        NONE,
        QUOTA,
        words="余额不足",
    ),
    "429: empty account at Moonshot": Row(
        refused(429, b'{"error":{"message":"m","type":"exceeded_current_quota_error"}}'), 1, NONE, QUOTA
    ),
    "403: empty account, by its code": Row(
        refused(403, b'{"error":{"message":"m","code":"insufficient_balance"}}'), 1, NONE, QUOTA
    ),
    "400: empty account, by its words": Row(
        refused(400, b'{"error":{"message":"Your credit balance is too low to use the API"}}'), 1, NONE, QUOTA
    ),
    "500: empty account, by its words": Row(
        refused(500, b'{"message":"Sorry, your account balance is insufficient"}'), 1, NONE, QUOTA
    ),
    "429: a quota per minute is not an empty account": Row(
        refused(
            429,
            b'{"error":{"code":429,"message":"You exceeded your current quota, please check your plan and billing '
            b'details.","status":"RESOURCE_EXHAUSTED","details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo",'
            b'"retryDelay":"32s"}]}}',
        ),
        2,
        HELD,
        LIMITED,
        True,
    ),
    "429: a delay in words": Row(
        refused(429, b'{"error":{"message":"Rate limit reached. Please try again in 1.2s. Visit ..."}}'),
        HELD_CALLS,
        HELD,
        LIMITED,
        True,
    ),
    "200: a delay in words": Row(
        stream(data({"error": {"message": "m, try again in 2s", "code": 429}})), 3, after(2), ERROR, True
    ),
    "429: a delay in the headers before one in words": Row(
        advised(429, b"retry-after: 5", body=b'{"error":{"message":"Please try again in 1.2s."}}'),
        5,
        HELD,
        LIMITED,
        True,
    ),
    "404: two texts": Row(
        refused(404, b'{"error":"Not Found","message":"no such deployment"}'),
        1,
        NONE,
        REJECTED,
        words="Not Found: no such deployment",
    ),
    "429: as an event stream": Row(
        refused(429, b'data: {"error":{"message":"m"}}\n\n', EVENT_STREAM),
        HELD_CALLS,
        HELD,
        LIMITED,
        True,
    ),
    "429: a limit of tokens": Row(
        refused(429, b'{"error":{"message":"m","type":"tokens","code":"rate_limit_exceeded"}}'),
        HELD_CALLS,
        HELD,
        LIMITED,
        True,
    ),
    "503: whose code says that of everything": Row(
        refused(503, b'{"error":{"message":"m","type":"busy","code":"invalid_request_error"}}'),
        3,
        BACKOFF,
        UNAVAILABLE,
        True,
    ),
    "500: a prompt that is too long": Row(
        refused(500, b'{"error":{"message":"m","code":"context_length_exceeded"}}'), 1, NONE, UNAVAILABLE
    ),
    "400: content filter": Row(
        refused(400, b'{"error":{"message":"m","code":"content_filter","status":400}}'), 1, NONE, REJECTED
    ),
    "401: a string": Row(
        refused(401, b'{"error":"Unauthorized"}'), HELD_CALLS, HELD, AUTH, words="Unauthorized"
    ),
    "503: body that hangs": Row(
        Act(b"HTTP/1.1 503 X\r\ncontent-length: 9\r\n\r\nbusy"), 3, BACKOFF, UNAVAILABLE, True, words="busy"
    ),
    "503: body that breaks": Row(
        Act(b"HTTP/1.1 503 X\r\ncontent-length: 9\r\n\r\nbusy", Then.RESET), 3, BACKOFF, UNAVAILABLE, True
    ),
}

# 200, but not an event stream

NO_STREAM = {
    "a whole completion": Row(refused(200, COMPLETION), 1, NONE, None, status=COMPLETED),
    "a completion under the name of a text": Row(
        refused(200, COMPLETION, b"content-type: text/plain\r\n"), 1, NONE, None, status=COMPLETED
    ),
    "an object that is not an error": Row(
        refused(200, b'{"choices":[]}'),
        1,
        NONE,
        PROTOCOL,
        words="the upstream answered with application/json instead of an event stream",
    ),
    "an empty account": Row(
        refused(200, b'{"error":{"message":"m","code":"insufficient_quota"}}'), 1, NONE, PROTOCOL, words="m"
    ),
    "202 that says why": Row(
        refused(202, b'{"status":"queued","message":"the model is loading"}'),
        1,
        NONE,
        PROTOCOL,
        words="the model is loading",
        http_status=202,
    ),
    "an error": Row(
        refused(200, b'{"error":{"message":"m","code":"overloaded"}}'), 3, BACKOFF, PROTOCOL, True, words="m"
    ),
    "an error string": Row(
        refused(200, b'{"code":"The service is busy","error":"m"}'), 3, BACKOFF, PROTOCOL, True, words="m"
    ),
    "an error that lasts": Row(
        refused(200, b'{"error":{"message":"m","code":401}}'), 1, NONE, PROTOCOL, words="m"
    ),
    "html": Row(refused(200, HTML, b"content-type: text/html\r\n"), 1, NONE, PROTOCOL),
    "no content type": Row(refused(200, b"data: {}\n\n", b""), 3, BACKOFF, TRUNCATED, True),
    "text": Row(
        refused(200, b"not here", b"content-type: text/plain\r\n"),
        1,
        NONE,
        PROTOCOL,
        words="the upstream answered with text/plain instead of an event stream",
    ),
    "nothing": Row(refused(200, b"", b""), 1, NONE, PROTOCOL),
}

# Errors inside the stream: before and after the first delta, with [DONE] and without


class Frame(NamedTuple):
    """An error frame, its message, and whether the same call may succeed later."""

    says: bytes
    retriable: bool = True
    words: str = "m"


FRAMES = {
    "openai": Frame(data({"error": {"message": "m", "type": "server_error", "param": None, "code": None}})),
    "openai, a wrong request": Frame(
        data({"error": {"message": "m", "type": "invalid_request_error", "code": "too_many_images"}}), False
    ),
    "vllm": Frame(data({"error": {"message": "m", "type": "BadRequestError", "code": 400}}), False),
    "vllm, its own fault": Frame(
        data({"error": {"message": "m", "type": "InternalServerError", "code": 500}})
    ),
    "older vllm": Frame(data({"object": "error", "message": "m", "type": "t", "code": 400}), False),
    "sglang": Frame(data({"error": {"object": "error", "message": "m", "code": 500}})),
    "llama.cpp": Frame(data({"error": {"code": 500, "message": "m", "type": "server_error"}})),
    "older llama.cpp": Frame(b'error: {"code":500,"message":"m","type":"server_error"}\n\n'),
    "openrouter": Frame(
        data(chunk({"content": ""}, "error", error={"code": "server_error", "message": "m"}))
    ),
    "openrouter, a number": Frame(data(chunk({"content": ""}, "error", error={"code": 502, "message": "m"}))),
    "event called error": Frame(b"event: error\n" + data({"error": {"message": "m"}})),
    "event called error, flat": Frame(b"event: error\n" + data({"message": "m"})),
    "event called error, no json": Frame(b"event: error\ndata: m\n\n"),
    "tgi": Frame(data({"error": "m", "error_type": "generation"})),
    "mlx": Frame(data({"error": "m"})),
    "xai": Frame(data({"code": "busy", "error": "m"})),
    "groq": Frame(data(chunk({}, x_groq={"id": "r", "error": "m"}))),
    "litellm": Frame(
        data({"error": {"message": "m\nTraceback", "type": "None", "param": "None", "code": "500"}}),
        words="m\nTraceback",
    ),
    "google": Frame(data([{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}])),
    "empty account": Frame(data({"error": {"message": "m", "code": "insufficient_quota"}}), False),
    "openrouter, in the choice": Frame(
        data(
            chunk(
                choices=[
                    {
                        "index": 0,
                        "delta": {"content": ""},
                        "finish_reason": "error",
                        "error": {"code": 502, "message": "m"},
                    }
                ]
            )
        )
    ),
    "flat, by its members": Frame(data({"error_type": "BadRequestError", "error_message": "m"}), False),
    "flat, in a chunk without choices": Frame(
        data({"id": "1", "object": "chat.completion.chunk", "choices": None, "error_message": "m"})
    ),
    "baidu": Frame(data({"error_code": 18, "error_msg": "m", "id": "1"})),
    "minimax": Frame(
        data({"id": "1", "choices": None, "base_resp": {"status_code": 1002, "status_msg": "m"}})
    ),
    "minimax, a wrong request": Frame(
        data({"choices": [], "base_resp": {"status_code": 2013, "status_msg": "m"}}), False
    ),
    "fastapi": Frame(data({"detail": "m"})),
    "dashscope": Frame(data({"code": "InvalidParameter", "message": "m", "request_id": "1"}), False),
    "dashscope, throttled": Frame(data({"code": "Throttling.RateQuota", "message": "m", "request_id": "1"})),
    "iflytek": Frame(data({"code": 10013, "message": "m", "sid": "1"})),
    "cloudflare": Frame(
        data({"success": False, "errors": [{"code": 3040, "message": "m"}], "messages": [], "result": None})
    ),
    "api gateway": Frame(data({"message": "m", "requestId": "1"})),
    "nestjs": Frame(
        data({"statusCode": 503, "message": "m", "error": "Service Unavailable"}),
        words="Service Unavailable: m",
    ),
    "bare json": Frame(b'{"error":{"message":"m","code":503}}\n\n'),
    "bare json on several lines": Frame(
        b'{\n  "error": {\n    "message": "m",\n    "code": 400\n  }\n}\n', False
    ),
}


def _framed() -> Iterator[tuple[str, Row]]:
    for name, (says, retriable, words) in FRAMES.items():
        for end, tail in {"": b"", ", then [DONE]": DONE}.items():
            tries, delay = (3, BACKOFF) if retriable else (1, NONE)
            yield (
                f"first: {name}{end}",
                Row(stream(says + tail), tries, delay, ERROR, retriable, FAILED, words, 200),
            )
            yield (
                f"after a delta: {name}{end}",
                Row(stream(WORD, says + tail), 1, NONE, ERROR, retriable, INTERRUPTED, words, 200),
            )


# Other ends of a stream

NOTHING = b': keep-alive\n\n:\n\nevent: ping\n\ndata:\n\nretry: 3000\n\ndata: {"type":"ping"}\n\ndata: {"error":null}\n\n'
EMPTY = data(chunk(choices=[]))
BEFORE = {
    "end of the body": Row(stream(), 3, BACKOFF, TRUNCATED, True),
    "end of the body after comments": Row(stream(NOTHING), 3, BACKOFF, TRUNCATED, True),
    "end of the connection": Row(until_close(), 3, BACKOFF, TRUNCATED, True),
    "an empty chunk": Row(stream(EMPTY), 3, BACKOFF, TRUNCATED, True),
    "html": Row(stream(HTML), 3, BACKOFF, TRUNCATED, True, frame=HTML.decode()),
    "a whole completion": Row(stream(COMPLETION), 1, NONE, None, status=COMPLETED),
    "an unknown object, then [DONE]": Row(
        stream(data({"notice": "m"}), DONE), 3, BACKOFF, ERROR, True, words='{"notice":"m"}'
    ),
    "a finish reason that says failure": Row(
        stream(data(chunk({"content": ""}, "network_error")), DONE),
        3,
        BACKOFF,
        ERROR,
        True,
        words="the upstream ended choice 0 with finish_reason 'network_error'",
    ),
    "no json": Row(stream(data(b"oops")), 3, BACKOFF, PROTOCOL, True),
    "a number": Row(stream(data(b"5")), 3, BACKOFF, PROTOCOL, True),
    "malformed choices": Row(stream(data({"choices": 5})), 3, BACKOFF, PROTOCOL, True),
    "[DONE] alone": Row(stream(DONE), 1, NONE, None, status=COMPLETED),
    "close": Row(stream(NOTHING, ends=False, then=Then.CLOSE), 3, BACKOFF, TRUNCATED, True),
    "reset": Row(stream(NOTHING, ends=False, then=Then.RESET), 3, BACKOFF, TRUNCATED, True),
    "silence": Row(stream(ends=False), 3, BACKOFF, NO_DELTA, True),
    "comments and no more": Row(stream(NOTHING, ends=False, then=Then.PING), 3, BACKOFF, NO_DELTA, True),
    "a length that is short": Row(of_length(1000, NOTHING), 3, BACKOFF, TRUNCATED, True),
    "not compressed as it says": Row(
        Act(chunked(WORD, headers=EVENT_STREAM + b"content-encoding: gzip\r\n")), 1, NONE, PROTOCOL
    ),
}
CUT = WORD[: WORD.index(b"half") + 2]
AFTER = {
    "end of the body": Row(stream(WORD), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "end of the connection": Row(until_close(WORD), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "end inside an event": Row(until_close(WORD + CUT), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "an empty chunk": Row(stream(WORD, EMPTY), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "close": Row(stream(WORD, ends=False, then=Then.CLOSE), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "close inside an HTTP chunk": Row(
        Act(chunked(WORD, ends=False) + b"ff\r\n" + CUT, Then.CLOSE), 1, NONE, TRUNCATED, True, INTERRUPTED
    ),
    "reset": Row(stream(WORD, ends=False, then=Then.RESET), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "a length that is short": Row(of_length(1000, WORD), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "silence": Row(stream(WORD, ends=False), 1, NONE, IDLE, True, INTERRUPTED),
    "comments and no more": Row(stream(WORD, ends=False, then=Then.PING), 1, NONE, IDLE, True, INTERRUPTED),
    "no json": Row(stream(WORD, data(b"oops")), 1, NONE, PROTOCOL, True, INTERRUPTED),
    "one choice of two finished": Row(
        stream(WORD, data(chunk(choices=[{"index": 1, "delta": {}, "finish_reason": "stop"}]))),
        1,
        NONE,
        TRUNCATED,
        True,
        INTERRUPTED,
    ),
    "role alone": Row(stream(ROLE), 1, NONE, TRUNCATED, True, INTERRUPTED),
    "finished, no [DONE]": Row(stream(WORD, FINISH), 1, NONE, None, status=COMPLETED),
    "finished, then close": Row(
        stream(WORD, FINISH, ends=False, then=Then.CLOSE), 1, NONE, None, status=COMPLETED
    ),
    "finished, then reset": Row(
        stream(WORD, FINISH, ends=False, then=Then.RESET), 1, NONE, None, status=COMPLETED
    ),
    "finished, then silence": Row(stream(WORD, FINISH, ends=False), 1, NONE, None, status=COMPLETED),
    "finished, then an error": Row(
        stream(WORD, FINISH, FRAMES["openai"].says, DONE), 1, NONE, None, status=COMPLETED
    ),
    "finished, then no json": Row(stream(WORD, FINISH, data(b"oops")), 1, NONE, None, status=COMPLETED),
    "finished, then a broken [DONE]": Row(
        until_close(WORD, FINISH, b"data: [DO"), 1, NONE, None, status=COMPLETED
    ),
    "finished with a failure": Row(
        stream(WORD, data(chunk({}, "upstream_error")), DONE),
        1,
        NONE,
        ERROR,
        True,
        INTERRUPTED,
        "the upstream ended choice 0 with finish_reason 'upstream_error'",
    ),
    "finished with a failure, then its error": Row(
        stream(WORD, data(chunk({}, "error")), FRAMES["vllm"].says, DONE),
        1,
        NONE,
        ERROR,
        False,
        INTERRUPTED,
        "m",
    ),
    "finished too early, then cut": Row(
        stream(data(chunk({"content": "half "}, "stop")), WORD), 1, NONE, TRUNCATED, True, INTERRUPTED
    ),
    "a keep-alive as data": Row(
        stream(WORD, b"data: : keepalive\n\nevent: ping\ndata: tick\n\n", FINISH),
        1,
        NONE,
        None,
        status=COMPLETED,
    ),
    "[DONE] without a finish": Row(stream(WORD, DONE), 1, NONE, None, status=COMPLETED),
    "[DONE] without its line end": Row(until_close(WORD, b"data: [DONE]"), 1, NONE, None, status=COMPLETED),
    "[DONE] with blanks": Row(stream(WORD, b"data: [DONE] \n\n"), 1, NONE, None, status=COMPLETED),
    "[DONE], then silence": Row(stream(WORD, FINISH, DONE, ends=False), 1, NONE, None, status=COMPLETED),
    "[DONE], then junk": Row(stream(WORD, FINISH, DONE, data(b"oops")), 1, NONE, None, status=COMPLETED),
    "[DONE], then reset": Row(
        stream(WORD, FINISH, DONE, ends=False, then=Then.RESET), 1, NONE, None, status=COMPLETED
    ),
}

PHASES: dict[str, dict[str, Row]] = {
    "no answer": NO_ANSWER,
    "status": STATUSES,
    "headers": HEADERS,
    "body": SHAPES | MEANINGS,
    "200": NO_STREAM,
    "error frame": dict(_framed()),
    "before a delta": BEFORE,
    "after a delta": AFTER,
}
TABLE = {f"{phase} | {name}": row for phase, rows in PHASES.items() for name, row in rows.items()}


# The players


@asynccontextmanager
async def playing(*acts: Act) -> AsyncIterator[tuple[str, list[Act]]]:
    """Serve these responses, one per call, the last one repeatedly; yield the base URL and the responses
    served."""
    played: list[Act] = []

    async def serve(peer: Peer) -> None:
        await peer.request()
        act = acts[min(len(played), len(acts) - 1)]
        played.append(act)
        await peer.say(act.says)
        match act.then:
            case Then.WAIT:
                await serve(peer)
            case Then.CLOSE:
                return
            case Then.RESET:
                peer.reset()
            case Then.PING:
                await _ping(peer)

    async with serving(serve) as server:
        yield server.base_url, played


async def _ping(peer: Peer) -> None:
    while True:
        await peer.say(b"e\r\n: keep-alive\n\n\r\n")
        await asyncio.sleep(PING_S)


async def outcome(*acts: Act, **job: Any) -> Outcome:
    """Run a job and check that its `tries` is the number of calls."""
    async with playing(*acts) as (base_url, played):
        got = await run_job(base_url, max_tries=MAX_TRIES, job=job)
        assert got.end.tries == len(played)
        return got


def check(row: Row, got: Outcome) -> None:
    """Compare the result with the row."""
    end = got.end
    assert (end.status, got.code, end.tries) == (row.status, row.code, row.tries)
    assert len(got.delays) == row.tries - (
        row.delay is not HELD
    )  # the last call of a held job is a probe, too
    for number, delay in enumerate(got.delays, 1):
        assert row.delay is not None
        assert row.delay.least <= delay <= row.delay.most * (2 ** (number - 1) if row.delay.doubles else 1)
    if end.error is not None:
        assert end.error.retriable is row.retriable
        assert row.words is None or end.error.message == row.words
        assert row.http_status is None or end.error.http_status == row.http_status
        assert row.frame is None or end.error.upstream == row.frame


@contextmanager
def refusing() -> Iterator[int]:
    """Reserve a port on which no server listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@contextmanager
def not_accepting() -> Iterator[int]:
    """Listen with a full backlog, so that connection attempts hang."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("port", "code", "seconds"),
    [
        pytest.param(refusing, UNAVAILABLE, 0, id="no listener"),
        pytest.param(not_accepting, ErrorCode.TIMEOUT_CONNECT, CONNECT_S, id="no accept"),
    ],
)
def test_upstream_that_cannot_be_connected(
    port: Callable[[], AbstractContextManager[int]], code: ErrorCode, seconds: float
) -> None:
    """No request was sent, so another try is always safe; each try has its whole timeout."""
    with port() as number:
        got = run(run_job(f"http://127.0.0.1:{number}/v1", max_tries=MAX_TRIES), SocketLoop)

    check(Row(Act(), 3, BACKOFF, code, retriable=True), got)
    assert got.seconds == pytest.approx(3 * seconds + sum(got.delays), abs=0.1)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("no answer | silence before the head", 3 * FIRST_DELTA_S),
        ("before a delta | silence", 3 * FIRST_DELTA_S),
        ("before a delta | comments and no more", 3 * FIRST_DELTA_S),
        ("after a delta | silence", IDLE_S),
        ("after a delta | comments and no more", IDLE_S),
        ("after a delta | finished, then silence", IDLE_S),
        ("after a delta | [DONE], then silence", 0),
    ],
)
def test_timeout_of_a_silent_upstream(name: str, seconds: float) -> None:
    """Only deltas reset the timeout; after [DONE] the end of the body is not waited for."""
    act = TABLE[name].act
    assert isinstance(act, Act)
    got = run(outcome(act), SocketLoop)

    assert got.seconds == pytest.approx(seconds + sum(got.delays), abs=0.2)


@pytest.mark.parametrize(
    ("act", "status", "code", "seconds"),
    [
        pytest.param(busy(b"retry-after: 9"), FAILED, UNAVAILABLE, 9, id="time for one more"),
        pytest.param(busy(b"retry-after: 11"), FAILED, UNAVAILABLE, 0, id="no time for another"),
        pytest.param(Act(), Status.EXPIRED, ErrorCode.DEADLINE, 10, id="before the head"),
        pytest.param(stream(ends=False), Status.EXPIRED, ErrorCode.DEADLINE, 10, id="before a delta"),
        pytest.param(stream(WORD, ends=False), Status.EXPIRED, ErrorCode.DEADLINE, 10, id="after a delta"),
    ],
)
def test_deadline_ends_every_wait(act: Act, status: Status, code: ErrorCode, seconds: float) -> None:
    """The job has ten seconds: no wait exceeds them, whatever the upstream asks for."""
    got = run(outcome(act, deadline=NOW / 1000 + 10), SocketLoop)

    assert (got.end.status, got.code) == (status, code)
    assert got.seconds == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize(
    "name", [name for name, row in TABLE.items() if row.tries > 1 and not name.endswith(", then [DONE]")]
)
def test_failing_upstream_that_recovers(name: str) -> None:
    """One failure of every retriable kind, then a whole answer: one attempt, its text published once."""
    row = TABLE[name]
    act = row.act if isinstance(row.act, Act) else row.act()
    got = run(outcome(act, stream(WORD, FINISH, DONE)), SocketLoop)

    assert (got.end.status, got.code, got.end.tries, got.text()) == (COMPLETED, None, 2, "half ")


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_failing_upstream_gives_the_row(row: Row) -> None:
    """Tries, waits, code, whether to retry, and the status."""
    act = row.act if isinstance(row.act, Act) else row.act()

    check(row, run(outcome(act), SocketLoop))
