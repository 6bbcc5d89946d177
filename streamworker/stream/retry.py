"""Retry policy: whether and when another try follows a try that failed before its first delta.

After the first delta no try follows: the partial answer is published and billed, and no upstream can resume
it.
"""

from __future__ import annotations

import math
import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from streamworker.model import Advice, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.model import JobError

__all__ = ["MAX_ADVISED_S", "backoff_s", "falls_back", "next_try_s", "read_advice"]

BASE_S = 0.5
MAX_BACKOFF_S = 8.0
_DECIMAL = re.compile(r"\+?[0-9]{1,9}(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?")
MAX_ADVISED_S = 120.0
"""Longest delay that an upstream may ask for. If it asks for more, no try follows. openai-python uses the
same limit."""

_UPSTREAMS_MATTER = frozenset(
    {ErrorCode.AUTH, ErrorCode.QUOTA, ErrorCode.RATE_LIMITED, ErrorCode.UPSTREAM_UNAVAILABLE}
)


def read_advice(headers: Mapping[str, str], now_s: float) -> Advice:
    """Read `x-should-retry`, `retry-after-ms` and `retry-after` (seconds or a date). `now_s` is in seconds since
    the epoch.

    NaN, infinite and negative values are ignored. A date in the past means now; a date without a zone is in
    UTC.
    """
    should = {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())
    after = _number(headers.get("retry-after-ms"), scale=0.001)
    if after is None:
        after = _number(headers.get("retry-after")) if "retry-after" in headers else None
    if after is None:
        after = _date(headers.get("retry-after"), now_s)
    return Advice(should, after)


def next_try_s(
    error: JobError, advice: Advice, *, tries: int, max_tries: int, random: float, left_s: float
) -> float | None:
    """Return the seconds until the next try, or None if no try follows.

    `tries` is the number of tries made; `random` is in [0, 1); `left_s` is the time until the job's deadline,
    infinite without one.
    """
    if tries >= max_tries or not _is_wanted(error, advice):
        return None
    if not advice.after_s:  # a delay of 0 does not replace the backoff
        delay = backoff_s(tries, random)
    elif advice.after_s > MAX_ADVISED_S:
        return None
    else:
        delay = advice.after_s
    return delay if delay < left_s else None


def _is_wanted(error: JobError, advice: Advice) -> bool:
    """Whether another try may succeed. No header makes a refused key, an empty account or a bad request succeed."""
    if advice.should_retry is None or error.retriable:
        return error.retriable and advice.should_retry is not False
    is_hopeless = error.code in {
        ErrorCode.AUTH,
        ErrorCode.QUOTA,
        ErrorCode.RATE_LIMITED,
    } or error.http_status in {400, 422}
    return advice.should_retry and not is_hopeless


def falls_back(error: JobError) -> bool:
    """Whether another upstream may succeed. It cannot where the request itself is at fault.

    A refused key and an empty account concern this upstream alone.
    """
    return error.retriable or error.code in _UPSTREAMS_MATTER


def backoff_s(tries: int, random: float) -> float:
    """Return a delay with full jitter: uniform between 0 and an exponentially growing bound."""
    return float(min(MAX_BACKOFF_S, BASE_S * 2 ** min(tries, 16)) * random)


def _number(text: str | None, scale: float = 1.0) -> float | None:
    digits = (text or "").strip()
    if not _DECIMAL.fullmatch(digits):  # float() also accepts "1_0", "nan" and digits of other alphabets
        return None
    value = float(digits) * scale
    return value if math.isfinite(value) else None


def _date(text: str | None, now_s: float) -> float | None:
    try:
        date = parsedate_to_datetime(text or "")
        if date.tzinfo is None:  # asctime, or "-0000", which Python would read as local time
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None
