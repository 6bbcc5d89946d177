"""Terminal events of jobs that did not complete, as errors of the OpenAI-compatible endpoint."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, Final

from streamworker.gateway.errors import RETRY_AFTER_S, ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["failure_of", "superseded"]

_STATUSES: Final[dict[str, int]] = {
    "invalid_job": 400,
    "unknown_upstream": 404,
    "cancelled": 409,
    "rate_limited": 429,
    "max_deliveries": 500,
    "auth": 502,
    "quota": 502,
    "too_large": 502,
    "truncated": 502,
    "upstream_error": 502,
    "upstream_protocol": 502,
    "upstream_rejected": 502,
    "timeout_connect": 503,
    "upstream_unavailable": 503,
    "deadline": 504,
    "timeout_first_delta": 504,
    "timeout_idle": 504,
}
"""HTTP status by `error.code`; 502 for codes of later versions."""

_PASSED_ON: Final = frozenset({400, 404, 413, 422})
"""Statuses of an upstream that blame the request. Any other one may be about the upstream's own key or limits."""

_NAMES: Final = {"unknown_upstream": "model_not_found"}
"""Codes that have another name in this API."""


def superseded(job_id: str) -> ApiError:
    """Return the error of a stream whose text is void, because a new attempt of the job has begun."""
    return ApiError(
        502,
        "attempt_superseded",
        "the worker that ran the job stopped, and the job began anew: the text that was sent is void",
        retriable=True,
        job_id=job_id,
    )


def failure_of(ending: Mapping[str, Any], job_id: str) -> ApiError | None:
    """Return why the job of a decoded terminal event did not complete; None if it did."""
    if ending.get("status") == "completed":
        return None
    error = ending.get("error")
    if type(error) is not dict:
        error = {}
    code = str(error.get("code") or ending.get("status"))
    status = _status(code, error.get("http_status"))
    return ApiError(
        status,
        _NAMES.get(code, code),
        str(error.get("message") or f"the job ended {ending.get('status')}"),
        retriable=_is_retriable(status, ending, error),
        job_id=job_id,
        headers=_retry_after(status, error.get("retry_after_ms")),
    )


def _status(code: str, upstream_status: Any) -> int:
    if code == "upstream_rejected" and type(upstream_status) is int and upstream_status in _PASSED_ON:
        return upstream_status
    return _STATUSES.get(code, 502)


def _is_retriable(status: int, ending: Mapping[str, Any], error: Mapping[str, Any]) -> bool:
    if status == 504:  # a client that repeats the call pays for the generated part again
        return ending.get("usage_source") == "none"
    return error.get("retriable") is True


def _retry_after(status: int, after_ms: Any) -> dict[str, str]:
    if type(after_ms) is int and after_ms > 0:
        return {"Retry-After": str(ceil(after_ms / 1000))}
    return {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else {}
