"""Errors of upstreams, read from every known shape into one.

The same functions read an error frame inside a stream and the body of an error response.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from streamworker.model import ErrorCode, JobError, StreamError
from streamworker.stream.sse import EventStreamParser
from streamworker.text import truncate
from streamworker.wire.json import InvalidJSON, decode, encode

__all__ = [
    "error_in",
    "error_of_body",
    "http_error",
    "is_retriable",
    "to_job_error",
    "usage_of_body",
]

# Errors that never succeed on a retry, whatever the status is.
_PERMANENT_KINDS = frozenset(
    {
        "invalid_api_key",
        "model_not_found",
        "context_length_exceeded",
        "content_filter",
    }
)
# Classes of such errors. They count only where there is no status: some providers report every error,
# overload included, as `invalid_request_error`.
_PERMANENT_CLASSES = frozenset(
    {
        "invalid_request_error",
        "badrequesterror",
        "authentication_error",
        "permission_error",
        "not_found_error",
    }
)
# Codes of an empty or blocked account. Retrying does not help until the account is paid, whatever the status is.
_QUOTA_KINDS = frozenset(
    {
        "insufficient_quota",
        "insufficient_user_quota",
        "insufficient_balance",
        "insufficient_credits",
        "insufficient_funds",
        "exceeded_current_quota_error",
        "billing_hard_limit_reached",
        "billing_not_active",
        "credit_limit_exceeded",
        "payment_required",
        "accountoverdueerror",
        "arrearage",
        "1008",  # MiniMax
        "1113",  # Zhipu GLM
    }
)
_QUOTA_WORDS = re.compile(
    r"""(?ix)
      insufficient[\s_-]+(account[\s_-]+|user[\s_-]+|api[\s_-]+)?(balance|credits?|funds|quota)
    | \b(balance|credits?)\b.{0,20}\b(too\ low|insufficient|exhausted|used\ up|run\ out|not\ enough)
    | \b(not\ enough|out\ of|no)\ (\w+\ )?(balance|credits)\b
    | \b(recharge|top\ up)\b.{0,20}\b(account|balance)
    | \b(account|balance)\b.{0,30}\b(arrears?|overdue)
    | 余额不足 | 欠费
    """
)
_MAX_QUOTA_WORDS = 300
"""Characters of a message that are searched for the words of an empty account. A longer message may quote the
prompt."""
_RETRIABLE_STATUSES = frozenset({408, 409, 429})


def error_in(payload: dict[str, Any], event_type: str) -> StreamError | None:
    """Return the error in one JSON object of a stream, or None if it has none.

    `error: null`, `{}` and `""` are not errors. A flat object is an error if its `object` or `type` is
    `error`, or if its event is called `error`.
    """
    if error := payload.get("error"):
        return _stream_error(error, payload)
    groq = payload.get("x_groq")
    if isinstance(groq, dict) and (error := groq.get("error")):
        return _stream_error(error, payload)
    if "error" in (payload.get("object"), payload.get("type")):
        return _stream_error(payload, payload)
    if event_type == "error" and not payload.get("choices"):
        return _stream_error(payload, payload)
    return None


def error_of_body(body: bytes) -> StreamError:
    """Read the body of an error response: JSON of any known shape, an event stream, HTML, text, or nothing.

    If the body has no member that describes an error, the message is the body itself.
    """
    frame = truncate(body.decode("utf-8", "replace"))
    payload = _payload(body)
    if isinstance(payload, list) and payload:  # Google wraps the object in an array
        payload = payload[0]
    if not isinstance(payload, dict):
        return StreamError(message=frame.strip(), frame=frame)
    flat = _stream_error(payload, payload)
    error = error_in(payload, "message") or flat
    # A body without such a member may not be an error at all, but for example a whole completion.
    message = frame.strip() if error is flat and not _message_of(payload) else error.message
    return StreamError(message=message, frame=frame, status=error.status, kind=error.kind)


def usage_of_body(body: bytes) -> dict[str, Any] | None:
    """Return the usage of a whole completion, which an upstream that ignores `stream` returns and bills."""
    try:
        payload = decode(body)
    except InvalidJSON:
        return None
    usage = payload.get("usage") if isinstance(payload, dict) and payload.get("choices") else None
    return usage if isinstance(usage, dict) and usage else None


def http_error(status: int, body: bytes) -> JobError:
    """Return the job's error for a response with an error status."""
    error = error_of_body(body)
    message = error.message or f"the upstream answered {status} with an empty body"
    if status == 402 or _is_account_empty(error):
        return JobError(ErrorCode.QUOTA, message, status, error.frame or None, retriable=False)
    kind = None if _is_one_of(_PERMANENT_CLASSES, error.kind) else error.kind
    retriable = is_retriable(status, kind)
    return JobError(_code_of_status(status), message, status, error.frame or None, retriable)


