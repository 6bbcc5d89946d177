"""The format that a client accepts for an event stream (RFC 9110 section 12.5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs

from streamworker.gateway.errors import ApiError

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["JSON", "NDJSON", "SSE", "requested_format", "stream_format", "wants_event_stream"]

SSE, NDJSON, JSON = "text/event-stream", "application/x-ndjson", "application/json"
_OFFERED = (SSE, NDJSON, JSON)
_MAX_ACCEPT = 1000


def stream_format(accept: str | None) -> str:
    """Return the offered content type that an `Accept` header prefers. Raises ApiError 406."""
    if accept is None or not accept.strip():
        return SSE
    best, best_quality = None, 0.0
    for offered in _OFFERED:
        quality = _quality(accept[:_MAX_ACCEPT], offered)
        if quality > best_quality:
            best, best_quality = offered, quality
    if best is None:
        raise ApiError(406, "not_acceptable", f"Accept must allow one of {', '.join(_OFFERED)}")
    return best


def requested_format(request: web.Request) -> str:
    """Return the content type that a request prefers; its `Accept` may come in several lines. Raises ApiError 406."""
    return stream_format(", ".join(request.headers.getall(hdrs.ACCEPT, ())))


def wants_event_stream(request: web.Request) -> bool:
    """Whether the client takes any status but 200 as final, as EventSource does."""
    try:
        return requested_format(request) == SSE
    except ApiError:
        return False


def _quality(accept: str, offered: str) -> float:
    """Return the quality of a content type: that of the most specific range that includes it."""
    found = (-1, 0.0)
    for item in accept.split(","):
        range_, *parameters = (part.strip().lower() for part in item.split(";"))
        specificity = {offered: 2, f"{offered.partition('/')[0]}/*": 1, "*/*": 0}.get(range_)
        if specificity is not None:
            found = max(found, (specificity, _q(parameters)))
    return found[1]


def _q(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(1.0, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 1.0
