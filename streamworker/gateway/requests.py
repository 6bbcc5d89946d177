"""Read what requests have in their queries and bodies, with an error for everything that is not as documented."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from streamworker.gateway.errors import ApiError
from streamworker.gateway.expectations import ask_for_body
from streamworker.wire.json import InvalidJSON, decode, replace_surrogates

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["check_query", "member", "read_body", "read_object", "read_raw_object", "seconds", "since_ms"]

BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""

_JSON = frozenset({"application/json", "application/octet-stream"})
"""Content types of JSON bodies; the second one is aiohttp's name for none."""

_NUMBER = re.compile(r"[0-9.e+-]{1,20}", re.IGNORECASE)
"""The characters of a number; `float` also reads underscores, blanks and the digits of other scripts."""
# RFC 3339 section 5.6. `datetime.fromisoformat` alone also accepts week dates and times without a zone.
_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def read_body(request: web.Request) -> bytes:
    """Return the body of a request with JSON. Raises ApiError 400, 408, 413, 415."""
    if request.content_type not in _JSON or (
        request.content_type == "application/octet-stream" and "Content-Type" in request.headers
    ):
        raise ApiError(
            415, "unsupported_media_type", "the body must be JSON: send Content-Type: application/json"
        )
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiError(415, "unsupported_media_type", "the body must not be compressed")
    limit = request._client_max_size  # noqa: SLF001
    if (request.content_length or 0) > limit:  # said before the body is sent
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            await ask_for_body(request)
            return await request.read()
    except TimeoutError:
        raise ApiError(
            408, "request_timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except web.RequestPayloadError:
        raise ApiError(400, "invalid_request", "the body is not valid HTTP") from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "too_large", f"the body has more than {limit} bytes")


async def read_object(request: web.Request, known: Collection[str], *, may_be_empty: bool = False) -> Any:
    """Return the body's JSON object, with U+FFFD for lone surrogates. Unknown members are refused. Raises ApiError."""
    if may_be_empty and not request.can_read_body:  # clients name any content type then
        return {}
    body = await read_body(request)
    if may_be_empty and not body.strip():
        return {}
    try:
        value = replace_surrogates(decode(body))
    except InvalidJSON as error:
        raise ApiError(400, "invalid_request", f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    if unknown := sorted(value.keys() - set(known)):
        raise ApiError(
            400,
            "invalid_request",
            f"{', '.join(name[:64] for name in unknown[:20])}: not a member of the body; known are {', '.join(known)}",
            param=unknown[0][:64],
        )
    return value


def read_raw_object(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the members of a JSON object, byte for byte. Raises ApiError."""
    try:
        body.decode()
        return _OBJECT.decode(body)
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid_request", f"the body is not UTF-8 (byte {error.start})") from None
    except msgspec.ValidationError:
        raise ApiError(400, "invalid_request", "the body must be a JSON object") from None
    except (msgspec.DecodeError, RecursionError):
        return _repaired(body)


def _repaired(body: bytes) -> dict[str, msgspec.Raw]:
    """Read JSON that msgspec refuses for its lone surrogates."""
    try:
        value = decode(body)
    except InvalidJSON as error:
        raise ApiError(400, "invalid_request", f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "invalid_request", "the body must be a JSON object")
    return value


def check_query(request: web.Request, known: Collection[str]) -> Mapping[str, str]:
    """Return the query. Unknown and repeated parameters are refused. Raises ApiError 400."""
    query = request.query
    for name in query:
        if name not in known and name not in {"access_token", "shard"}:
            raise ApiError(
                400, "invalid_request", f"{name[:64]}: not a parameter here; known are {', '.join(known)}"
            )
        if len(query.getall(name)) > 1:
            raise ApiError(400, "invalid_request", f"{name[:64]}: given twice", param=name[:64])
    return query


def seconds(query: Mapping[str, str], name: str, *, low: float, high: float, default: float) -> float:
    """Return a parameter as a number of seconds. Raises ApiError 400."""
    if name not in query:
        return default
    text = query[name]
    try:
        value = float(text) if _NUMBER.fullmatch(text) else None
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise ApiError(
            400, "invalid_request", f"{name} must be a number from {low:g} to {high:g}", param=name
        )
    return value


def since_ms(text: str | None) -> int | None:
    """Return an RFC 3339 time in ms since the epoch. Raises ApiError 400."""
    if text is None:
        return None
    text = text.upper().replace(" ", "+")  # a plus sign in a query means a space
    if _RFC_3339.fullmatch(text):
        with suppress(ValueError, OverflowError):
            return max(0, round(datetime.fromisoformat(text).timestamp() * 1000))
    raise ApiError(
        400,
        "invalid_request",
        "since must be an RFC 3339 time with a zone, such as 2030-01-31T12:00:00Z",
        param="since",
    )


def member(value: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a member of a body if it has this type. Raises ApiError 400."""
    found = value.get(name, default)
    if type(found) is not kind:
        names = {str: "text", int: "an integer", bool: "true or false", list: "a list"}
        raise ApiError(400, "invalid_request", f"{name} must be {names[kind]}", param=name)
    return found
