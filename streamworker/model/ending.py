"""How a job can end: the values of the terminal event (see docs/delivery.md)."""

from __future__ import annotations

from enum import StrEnum

import msgspec

__all__ = ["Advice", "ErrorCode", "JobError", "Status", "UsageSource"]


class Status(StrEnum):
    """The terminal event's `status`."""

    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"


class ErrorCode(StrEnum):
    """The terminal event's `error.code`."""

    INVALID_JOB = "invalid_job"
    UNKNOWN_UPSTREAM = "unknown_upstream"
    AUTH = "auth"
    QUOTA = "quota"
    RATE_LIMITED = "rate_limited"
    UPSTREAM_REJECTED = "upstream_rejected"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    TIMEOUT_CONNECT = "timeout_connect"
    TIMEOUT_FIRST_DELTA = "timeout_first_delta"
    TIMEOUT_IDLE = "timeout_idle"
    TRUNCATED = "truncated"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_PROTOCOL = "upstream_protocol"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    MAX_DELIVERIES = "max_deliveries"
    TOO_LARGE = "too_large"


class UsageSource(StrEnum):
    """Where the terminal event's `usage` comes from."""

    UPSTREAM = "upstream"
    UPSTREAM_PARTIAL = "upstream_partial"
    ESTIMATED = "estimated"
    NONE = "none"


class Advice(msgspec.Struct, frozen=True):
    """What an HTTP response says about another try: whether to make one, and after how many seconds."""

    should_retry: bool | None = None
    after_s: float | None = None


class JobError(msgspec.Struct, frozen=True):
    """Why a job did not complete.

    `message` keeps the upstream's own words. `upstream` is the body or the frame that it sent, cut at 2 KiB,
    with secrets removed. `retriable` states whether the same call may succeed later. `retry_after_ms` is set
    only where the upstream named a time.
    """

    code: ErrorCode
    message: str
    http_status: int | None = None
    upstream: str | None = None
    retriable: bool = False
    retry_after_ms: int | msgspec.UnsetType = msgspec.UNSET
