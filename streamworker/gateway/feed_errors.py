"""Errors of the event log as clients see them."""

from __future__ import annotations

from datetime import UTC, datetime

from streamworker.gateway.errors import ApiError
from streamworker.gateway.feeds import CursorLost, FeedError, FeedLost, InvalidCursor, JobNotFound

__all__ = ["api_error", "timestamp"]


def api_error(error: FeedError) -> ApiError:
    """Return the response's error for one of the event log."""
    match error:
        case InvalidCursor():
            return ApiError(400, "invalid_cursor", str(error), param="cursor")
        case CursorLost():
            return ApiError(410, "cursor_lost", str(error), job_id=error.job_id)
        case JobNotFound():
            extra = {"searched_from": timestamp(error.searched_from)}
            return ApiError(404, "job_not_found", str(error), job_id=error.job_id, extra=extra)
        case FeedLost():
            return ApiError(503, "broker_unavailable", str(error), job_id=error.job_id)
    return ApiError(503, "broker_unavailable", "Kafka does not answer: try again")


def timestamp(time_ms: int) -> str:
    """Return a time in ms since the epoch as RFC 3339 text."""
    moment = datetime.fromtimestamp(max(0, time_ms) / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
