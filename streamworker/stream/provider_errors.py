"""Errors of upstreams, read from every known shape into one.

The same functions read an error frame inside a stream and the body of a response that is not a stream.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.model import ErrorCode, JobError, StreamError
from streamworker.stream.retry import duration_s, to_ms
from streamworker.stream.sse import EventStreamParser
from streamworker.text import truncate
from streamworker.wire.json import InvalidJSON, decode_lenient, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "body_error",
    "error_in",
    "error_of_body",
    "error_of_object",
    "has_words",
    "http_error",
    "is_retriable",
    "may_be_error",
    "to_job_error",
]

# Where errors put their message, the most usual member first.
_MESSAGES = (
    "message",
    "error_message",
    "errorMessage",
    "error_msg",
    "errorMsg",
    "errmsg",
    "faultstring",
    "detail",
    "error",
    "msg",
    "status_msg",
    "error_description",
    "errors",
)
_CODES = ("code", "status_code", "statusCode", "error_code", "errorCode", "errcode", "http_status", "status")
_TYPES = ("type", "error_type", "errorType")
_SUCCESS = frozenset({"", "none", "null", "ok", "success", "succeeded", "normal"})
_FAILURE = frozenset({"error", "failed", "failure"})
_ERROR_MEMBER = re.compile(
    r"(error|err|Error)(s|_?(code|description|info|message|msg|type|Code|Description|Info|Message|Msg|Type))|fault"
)
# Members that stand beside the message of an error which says no more than that.
_MESSAGE_ONLY = frozenset(
    {"message", "msg", "id", "path", "requestId", "request_id", "timestamp", "trace_id"}
)

# Kinds are compared without case and separators, and without what follows a dot: `Throttling.RateQuota`.
# Errors that never succeed on a retry, whatever the status is.
_PERMANENT_KINDS = frozenset(
    {
        "contentfilter",
        "contentpolicyviolation",
        "contextlengthexceeded",
        "datainspectionfailed",
        "exceedcontextsizeerror",
        "exceededcontextsizeerror",
        "invalidapikey",
        "modelnotfound",
    }
)
# Classes of such errors. They count only where there is no status: some providers report every error,
# overload included, as `invalid_request_error`.
_PERMANENT_CLASSES = frozenset(
    {
        "accessdenied",
        "authenticationerror",
        "badrequest",
        "badrequesterror",
        "forbidden",
        "invalidargument",
        "invalidparameter",
        "invalidrequesterror",
        "notfound",
        "notfounderror",
        "permissiondenied",
        "permissionerror",
        "unauthenticated",
        "unauthorized",
        "unprocessableentityerror",
        "validationerror",
    }
)
# Codes of an empty or blocked account. Retrying does not help until the account is paid, whatever the status is.
_QUOTA_KINDS = frozenset(
    {
        "1008",  # MiniMax
        "1113",  # Zhipu GLM
        "accountoverdue",
        "accountoverdueerror",
        "arrearage",
        "billinghardlimitreached",
        "billingnotactive",
        "creditlimitexceeded",
        "exceededcurrentquotaerror",
        "insufficientbalance",
        "insufficientcredits",
        "insufficientfunds",
        "insufficientquota",
        "insufficientuserquota",
        "paymentrequired",
    }
)
_QUOTA_MESSAGE = re.compile(
    r"""(?ix)
      insufficient[\s_-]+((account|user|api|credit)[\s_-]+)?(balance|credits?|funds|quota)
    | \b(balance|credits?)\b.{0,20}\b(too\ low|insufficient|exhausted|used\ up|run\ out|not\ enough)
    | \b(not\ enough|out\ of|no|used\ all)\ (\w+\ )?(balance|credits)\b
    | \b(recharge|top\ up)\b.{0,20}\b(account|balance)
    | \baccount\b.{0,30}\b(in\ arrears?|overdue)
    | 余额不足 | 欠费
    """
)
_CAPACITY_MESSAGE = re.compile(r"(?i)\bcapacity\b|\boverload|\bbusy\b")
_RETRY_MESSAGE = re.compile(
    r"""(?ix)
    \b(?: (?:try|retry)(?:\ (?:your\ request|it))?(?:\ again)? (?:\ (?:in|after))? | wait (?:\ (?:for|at\ least))? )
    [\ :]+ (?:about\ )? (?P<delay> \d+(?:\.\d+)? \s* (?:ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hours?)\b
                       | (?:\d+(?:\.\d+)?(?:ms|s|m|h))+ )
    """
)
_MAX_SEARCHED = 300
"""Characters of a message that are searched for words. A longer message may quote the prompt."""

_MINIMAX_STATUS = {
    "1002": 429,
    "1004": 401,
    "1008": 402,
    "1026": 400,
    "1027": 400,
    "1039": 400,
    "2013": 400,
    "2049": 401,
}
"""MiniMax's `base_resp.status_code`, a number or its digits, to the HTTP status of the same meaning; others count as 500."""

