"""What upstreams say when they fail, in all the shapes they say it (wire facts §6, §9), read into one.

The same reading serves an error frame inside a stream and the body of an error status.
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

# What never succeeds by itself, whatever the status says: a 429 for an empty account is not a matter of waiting.
_HOPELESS_KINDS = frozenset(
    {
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
# An empty or blocked account. It stays empty until a person pays, whatever the status is.
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
"""Characters of a message that are searched for words of an empty account; a longer one may quote the prompt."""
_RETRIABLE_STATUSES = frozenset({408, 409, 429})


def error_in(payload: dict[str, Any], event_type: str) -> StreamError | None:
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


def error_of_body(body: bytes) -> StreamError:
    """Read the body of an error status: JSON in any of the known shapes, an event stream, HTML, text, or nothing.

    Where nothing in it is an error's words, the message is the body itself.
    """
    frame = truncate(body.decode("utf-8", "replace"))
    payload = _payload(body)
    if isinstance(payload, list) and payload:  # Google wraps the object in an array
        payload = payload[0]
    if not isinstance(payload, dict):
        return StreamError(message=frame.strip(), frame=frame)
    flat = _fault(payload, payload)
    fault = error_in(payload, "message") or flat
    # Without an error's words it may be no error at all: a whole completion, for one.
    message = frame.strip() if fault is flat and not _words(payload) else fault.message
    return StreamError(message=message, frame=frame, status=fault.status, kind=fault.kind)


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
    fault = error_of_body(body)
    message = fault.message or f"the upstream answered {status} with an empty body"
    if status == 402 or _is_account_empty(fault):
        return JobError(ErrorCode.QUOTA, message, status, fault.frame or None, retriable=False)
    kind = None if _is_one_of(_HOPELESS_CLASSES, fault.kind) else fault.kind
    retriable = is_retriable(status, kind)
    return JobError(_code_of_status(status), message, status, fault.frame or None, retriable)


def to_job_error(fault: StreamError) -> JobError:
    """Say what an error inside a 200 stream means for the job. `http_status` is the response's own."""
    if fault.protocol:
        return JobError(ErrorCode.UPSTREAM_PROTOCOL, fault.message, 200, fault.frame, retriable=True)
    retriable = not _is_account_empty(fault) and is_retriable(fault.status or 500, fault.kind)
    return JobError(ErrorCode.UPSTREAM_ERROR, fault.message, 200, fault.frame, retriable)


def is_retriable(status: int, kind: str | None) -> bool:
    """Whether the same call may succeed later."""
    if any(_is_one_of(kinds, kind) for kinds in (_QUOTA_KINDS, _HOPELESS_KINDS, _HOPELESS_CLASSES)):
        return False
    return status in _RETRIABLE_STATUSES or status >= 500 or status < 400


def _is_account_empty(error: StreamError) -> bool:
    """Whether an error says that the account has no credit left, by its code, its type or its words."""
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
    """Return a body's JSON, or that of its first event: some proxies answer even a 429 as an event stream."""
    try:
        return decode(body)
    except InvalidJSON:
        for event in EventStreamParser().feed(body + b"\n\n"):
            with suppress(InvalidJSON):
                return decode(event.data)
    return None


def _fault(error: Any, payload: dict[str, Any]) -> StreamError:
    frame = truncate(encode(payload).decode())
    if not isinstance(error, dict):
        kind = payload.get("error_type") or payload.get("code")
        return StreamError(
            message=_text(error), frame=frame, status=_number(payload.get("code")), kind=_name(kind)
        )
    kind = _kind(error.get("code"), error.get("type"))
    message = _text(_words(error) or error)
    return StreamError(message=message, frame=frame, status=_number(error.get("code")), kind=kind)


def _words(error: dict[str, Any]) -> Any:
    return error.get("message") or error.get("detail") or error.get("error") or error.get("msg")


def _kind(code: Any, type_: Any) -> str | None:
    """Choose between two names for an error: the one that settles the matter, else the code, which says more."""
    if str(code) in _QUOTA_KINDS:  # a number that is a name
        return str(code)
    names = [name for name in (_name(code), _name(type_)) if name is not None]
    for settling in (_QUOTA_KINDS, _HOPELESS_KINDS, _HOPELESS_CLASSES):
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
