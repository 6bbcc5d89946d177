"""Errors in the shapes of providers and servers, as a response body and inside a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.practice.events import Events

    Choose = Callable[[dict[str, Any]], dict[str, Any]]
    """A function that returns a chunk with one choice of the given members."""

JSON: Final = "application/json"
HTML: Final = (
    b"<!DOCTYPE html>\n<html><head><title>Practice</title></head><body>Not an event stream.</body></html>\n"
)
_TRACEBACK: Final = '\nTraceback (most recent call last):\n  File "proxy.py", line 1, in stream'


class Words(NamedTuple):
    """The content of an error; `status` is used by shapes that have a number."""

    message: str
    kind: str
    code: str | None
    status: int


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return `{"error": {message, type, param, code}}`, the shape that OpenAI's clients read."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _openai(words: Words) -> Any:
    return error_body(words.message, words.kind, words.code)


def _flat(words: Words) -> Any:
    return {
        "object": "error",
        "message": words.message,
        "type": words.kind,
        "param": None,
        "code": words.status,
    }


def _numbered(words: Words) -> Any:
    return {"code": words.status, "message": words.message, "type": words.kind}


def _litellm(words: Words) -> Any:
    code = str(words.status)
    return {"error": {"message": words.message + _TRACEBACK, "type": "None", "param": "None", "code": code}}


ERRORS: Final[dict[str, Callable[[Words], Any]]] = {
    "openai": _openai,
    "vllm": lambda words: {"error": _numbered(words) | {"param": None}},
    "vllm_flat": _flat,
    "sglang": lambda words: {"error": _flat(words)},
    "llamacpp": lambda words: {"error": _numbered(words)},
    "llamacpp_field": lambda words: {"error": _numbered(words)},
    "openrouter": lambda words: {"error": {"code": words.status, "message": words.message}},
    "groq": _openai,
    "event": _openai,
    "event_flat": lambda words: {"message": words.message, "type": words.kind, "code": words.code},
    "event_text": _openai,
    "tgi": lambda words: {"error": words.message, "error_type": "generation"},
    "string": lambda words: {"error": words.message},
    "xai": lambda words: {"code": words.code or words.kind, "error": words.message},
    "litellm": _litellm,
    "google": lambda words: [
        {"error": {"code": words.status, "message": words.message, "status": "UNAVAILABLE"}}
    ],
    "detail": lambda words: {"detail": words.message},
    "message": lambda words: {"message": words.message, "id": "req-practice"},
    "anthropic": lambda words: {"type": "error", "error": {"type": words.kind, "message": words.message}},
    "stream": _openai,
    "html": _openai,
    "text": _openai,
    "empty": _openai,
}
"""The JSON of an error, by the name of its shape. `error_body` and `error_frame` handle the exceptions."""


def body(shape: str, words: Words) -> tuple[str, bytes]:
    """Return the content type and the bytes of an error response."""
    match shape:
        case "html":
            return "text/html; charset=utf-8", HTML
        case "text":
            return "text/plain", words.message.encode()
        case "empty":
            return JSON, b""
        case "stream":
            return "text/event-stream", b"data: " + orjson.dumps(_openai(words)) + b"\n\ndata: [DONE]\n\n"
        case _:
            return JSON, orjson.dumps(ERRORS[shape](words))


def frame(shape: str, words: Words, events: Events, choose: Choose) -> bytes:
    """Return the bytes of an error inside a stream."""
    written = _FRAMES.get(shape)
    return events.json(ERRORS[shape](words)) if written is None else written(words, events, choose)


def _field(words: Words, events: Events, _: object) -> bytes:
    return events.line(b"error: " + orjson.dumps(_numbered(words)))


def _beside_choices(words: Words, events: Events, choose: Choose) -> bytes:
    failed = choose({"delta": {"content": ""}, "finish_reason": "error"})
    return events.json(failed | ERRORS["openrouter"](words))


def _under_x_groq(words: Words, events: Events, choose: Choose) -> bytes:
    return events.json(choose({"delta": {}}) | {"x_groq": {"error": words.message}})


def _empty(_: Words, events: Events, choose: Choose) -> bytes:
    return events.json(choose({"delta": {"content": ""}, "finish_reason": None}))


_FRAMES: Final[dict[str, Callable[[Words, Events, Choose], bytes]]] = {
    "llamacpp_field": _field,
    "openrouter": _beside_choices,
    "groq": _under_x_groq,
    "event": lambda words, events, _: b"event: error\n" + events.json(_openai(words)),
    "event_flat": lambda words, events, _: b"event: error\n" + events.json(ERRORS["event_flat"](words)),
    "event_text": lambda words, events, _: b"event: error\n" + events.data(words.message.encode()),
    "html": lambda _, events, __: events.line(HTML),
    "text": lambda words, events, _: events.data(words.message.encode()),
    "empty": _empty,
}
