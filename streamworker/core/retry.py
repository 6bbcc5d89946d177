"""Whether and when a failed try is followed by another (wire facts §9). Only ever before the first delta.

After the first delta the partial answer is paid for and published, and no upstream resumes: that is not for here, and
the attempt's table has no row for it.
"""

from __future__ import annotations

import math
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from streamworker.model import Advice, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.model import JobError

__all__ = ["MAX_ADVISED_S", "backoff_s", "falls_back", "next_try_s", "read_advice"]

BASE_S = 0.5
MAX_BACKOFF_S = 8.0
MAX_ADVISED_S = 120.0
"""Longest delay that an upstream may ask for; beyond it the try is the last one. openai-python's number."""

_UPSTREAMS_MATTER = frozenset({ErrorCode.AUTH, ErrorCode.RATE_LIMITED, ErrorCode.UPSTREAM_UNAVAILABLE})


def read_advice(headers: Mapping[str, str], now_s: float) -> Advice:
    """Read `x-should-retry`, `retry-after-ms` and `retry-after` (seconds or a date). `now_s` is since the epoch.

    NaN, infinite and negative values are no advice; a date that has passed means now.
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
    """Return the seconds until the next try, None if this was the last.

    `tries` were made; `random` is in [0, 1); `left_s` is what the job's deadline leaves, infinite without one.
    """
    is_wanted = error.retriable if advice.should_retry is None else advice.should_retry
    if not is_wanted or tries >= max_tries:
        return None
    delay = backoff_s(tries, random) if advice.after_s is None else advice.after_s
    return delay if delay <= MAX_ADVISED_S and delay < left_s else None


def falls_back(error: JobError) -> bool:
    """Whether another upstream may do better: not where the request itself is at fault.

    A key that is refused or an account that is empty (401, 402, 403, a 429 for good) is this upstream's matter.
    """
    return error.retriable or error.code in _UPSTREAMS_MATTER or error.http_status == 402


def backoff_s(tries: int, random: float) -> float:
    """Return a full-jitter delay: anywhere up to an exponentially growing bound."""
    return float(min(MAX_BACKOFF_S, BASE_S * 2 ** min(tries, 16)) * random)


def _number(text: str | None, scale: float = 1.0) -> float | None:
    try:
        value = float(text or "") * scale
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _date(text: str | None, now_s: float) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(text or "").timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None
