"""What upstreams say when they fail, in all the shapes they say it (wire facts §6, §9), read into one.

The same reading serves an error frame inside a stream and the body of an error status.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from streamworker.model import ErrorCode, Fault, JobError
from streamworker.stream.sse import EventStreamParser
from streamworker.text import truncate
from streamworker.wire.json import InvalidJSON, decode, encode

__all__ = [
    "fault_in",
    "fault_of_body",
    "http_error",
    "is_retriable",
    "stream_error",
    "usage_of_body",
]

# What never succeeds by itself, whatever the status says: a 429 for an empty account is not a matter of waiting.
_HOPELESS_KINDS = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "invalid_api_key",
        "model_not_found",
        "context_length_exceeded",
        "content_filter",
    }
)
# Whole classes of errors. They speak where there is no status; beside one they are not to be trusted, because some
# providers write `invalid_request_error` into everything, overload included.
_HOPELESS_CLASSES = frozenset(
    {
        "invalid_request_error",
        "badrequesterror",
        "authentication_error",
        "permission_error",
        "not_found_error",
    }
)
_RETRIABLE_STATUSES = frozenset({408, 409, 429})


def fault_in(payload: dict[str, Any], event_type: str) -> Fault | None:
    """Find the error in one JSON object of a stream; None where there is none.

    `error: null`, `{}` and `""` are no errors. A flat object is one if it says so (`"object": "error"`, or
    `"type"`) or if its event is called `error`.
    """
    if error := payload.get("error"):
        return _fault(error, payload)
    groq = payload.get("x_groq")
    if isinstance(groq, dict) and (error := groq.get("error")):
        return _fault(error, payload)
    if "error" in (payload.get("object"), payload.get("type")):
        return _fault(payload, payload)
    if event_type == "error" and not payload.get("choices"):
        return _fault(payload, payload)
    return None


def fault_of_body(body: bytes) -> Fault:
    """Read the body of an error status: JSON in any of the known shapes, an event stream, HTML, text, or nothing.

    Where nothing in it is an error's words, the message is the body itself.
    """
    frame = truncate(body.decode("utf-8", "replace"))
    payload = _payload(body)
    if isinstance(payload, list) and payload:  # Google wraps the object in an array
        payload = payload[0]
    if not isinstance(payload, dict):
        return Fault(message=frame.strip(), frame=frame)
    flat = _fault(payload, payload)
    fault = fault_in(payload, "message") or flat
    # Without an error's words it may be no error at all: a whole completion, for one.
    message = frame.strip() if fault is flat and not _words(payload) else fault.message
    return Fault(message=message, frame=frame, status=fault.status, kind=fault.kind)


def usage_of_body(body: bytes) -> dict[str, Any] | None:
    """Return what a whole completion reports, from an upstream that ignored `stream`: it is paid for all the same."""
    try:
        payload = decode(body)
    except InvalidJSON:
        return None
    usage = payload.get("usage") if isinstance(payload, dict) and payload.get("choices") else None
    return usage if isinstance(usage, dict) and usage else None


def http_error(status: int, body: bytes) -> JobError:
    """Say what an answer with an error status means for the job."""
    fault = fault_of_body(body)
    code = _code_of_status(status)
    message = fault.message or f"the upstream answered {status} with an empty body"
    kind = None if _is_one_of(_HOPELESS_CLASSES, fault.kind) else fault.kind
    return JobError(code, message, status, fault.frame or None, is_retriable(status, kind))


def stream_error(fault: Fault) -> JobError:
    """Say what an error inside a 200 stream means for the job. `http_status` is the response's own."""
    if fault.protocol:
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, fault.message, 200, fault.frame, retriable=True)
    retriable = is_retriable(fault.status or 500, fault.kind)
    return JobError(ErrorCode.UPSTREAM_ERROR, fault.message, 200, fault.frame, retriable)


def is_retriable(status: int, kind: str | None) -> bool:
    """Whether the same call may succeed later."""
    if _is_one_of(_HOPELESS_KINDS, kind) or _is_one_of(_HOPELESS_CLASSES, kind):
        return False
    return status in _RETRIABLE_STATUSES or status >= 500 or status < 400


def _code_of_status(status: int) -> ErrorCode:
    if status in {401, 403}:
        return ErrorCode.AUTH
    if status == 429:
        return ErrorCode.RATE_LIMITED
    if 400 <= status < 500:
        return ErrorCode.UPSTREAM_REJECTED
    return ErrorCode.UPSTREAM_UNAVAILABLE


def _payload(body: bytes) -> Any:
    """Return a body's JSON, or that of its first event: some proxies answer even a 429 as an event stream."""
    try:
        return decode(body)
    except InvalidJSON:
        for event in EventStreamParser().feed(body + b"\n\n"):
            with suppress(InvalidJSON):
                return decode(event.data)
    return None


def _fault(error: Any, payload: dict[str, Any]) -> Fault:
    frame = truncate(encode(payload).decode())
    if not isinstance(error, dict):
        kind = payload.get("error_type") or payload.get("code")
        return Fault(message=_text(error), frame=frame, status=_number(payload.get("code")), kind=_name(kind))
    kind = _kind(error.get("code"), error.get("type"))
    message = _text(_words(error) or error)
    return Fault(message=message, frame=frame, status=_number(error.get("code")), kind=kind)


def _words(error: dict[str, Any]) -> Any:
    return error.get("message") or error.get("detail") or error.get("error") or error.get("msg")


def _kind(code: Any, type_: Any) -> str | None:
    """Choose between two names for an error: the one that settles the matter, else the code, which says more."""
    names = [name for name in (_name(code), _name(type_)) if name is not None]
    for settling in (_HOPELESS_KINDS, _HOPELESS_CLASSES):
        for name in names:
            if _is_one_of(settling, name):
                return name
    return names[0] if names else None


def _is_one_of(kinds: frozenset[str], kind: str | None) -> bool:
    return kind is not None and kind.lower() in kinds


def _text(value: Any) -> str:
    return truncate(value if isinstance(value, str) else encode(value).decode())


def _number(code: Any) -> int | None:
    """Read a code that is a number, or a string of digits (LiteLLM), within HTTP's range."""
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and 100 <= code <= 599 else None


def _name(kind: Any) -> str | None:
    # LiteLLM writes the string "None" where it knows no type.
    return kind if isinstance(kind, str) and kind not in {"", "None"} and not kind.isdigit() else None
