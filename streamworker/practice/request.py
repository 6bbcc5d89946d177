"""The members of a chat-completions request that the practice upstream reads."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import orjson

from streamworker.practice.errors import error_body

_KINDS: Final = {401: "authentication_error", 429: "rate_limit_error"}
_MAX_CHOICES: Final = 128


class RefusedError(Exception):
    """A request that is answered with an HTTP error; `body` has the shape that OpenAI's clients read."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, error_kind(status), code, param)


def error_kind(status: int) -> str:
    """Return the error `type` of a status."""
    return _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")


class ChatRequest(NamedTuple):
    """A chat-completions body; `choices` is its `n`."""

    model: str
    messages: list[Any]
    stream: bool
    choices: int
    include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse the body as a JSON object. Raises RefusedError."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RefusedError(400, "The body is not JSON.", "invalid_json") from error
    if not isinstance(parsed, dict):
        raise RefusedError(400, "The body is not a JSON object.", "invalid_json")
    return parsed


def read(body: dict[str, Any]) -> ChatRequest:
    """Read the members of a body. Raises RefusedError, which names the invalid member."""
    options = _member(body, "stream_options", dict, {})
    return ChatRequest(
        model=_member(body, "model", str),
        messages=_member(body, "messages", list),
        stream=_member(body, "stream", bool, default=False),
        choices=_choices(body),
        include_usage=options.get("include_usage") is True,
    )


def _choices(body: dict[str, Any]) -> int:
    wanted = body.get("n")
    if wanted is None:
        return 1
    if type(wanted) is not int or not 1 <= wanted <= _MAX_CHOICES:
        raise RefusedError(400, f"'n' must be a number from 1 to {_MAX_CHOICES}.", "invalid_value", "n")
    return wanted


def _member(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return a member of the required type. If there is a default, null means the same as an absent member."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind):
        raise RefusedError(400, f"{name!r} must be of type {kind.__name__}.", "invalid_type", name)
    return value
