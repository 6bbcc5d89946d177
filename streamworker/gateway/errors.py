"""The errors that clients see: one body for all of them, and the table of their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CODES", "RETRY_AFTER_S", "ApiError", "Code", "error_type"]

RETRY_AFTER_S = 2
"""Seconds that `Retry-After` names where nothing better is known."""

_INVALID = "invalid_request_error"


class Code(NamedTuple):
    """What a code says by default; an `ApiError` may override `is_retriable`."""

    statuses: frozenset[int]
    is_retriable: bool


def _code(*statuses: int, retriable: bool = False) -> Code:
    return Code(frozenset(statuses), retriable)


CODES: Mapping[str, Code] = {
    # The request
    "invalid_request": _code(400),
    "invalid_job": _code(400),
    "invalid_cursor": _code(400),
    "unauthenticated": _code(401),
    "insufficient_scope": _code(403),
    "outside_tenant": _code(403),
    "origin_not_allowed": _code(403),
    "not_found": _code(404),
    "job_not_found": _code(404),
    "model_not_found": _code(404),
    "method_not_allowed": _code(405),
    "not_acceptable": _code(406),
    "request_timeout": _code(408, retriable=True),
    "idempotency_mismatch": _code(409),
    "cancelled": _code(409),
    "cursor_lost": _code(410),
    "too_large": _code(413, 502),
    "unsupported_media_type": _code(415),
    "upgrade_required": _code(426),
    "too_many_requests": _code(429, retriable=True),
    "too_many_streams": _code(429, retriable=True),
    "too_many_files": _code(429),
    "too_many_batches": _code(429),
    "rate_limited": _code(429, retriable=True),
    "not_configured": _code(501),
    # The gateway and Kafka
    "internal": _code(500),
    "max_deliveries": _code(500),
    "broker_unavailable": _code(503, retriable=True),
    "overloaded": _code(503, retriable=True),
    "draining": _code(503, retriable=True),
    "submit_unknown": _code(503),
    # The upstream
    "upstream_rejected": _code(400, 404, 413, 422, 502),
    "auth": _code(502),
    "quota": _code(502),
    "truncated": _code(502, retriable=True),
    "attempt_superseded": _code(502, retriable=True),
    "upstream_error": _code(502, retriable=True),
    "upstream_protocol": _code(502, retriable=True),
    "unknown_upstream": _code(400),
    "upstream_unavailable": _code(503, retriable=True),
    "timeout_connect": _code(503, retriable=True),
    "timeout_first_delta": _code(504, retriable=True),
    "timeout_idle": _code(504),
    "deadline": _code(504),
}
"""Every code, with the statuses that it may have."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    502: "upstream_error",
}


def error_type(status: int) -> str:
    """Return the `type` of an error with this status."""
    return _TYPES.get(status) or (_INVALID if status < 500 or status == 501 else "server_error")


class ApiError(Exception):
    """A request that is answered with an error. Rooms raise it; a middleware renders it.

    `type` and `retriable` follow from status and code unless they are given. `extra` are further members of the error object, such as `searched_from`. `headers` are those of the response.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retriable: bool | None = None,
        param: str | None = None,
        job_id: str | None = None,
        type: str | None = None,  # noqa: A002 - the member's name
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.type = type or error_type(status)
        if retriable is None:
            retriable = code in CODES and CODES[code].is_retriable
        self.retriable = retriable
        self.param = param
        self.job_id = job_id
        self.extra = dict(extra or {})
        self.headers = dict(headers or {})
        if status in {429, 503} and self.retriable:
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))

    def value(self) -> dict[str, Any]:
        """Return the error object: the value of `error` in a body, an event or a frame."""
        value: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "retriable": self.retriable,
        }
        if self.job_id is not None:
            value["job_id"] = self.job_id
        return value | self.extra

    def body(self) -> bytes:
        """Return the body of the response."""
        return orjson.dumps({"error": self.value()})
