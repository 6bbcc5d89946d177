"""Terminal events as HTTP errors."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamworker.gateway.chat_errors import failure_of, superseded
from streamworker.gateway.errors import CODES, ApiError, error_type
from streamworker.model import ErrorCode
from tests.chats import JOB, ended, failed

TABLE = [
    # code, the upstream's status, HTTP status, code of the API
    ("invalid_job", None, 400, "invalid_job"),
    ("unknown_upstream", None, 404, "model_not_found"),
    ("auth", 401, 502, "auth"),
    ("auth", 403, 502, "auth"),
    ("quota", 402, 502, "quota"),
    ("quota", 429, 502, "quota"),
    ("rate_limited", 429, 429, "rate_limited"),
    ("upstream_rejected", 400, 400, "upstream_rejected"),
    ("upstream_rejected", 404, 404, "upstream_rejected"),
    ("upstream_rejected", 413, 413, "upstream_rejected"),
    ("upstream_rejected", 422, 422, "upstream_rejected"),
    ("upstream_rejected", 405, 502, "upstream_rejected"),
    ("upstream_rejected", 409, 502, "upstream_rejected"),
    ("upstream_rejected", None, 502, "upstream_rejected"),
    ("upstream_unavailable", 500, 503, "upstream_unavailable"),
    ("upstream_unavailable", 400, 503, "upstream_unavailable"),
    ("timeout_connect", None, 503, "timeout_connect"),
    ("timeout_first_delta", None, 504, "timeout_first_delta"),
    ("timeout_idle", None, 504, "timeout_idle"),
    ("deadline", None, 504, "deadline"),
    ("truncated", None, 502, "truncated"),
    ("upstream_error", 200, 502, "upstream_error"),
    ("upstream_protocol", None, 502, "upstream_protocol"),
    ("too_large", None, 502, "too_large"),
    ("cancelled", None, 409, "cancelled"),
    ("max_deliveries", None, 500, "max_deliveries"),
    ("of_a_later_version", None, 502, "of_a_later_version"),
]


def of(record: bytes) -> ApiError:
    """Return the failure of a terminal event."""
    failure = failure_of(json.loads(record), JOB)
    assert failure is not None
    return failure


@pytest.mark.parametrize(("code", "upstream_status", "status", "name"), TABLE)
def test_code_has_its_status(code: str, upstream_status: int | None, status: int, name: str) -> None:
    """The message is the terminal event's, which has the upstream's own words."""
    failure = of(failed(code, http_status=upstream_status))

    assert (failure.status, failure.code, failure.type) == (status, name, error_type(status))
    assert failure.message == f"about {code}"
    assert failure.job_id == JOB
    assert code == "of_a_later_version" or status in CODES[name].statuses


def test_table_has_every_code() -> None:
    """A code that is added to the model has to be added to the table."""
    assert {row[0] for row in TABLE} >= {code.value for code in ErrorCode}


def test_completed_job_has_no_failure() -> None:
    """Whatever else the event says."""
    assert failure_of(json.loads(ended()), JOB) is None


@pytest.mark.parametrize("code", ["rate_limited", "upstream_unavailable", "truncated", "auth", "cancelled"])
@pytest.mark.parametrize("retriable", [True, False])
def test_retriable_is_that_of_the_terminal_event(code: str, retriable: bool) -> None:
    """The worker knows whether the same call may succeed later."""
    assert of(failed(code, retriable=retriable)).retriable is retriable


@pytest.mark.parametrize("code", ["timeout_first_delta", "timeout_idle", "deadline"])
@pytest.mark.parametrize("retriable", [True, False])
@pytest.mark.parametrize(("source", "expected"), [("none", True), ("estimated", False), ("upstream", False)])
def test_timeout_is_retriable_only_if_nothing_was_generated(
    code: str, retriable: bool, source: str, expected: bool
) -> None:
    """A retry would be paid for again."""
    assert of(failed(code, retriable=retriable, usage_source=source)).retriable is expected


@pytest.mark.parametrize(
    ("code", "after_ms", "expected"),
    [
        ("rate_limited", 1, 1),
        ("rate_limited", 1001, 2),
        ("rate_limited", 60_000, 60),
        ("rate_limited", None, 2),
        ("upstream_unavailable", None, 2),
        ("upstream_unavailable", 9000, 9),
        ("timeout_connect", None, 2),
        ("truncated", None, None),
        ("rate_limited", 0, 2),
        ("rate_limited", -5, 2),
        ("rate_limited", "soon", 2),
        ("rate_limited", True, 2),
    ],
)
def test_retry_after_is_in_whole_seconds(code: str, after_ms: Any, expected: int | None) -> None:
    """Rounded up; every 503 has one."""
    header = of(failed(code, retry_after_ms=after_ms)).headers.get("Retry-After")

    assert header == (None if expected is None else str(expected))


@pytest.mark.parametrize("error", [None, {}, [], "text", {"code": None, "message": None}])
def test_terminal_event_without_error_is_named_after_its_status(error: Any) -> None:
    """A reader must not fail on what it does not know."""
    failure = of(ended("interrupted", error=error))

    assert (failure.status, failure.code, failure.message) == (
        502,
        "interrupted",
        "the job ended interrupted",
    )
    assert failure.retriable is False


@pytest.mark.parametrize("upstream_status", [[400], {"a": 1}, "400", 400.0, True])
def test_upstream_status_of_another_type_is_not_passed_on(upstream_status: Any) -> None:
    """An event of another program or version must not end the request with an exception."""
    failure = of(failed("upstream_rejected", http_status=upstream_status))

    assert (failure.status, failure.code) == (502, "upstream_rejected")


def test_void_attempt_is_retriable() -> None:
    """It names the job, whose new attempt can be read as native events."""
    error = superseded(JOB)

    assert (error.code, error.retriable, error.job_id) == ("attempt_superseded", True, JOB)