_RETRIABLE_STATUSES = frozenset({408, 409, 424, 425, 429, 499})


def error_in(payload: dict[str, Any], event_type: str) -> StreamError | None:
    """Return the error in one JSON object of a stream, or None if it has none.

    An error is a member that describes one, of the object, of a choice or of its delta, or the object itself: because of its event's name,
    its `object` or `type`, or members such as `error_message`, or a failing `code` beside a message. Members that are
    present and empty (`null`, `{}`, `{"message": "", "code": 0}`) are not errors.
    """
    for error in _nested_errors(payload):
        if _is_error(error):
            return _stream_error(error, payload)
    base = payload.get("base_resp")
    if isinstance(base, dict) and _is_failure_code(base.get("status_code")):
        status = _MINIMAX_STATUS.get(str(base["status_code"]), 500)
        return msgspec.structs.replace(_stream_error(base, payload), status=status)
    return _stream_error(payload, payload) if _is_flat_error(payload, event_type) else None


def error_of_object(payload: dict[str, Any]) -> StreamError:
    """Return an object as an error, although nothing in it says that it is one: nothing else explains the end."""
    return _stream_error(payload, payload)


def has_words(value: Any) -> bool:
    """Whether a JSON value contains a text that is not empty: numbers alone explain nothing."""
    if isinstance(value, dict):
        return any(map(has_words, value.values()))
    return any(map(has_words, value)) if isinstance(value, list) else isinstance(value, str) and bool(value)


def may_be_error(payload: dict[str, Any], event_type: str) -> bool:
    """Whether a chunk with choices that is not an error by itself may be one, if the stream ends behind it: its event
    says so, or it has a message beside a code or status that is a name."""
    codes = (payload.get(name) for name in _CODES)
    is_named = any(isinstance(code, str) and _is_failure_code(code) for code in codes)
    words = _message_of(payload) if is_named else payload.get("detail") or payload.get("exception")
    return event_type == "error" or (isinstance(words, str) and _is_error(words))


def error_of_body(body: bytes) -> StreamError:
    """Read the body of an error response: JSON of any known shape, an event stream, HTML, text, or nothing.

    If the body has no member that describes an error, the message is the body itself.
    """
    return _read_body(body)[0]


def http_error(status: int, body: bytes) -> JobError:
    """Return the job's error for a response with an error status."""
    error = error_of_body(body)
    message = error.message or f"the upstream answered {status} with an empty body"
    if status == 402 or _is_account_empty(error):
        return _job_error(ErrorCode.QUOTA, error, message, status, retriable=False)
    kind = None if _is_one_of(_PERMANENT_CLASSES, error.kind) else error.kind
    retriable = is_retriable(status, kind) or (status == 498 and _has_words(_CAPACITY_MESSAGE, error))
    return _job_error(_code_of_status(status), error, message, status, retriable=retriable)


def body_error(status: int, content_type: str, body: bytes) -> JobError:
    """Return the job's error for a success response whose body is neither an event stream nor a completion.

    An error under the content type of a stream is the stream's error; any other body breaks the protocol.
    """
    error, is_error = _read_body(body)
    is_streams_own = is_error and "text/event-stream" in content_type.lower()
    code = ErrorCode.UPSTREAM_ERROR if is_streams_own else ErrorCode.UPSTREAM_PROTOCOL
    answer = "answered" if status == 200 else f"answered {status}"
    message = f"the upstream {answer} with {content_type or 'no content type'} instead of an event stream"
    if error.message not in {"", error.frame.strip()}:
        message = error.message
    retriable = is_error and status == 200 and not _is_account_empty(error)
    retriable = retriable and is_retriable(error.status or 500, error.kind)
    return _job_error(code, error, message, status, retriable=retriable)


def to_job_error(error: StreamError, status: int = 200) -> JobError:
    """Return the job's error for an error inside a stream; `status` is the response's own."""
    if error.protocol:
        return _job_error(ErrorCode.UPSTREAM_PROTOCOL, error, error.message, status, retriable=True)
    retriable = not _is_account_empty(error) and is_retriable(error.status or 500, error.kind)
    retriable = retriable or (error.status == 498 and _has_words(_CAPACITY_MESSAGE, error))
    return _job_error(ErrorCode.UPSTREAM_ERROR, error, error.message, status, retriable=retriable)


