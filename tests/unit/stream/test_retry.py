"""Whether and when a failed try is followed by another."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import Advice, ErrorCode, JobError
from streamworker.stream.retry import (
    MAX_ADVISED_S,
    backoff_s,
    duration_s,
    falls_back,
    next_try_s,
    read_advice,
    with_advice,
)

NOW = 1_700_000_000.0
RETRIABLE = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "busy", 503, retriable=True)
RETRIABLE_AFTER = JobError(ErrorCode.UPSTREAM_ERROR, "busy", 200, retriable=True, retry_after_ms=2500)
FINAL = JobError(ErrorCode.RATE_LIMITED, "no money", 429, retriable=False)
NOT_FOUND = JobError(ErrorCode.UPSTREAM_REJECTED, "not here", 404)
REFUSED_KEY = JobError(ErrorCode.AUTH, "no such key", 401)
BAD_REQUEST = JobError(ErrorCode.UPSTREAM_REJECTED, "bad", 400)


@pytest.mark.parametrize(
    ("headers", "advice"),
    [
        ({}, Advice()),
        ({"retry-after": "2"}, Advice(None, 2.0)),
        ({"retry-after": "1.5"}, Advice(None, 1.5)),
        ({"retry-after-ms": "250", "retry-after": "9"}, Advice(None, 0.25)),
        ({"retry-after-ms": "nan", "retry-after": "9"}, Advice(None, 9.0)),
        ({"retry-after-ms": "250, 500"}, Advice(None, 0.5)),
        ({"retry-after-ms": "0", "retry-after": "9"}, Advice(None, 0.0)),
        ({"retry-after-ms": "Tue, 14 Nov 2023 22:13:30 GMT"}, Advice()),
        ({"retry-after": "-1"}, Advice()),
        ({"retry-after": "inf"}, Advice()),
        ({"retry-after": "NaN"}, Advice()),
        ({"retry-after": "soon"}, Advice()),
        ({"retry-after": ""}, Advice()),
        ({"retry-after": "1_0"}, Advice()),
        ({"retry-after": "٥"}, Advice()),
        ({"retry-after": "1e2"}, Advice(None, 100.0)),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:30 -0000"}, Advice(None, 10.0)),
        ({"retry-after": "Tue Nov 14 22:13:30 2023"}, Advice(None, 10.0)),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:30 GMT"}, Advice(None, 10.0)),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:00 GMT"}, Advice(None, 0.0)),
        ({"retry-after": "2, 3"}, Advice(None, 3.0)),
        ({"retry-after": "3, soon, 2"}, Advice(None, 3.0)),
        ({"retry-after": "1," * 7 + "8,9"}, Advice(None, 8.0)),
        ({"retry-after": "2s"}, Advice(None, 2.0)),
        ({"retry-after": "6m0s"}, Advice(None, 360.0)),
        ({"retry-after": "1h 2 min"}, Advice(None, 3720.0)),
        ({"retry-after": "2 parsecs"}, Advice()),
        ({"retry-after": "120ms"}, Advice(None, 0.12)),
        ({"x-should-retry": "false", "retry-after": "1"}, Advice(False, 1.0)),
        ({"x-should-retry": " TRUE "}, Advice(True, None)),
        ({"x-should-retry": "maybe"}, Advice()),
    ],
)
def test_read_advice_of_headers(headers: dict[str, str], advice: Advice) -> None:
    """Every form that upstreams send is read; invalid values are ignored."""
    assert advice == read_advice(headers, NOW)


@pytest.mark.parametrize(
    ("error", "advice", "tries", "left_s", "delay"),
    [
        (RETRIABLE, Advice(), 1, inf, 0.5),
        (RETRIABLE, Advice(), 2, inf, 1.0),
        (RETRIABLE, Advice(None, 3.0), 1, inf, 3.0),
        (RETRIABLE, Advice(), 3, inf, 2.0),
        (RETRIABLE, Advice(), 4, inf, None),
        (RETRIABLE, Advice(None, 120.0), 1, inf, 120.0),
        (RETRIABLE, Advice(None, 120.1), 1, inf, None),
        (RETRIABLE, Advice(None, 3.0), 1, 3.1, 3.0),
        (RETRIABLE, Advice(None, 3.0), 1, 3.0, None),
        (RETRIABLE, Advice(None, MAX_ADVISED_S + 1), 1, inf, None),
        (RETRIABLE, Advice(False, None), 1, inf, None),
        (FINAL, Advice(), 1, inf, None),
        (FINAL, Advice(None, 1.0), 1, inf, None),
        (FINAL, Advice(True, 1.0), 1, inf, 1.0),  # the upstream decides, whatever the status is
        (NOT_FOUND, Advice(True, 1.0), 1, inf, 1.0),
        (REFUSED_KEY, Advice(True, 1.0), 1, inf, 1.0),
        (BAD_REQUEST, Advice(True, 1.0), 1, inf, 1.0),
        (RETRIABLE_AFTER, Advice(), 1, inf, 2.5),
        (RETRIABLE_AFTER, Advice(None, 1.0), 1, inf, 1.0),
        (RETRIABLE, Advice(None, 0.0), 2, inf, 1.0),  # a delay of 0 does not replace the backoff
    ],
)
def test_next_try_follows_error_advice_tries_and_deadline(
    error: JobError, advice: Advice, tries: int, left_s: float, delay: float | None
) -> None:
    """The upstream's advice comes first, then the error; never after the deadline, never more than
    max_tries."""
    assert delay == next_try_s(error, advice, tries=tries, max_tries=4, random=0.5, left_s=left_s)


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_backoff_stays_within_its_bounds(tries: int, random: float) -> None:
    """A delay is neither negative nor longer than the maximum."""
    assert 0 <= backoff_s(tries, random) <= 8


@pytest.mark.parametrize(
    ("tries", "bound"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0), (17, 8.0), (10**6, 8.0)]
)
def test_backoff_bound_doubles_up_to_the_maximum(tries: int, bound: float) -> None:
    """The delay is the random part of the bound."""
    assert [backoff_s(tries, random) for random in (0.0, 0.25, 0.5)] == [0.0, bound / 4, bound / 2]


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=10))
def test_read_advice_of_any_text_is_a_finite_delay_or_none(
    milliseconds: str, after: str, should: str
) -> None:
    """Whatever the headers contain, a delay is a finite number of seconds."""
    headers = {"retry-after-ms": milliseconds, "retry-after": after, "x-should-retry": should}
    delay = read_advice(headers, NOW).after_s

    assert delay is None or 0 <= delay < inf


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (RETRIABLE, True),
        (FINAL, True),
        (REFUSED_KEY, True),
        (JobError(ErrorCode.QUOTA, "pay first", 402), True),
        (JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "no TLS"), True),
        (NOT_FOUND, False),
        (BAD_REQUEST, False),
        (JobError(ErrorCode.UPSTREAM_PROTOCOL, "a page of HTML", 200), False),
    ],
)
def test_falls_back_where_the_upstream_is_at_fault(error: JobError, elsewhere: bool) -> None:
    """A refused key concerns this upstream alone; a bad request is bad everywhere."""
    assert falls_back(error) is elsewhere


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({"x-ratelimit-reset-requests": "6m0s"}, 360.0),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "9s"}, 1.0),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "5",
                "x-ratelimit-reset-tokens": "9s",
                "x-ratelimit-remaining-tokens": "0",
            },
            9.0,
        ),
        ({"x-ratelimit-reset-tokens": "-1"}, None),
        ({"x-ratelimit-reset": f"{NOW + 5:.0f}"}, 5.0),
        ({"x-ratelimit-reset": f"{(NOW + 5) * 1000:.0f}"}, 5.0),
        ({"x-ratelimit-reset": f"{NOW - 5:.0f}"}, 0.0),
        ({"x-ratelimit-reset": "999999999"}, 999_999_999.0),
        ({"x-ratelimit-reset": "1000000000"}, 0.0),
        ({"X-RateLimit-Reset": "5"}, 5.0),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "9s",
                "x-ratelimit-remaining-tokens": "0",
            },
            9.0,
        ),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "5"}, None),
        ({"ratelimit-reset": "30"}, 30.0),
        ({"anthropic-ratelimit-tokens-reset": "2023-11-14T22:13:50Z"}, 30.0),
        ({"anthropic-ratelimit-tokens-reset": "2023-11-14T22:13:00Z"}, 0.0),
        ({"anthropic-ratelimit-tokens-reset": "2023-11-14"}, None),
        ({"retry-after": "2", "x-ratelimit-reset-requests": "6m0s"}, 2.0),
        ({"x-reset": "5"}, None),
    ],
)
def test_read_advice_of_rate_limit_headers(headers: dict[str, str], after_s: float | None) -> None:
    """They count for a 429 without `retry-after`: the limits that are used up, or else the soonest."""
    assert read_advice(headers, NOW, status=429).after_s == after_s
    assert read_advice(headers, NOW, status=503).after_s == (after_s if "retry-after" in headers else None)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (3, 3.0),
        (0.5, 0.5),
        ("1.5", 1.5),
        (" 2S ", 2.0),
        ("1m1s", 61.0),
        (-1, None),
        (True, None),
        (None, None),
        (float("nan"), None),
        (10**400, None),
        ("", None),
        ("s", None),
        ("1s later", None),
        ("later 1s", None),
        ("250 ms", 0.25),
        ("2 hours", 7200.0),
        ("1m", 60.0),
        ("+2", 2.0),
        ("1" * 16, None),
        ("1e99", 1e99),
        ("1e400", None),
        ({}, None),
    ],
)
def test_duration_s_of_numbers_and_texts(value: Any, seconds: float | None) -> None:
    """Numbers are seconds, texts may have units; anything else is None."""
    assert duration_s(value) == seconds


def test_with_advice_prefers_the_headers_delay() -> None:
    """In ms, rounded up, and never more than a JSON reader holds exactly."""
    assert with_advice(RETRIABLE_AFTER, Advice(None, 1e300)).retry_after_ms == (1 << 53) - 1
    assert with_advice(RETRIABLE_AFTER, Advice(None, 0.0)).retry_after_ms == 0
    assert with_advice(RETRIABLE, Advice()) is RETRIABLE
    assert with_advice(RETRIABLE_AFTER, Advice(None, 1.0001)).retry_after_ms == 1001