def to_job_error(error: StreamError) -> JobError:
    """Return the job's error for an error inside a 200 stream. `http_status` is the response's own status."""
    if error.protocol:
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, error.message, 200, error.frame, retriable=True)
    retriable = not _is_account_empty(error) and is_retriable(error.status or 500, error.kind)
    return JobError(ErrorCode.UPSTREAM_ERROR, error.message, 200, error.frame, retriable)


def is_retriable(status: int, kind: str | None) -> bool:
    """Whether the same call may succeed later."""
    if any(_is_one_of(kinds, kind) for kinds in (_QUOTA_KINDS, _PERMANENT_KINDS, _PERMANENT_CLASSES)):
        return False
    return status in _RETRIABLE_STATUSES or status >= 500 or status < 400


def _is_account_empty(error: StreamError) -> bool:
    """Whether the error's code, type or message says that the account has no credit left."""
    if _is_one_of(_QUOTA_KINDS, error.kind):
        return True
    return bool(_QUOTA_WORDS.search(error.message[:_MAX_QUOTA_WORDS]))


def _code_of_status(status: int) -> ErrorCode:
    if status in {401, 403}:
        return ErrorCode.AUTH
    if status == 429:
        return ErrorCode.RATE_LIMITED
    if 400 <= status < 500:
        return ErrorCode.UPSTREAM_REJECTED
    return ErrorCode.UPSTREAM_UNAVAILABLE


def _payload(body: bytes) -> Any:
    """Return a body's JSON, or that of its first event: some proxies send an event stream even with a 429."""
    try:
        return decode(body)
    except InvalidJSON:
        for event in EventStreamParser().feed(body + b"\n\n"):
            with suppress(InvalidJSON):
                return decode(event.data)
    return None


def _stream_error(error: Any, payload: dict[str, Any]) -> StreamError:
    frame = truncate(encode(payload).decode())
    if not isinstance(error, dict):
        kind = payload.get("error_type") or payload.get("code")
        return StreamError(
            message=_text(error), frame=frame, status=_number(payload.get("code")), kind=_name(kind)
        )
    kind = _kind(error.get("code"), error.get("type"))
    message = _text(_message_of(error) or error)
    return StreamError(message=message, frame=frame, status=_number(error.get("code")), kind=kind)


def _message_of(error: dict[str, Any]) -> Any:
    return error.get("message") or error.get("detail") or error.get("error") or error.get("msg")


def _kind(code: Any, type_: Any) -> str | None:
    """Choose between an error's code and its type: the one that decides whether to retry, else the code,
    which is more specific."""
    if str(code) in _QUOTA_KINDS:  # a number that is used as a name
        return str(code)
    names = [name for name in (_name(code), _name(type_)) if name is not None]
    for kinds in (_QUOTA_KINDS, _PERMANENT_KINDS, _PERMANENT_CLASSES):
        for name in names:
            if _is_one_of(kinds, name):
                return name
    return names[0] if names else None


def _is_one_of(kinds: frozenset[str], kind: str | None) -> bool:
    return kind is not None and kind.lower() in kinds


def _text(value: Any) -> str:
    return truncate(value if isinstance(value, str) else encode(value).decode())


def _number(code: Any) -> int | None:
    """Return a code that is an HTTP status, as a number or as a string of digits (LiteLLM)."""
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and 100 <= code <= 599 else None


def _name(kind: Any) -> str | None:
    # LiteLLM writes the string "None" for an unknown type.
    return kind if isinstance(kind, str) and kind not in {"", "None"} and not kind.isdigit() else None