def is_retriable(status: int, kind: str | None) -> bool:
    """Whether the same call may succeed later."""
    if any(_is_one_of(kinds, kind) for kinds in (_QUOTA_KINDS, _PERMANENT_KINDS, _PERMANENT_CLASSES)):
        return False
    return status in _RETRIABLE_STATUSES or status >= 500 or status < 400


def _job_error(
    code: ErrorCode, error: StreamError, message: str, status: int, *, retriable: bool
) -> JobError:
    after_s = error.retry_after_s
    retry_after_ms = msgspec.UNSET if after_s is None else to_ms(after_s)
    return JobError(code, message, status, error.frame or None, retriable, retry_after_ms)


def _code_of_status(status: int) -> ErrorCode:
    if status in {401, 403}:
        return ErrorCode.AUTH
    if status == 429:
        return ErrorCode.RATE_LIMITED
    if 400 <= status < 500:
        return ErrorCode.UPSTREAM_REJECTED
    return ErrorCode.UPSTREAM_UNAVAILABLE


# Is it an error?


def _nested_errors(payload: dict[str, Any]) -> Iterator[Any]:
    yield payload.get("error")
    if isinstance(groq := payload.get("x_groq"), dict):
        yield groq.get("error")
    choices = payload.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            yield choice.get("error")
            for inner in (choice.get("delta"), choice.get("message")):
                if isinstance(inner, dict):
                    yield inner.get("error")
    if not choices:
        yield payload.get("errors")
        yield payload.get("fault")


def _is_error(value: Any) -> bool:
    """Whether the value of an `error` member says anything."""
    if isinstance(value, str):
        return value.strip().lower() not in _SUCCESS
    if isinstance(value, list):
        return any(map(_is_error, value))
    if not isinstance(value, dict):
        return bool(value)
    return any(_is_failure_code(value.get(name)) for name in _CODES) or any(
        _is_error(member) for name, member in value.items() if name not in _CODES
    )


def _is_failure_code(code: Any) -> bool:
    """Whether a code says that something failed. 0, 2xx and `"success"` do not."""
    if isinstance(code, str):
        if not (code.isascii() and code.isdigit() and len(code) < 10):
            return code.strip().lower() not in _SUCCESS
        code = int(code)
    return type(code) is int and code != 0 and not 200 <= code < 300 and code != 20000


def _is_number(code: Any) -> bool:
    return isinstance(code, int) or (isinstance(code, str) and code.isascii() and code.isdigit())


def _is_flat_error(payload: dict[str, Any], event_type: str) -> bool:
    if "error" in (payload.get("object"), payload.get("type")):
        return True
    if payload.get("success") is False or any(
        _is_error_member(name, value) for name, value in payload.items()
    ):
        return True
    message = _message_of(payload)
    codes = [payload.get(name) for name in _CODES if name != "status"]
    if payload.get("choices"):  # in a chunk a code that is a name may mean anything
        is_failing = any(_is_number(code) and _is_failure_code(code) for code in codes)
        return is_failing and isinstance(message, str) and _is_error(message)
    if event_type == "error":
        return True
    if not isinstance(message, str | list | dict) or not message:
        return False
    status = payload.get("status")
    return (
        any(map(_is_failure_code, codes))
        or (status in _FAILURE if isinstance(status, str) else _is_failure_code(status))
        or _is_error(payload.get("detail"))
        or (isinstance(message, str) and _is_error(message) and _MESSAGE_ONLY.issuperset(payload))
    )


def _is_error_member(name: str, value: Any) -> bool:
    if not _ERROR_MEMBER.fullmatch(name):
        return False
    return _is_failure_code(value) if name.lower().endswith("code") else _is_error(value)


# What does it say?


def _read_body(body: bytes) -> tuple[StreamError, bool]:
    """Return the error in a body, and whether the body says that it is one."""
    frame = truncate(body.decode("utf-8", "replace"))
    payload, event_type = _payload(body)
    if isinstance(payload, list) and payload:  # Google wraps the object in an array
        payload = payload[0]
    if not isinstance(payload, dict):
        return StreamError(message=frame.strip(), frame=frame), False
    error = error_in(payload, event_type)
    if error is not None:
        return msgspec.structs.replace(error, frame=frame), True
    error = _stream_error(payload, payload)
    # A body without such a member may not be an error at all, but for example a whole completion.
    message = error.message if _message_of(payload) else frame.strip()
    return msgspec.structs.replace(error, message=message, frame=frame), False


def _payload(body: bytes) -> tuple[Any, str]:
    """Return a body's JSON, or that of its first event: some proxies send an event stream even with a 429."""
    try:
        return decode_lenient(body), "message"
    except InvalidJSON:
        for event in EventStreamParser().feed(body + b"\n\n"):
            with suppress(InvalidJSON):
                return decode_lenient(event.data), event.type
    return None, "message"


def _stream_error(error: Any, payload: dict[str, Any]) -> StreamError:
    frame = truncate(encode(payload).decode())
    if isinstance(error, list) and error and isinstance(error[0], dict | str):
        error = error[0]
    layers = [error] if isinstance(error, dict) else [payload]
    while isinstance(error, dict) and isinstance(nested := _message_of(error), dict):
        error = nested  # the words are deeper: `{"error": {"error": {"message": …}}}`, `{"detail": {"message": …}}`
        layers.insert(0, nested)
    if isinstance(error, dict):
        message = _text(_message_of(error) or error)
    else:
        message = _text(error)
        more = payload.get("message")
        if isinstance(more, str) and more and more not in message:
            message = truncate(f"{message}: {more}")
    codes = [layer.get(name) for layer in layers for name in _CODES]
    return StreamError(
        message=message,
        frame=frame,
        status=next((status for code in codes if (status := _status(code))), None),
        kind=_kind([layer.get(name) for layer in layers for name in (*_CODES[:1], *_TYPES, *_CODES[1:-1])]),
        retry_after_s=_retry_after_s(payload, message),
    )


def _message_of(error: dict[str, Any]) -> Any:
    for name in _MESSAGES:
        value = error.get(name)
        if name == "errors" and isinstance(value, list):
            texts = [item.get("message") if isinstance(item, dict) else item for item in value]
            value = "; ".join(text for text in texts if isinstance(text, str)) or value
        if value:
            return value
    return None


def _kind(names: list[Any]) -> str | None:
    """Choose between an error's code and its types: the one that decides whether to retry, else the first.

    The code comes first because it is more specific.
    """
    kinds = [str(name) for name in names if str(name) in _QUOTA_KINDS]  # a number that is used as a name
    kinds += [name for name in map(_name, names) if name is not None]
    for decisive in (_QUOTA_KINDS, _PERMANENT_KINDS, _PERMANENT_CLASSES):
        for kind in kinds:
            if _is_one_of(decisive, kind):
                return kind
    return kinds[0] if kinds else None


def _is_one_of(kinds: frozenset[str], kind: str | None) -> bool:
    if kind is None:
        return False
    return re.sub(r"[\s_-]", "", kind.lower().partition(".")[0]) in kinds


def _is_account_empty(error: StreamError) -> bool:
    """Whether the error's status, code, type or message says that the account has no credit left."""
    return error.status == 402 or _is_one_of(_QUOTA_KINDS, error.kind) or _has_words(_QUOTA_MESSAGE, error)


def _has_words(pattern: re.Pattern[str], error: StreamError) -> bool:
    return bool(pattern.search(error.message[:_MAX_SEARCHED]))


def _text(value: Any) -> str:
    return truncate(value if isinstance(value, str) else encode(value).decode())


def _status(code: Any) -> int | None:
    """Return a code that is an HTTP status, as a number or as a string of digits (LiteLLM)."""
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    return code if type(code) is int and 100 <= code <= 599 else None


def _name(kind: Any) -> str | None:
    # LiteLLM writes the string "None" for an unknown type.
    return kind if isinstance(kind, str) and kind not in {"", "None"} and not kind.isdigit() else None


# When may it be called again?


def _retry_after_s(payload: dict[str, Any], message: str) -> float | None:
    """Return the delay that an error names: as a member, as Google's `RetryInfo`, or in the words of its message."""
    for name, value in _members(payload, depth=5):
        match name.lower().replace("-", "_"):
            case "retry_after" | "retryafter" | "retry_after_seconds" | "retrydelay" | "retry_delay":
                after_s = duration_s(value)
            case "retry_after_ms" | "retryafterms":
                after_s = duration_s(value, scale=0.001)
            case _:
                continue
        if after_s is not None:
            return after_s
    words = _RETRY_MESSAGE.search(message[:_MAX_SEARCHED])
    return None if words is None else duration_s(words["delay"])


def _members(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the members of an object and of the objects inside of it, except for its choices."""
    if isinstance(value, dict):
        for name, member in value.items():
            yield name, member
            if depth and name != "choices":
                yield from _members(member, depth - 1)
    elif isinstance(value, list) and depth:
        for item in value[:16]:
            yield from _members(item, depth - 1)
