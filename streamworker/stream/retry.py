"""Retry policy: whether and when another try follows a try that failed before its first delta.

After the first delta no try follows: the partial answer is published and billed, and no upstream can resume it.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.model import Advice, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamworker.model import JobError

__all__ = [
    "MAX_ADVISED_S",
    "backoff_s",
    "duration_s",
    "falls_back",
    "next_try_s",
    "read_advice",
    "to_ms",
    "with_advice",
]

BASE_S = 0.5
MAX_BACKOFF_S = 8.0
MAX_ADVISED_S = 120.0
"""Longest delay that an upstream may ask for. If it asks for more, no try follows. openai-python uses the same limit."""

# float() also accepts "1_0", "nan" and digits of other alphabets.
_DECIMAL = re.compile(r"\+?[0-9]{1,15}(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?")
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,9})?)\s*([a-z]+)\s*")
_UNITS = {
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 0.001),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
}
# OpenAI's `x-ratelimit-reset-tokens`, Anthropic's `anthropic-ratelimit-tokens-reset`, IETF's `ratelimit-reset`.
_RESET = re.compile(r"(?:x-|anthropic-)?rate-?limit(?P<of>-[a-z-]+?)??-reset(?P<after>-[a-z-]+)?")
_FIRST_EPOCH_S = 1e9
"""Numbers from here on are points in time: seconds since the epoch, or ms from a thousand times as much on."""

_UPSTREAMS_OWN = frozenset(
    {ErrorCode.AUTH, ErrorCode.QUOTA, ErrorCode.RATE_LIMITED, ErrorCode.UPSTREAM_UNAVAILABLE}
)


def read_advice(headers: Mapping[str, str], now_s: float, *, status: int | None = None) -> Advice:
    """Read what a response's headers say about another try. `now_s` is in seconds since the epoch.

    `retry-after-ms` comes before `retry-after`, which is in seconds, a duration such as `6m0s`, or a date; of a header
    that is sent twice the longer delay counts. Where a response of status 429 has neither, the reset of its rate
    limits counts. NaN, infinite and negative values are ignored. A date in the past means now; a date without a zone
    is in UTC.
    """
    should = {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())
    after = _longest(headers.get("retry-after-ms"), now_s, scale=0.001)
    if after is None:
        after = _longest(headers.get("retry-after"), now_s)
    if after is None and status == 429:
        after = _reset_s(headers, now_s)
    return Advice(should, after)


def with_advice(error: JobError, advice: Advice) -> JobError:
    """Return the error with the delay that the headers name. It comes before the delay that the body names."""
    if advice.after_s is None:
        return error
    return msgspec.structs.replace(error, retry_after_ms=to_ms(advice.after_s))


def next_try_s(
    error: JobError, advice: Advice, *, tries: int, max_tries: int, random: float, left_s: float
) -> float | None:
    """Return the seconds until the next try, or None if no try follows.

    `x-should-retry` decides before the error does. `tries` is the number of tries made; `random` is in [0, 1);
    `left_s` is the time until the job's deadline, infinite without one.
    """
    is_wanted = error.retriable if advice.should_retry is None else advice.should_retry
    if tries >= max_tries or not is_wanted:
        return None
    after_s = advice.after_s
    if after_s is None and error.retry_after_ms is not msgspec.UNSET:
        after_s = error.retry_after_ms / 1000
    if not after_s:  # a delay of 0 does not replace the backoff
        delay = backoff_s(tries, random)
    elif after_s > MAX_ADVISED_S:
        return None
    else:
        delay = after_s
    return delay if delay < left_s else None


def falls_back(error: JobError) -> bool:
    """Whether another upstream may succeed. It cannot where the request itself is at fault.

    A refused key and an empty account concern this upstream alone.
    """
    return error.retriable or error.code in _UPSTREAMS_OWN


def backoff_s(tries: int, random: float) -> float:
    """Return a delay with full jitter: uniform between 0 and an exponentially growing bound."""
    return float(min(MAX_BACKOFF_S, BASE_S * 2 ** min(tries, 16)) * random)


def duration_s(value: Any, *, scale: float = 1.0) -> float | None:
    """Return a duration in seconds: a number times `scale`, or a text with units such as `2s` and `6m0s`.

    Return None for anything else: negative, infinite, or in another form.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if _DECIMAL.fullmatch(text):
            value = float(text)
        else:
            return _with_units(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        seconds = float(value) * scale
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def to_ms(seconds: float) -> int:
    """Return a delay in whole ms, rounded up."""
    return min(math.ceil(seconds * 1000), (1 << 53) - 1)


def _with_units(text: str) -> float | None:
    seconds, end = 0.0, 0
    while (part := _PART.match(text, end)) is not None and part[2] in _UNITS:
        seconds += float(part[1]) * _UNITS[part[2]]
        end = part.end()
    return seconds if end and end == len(text) else None


def _longest(text: str | None, now_s: float, scale: float = 1.0) -> float | None:
    """Read a header that may have been sent several times, in which case its values are joined by commas."""
    if text is None:
        return None
    if (after := _after_s(text, now_s, scale)) is not None:
        return after
    values = [_after_s(part, now_s, scale) for part in text.split(",")[:8]] if "," in text else []
    return max((value for value in values if value is not None), default=None)


def _after_s(text: str, now_s: float, scale: float = 1.0) -> float | None:
    after = duration_s(text, scale=scale)
    return _date(text, now_s) if after is None and scale == 1.0 else after


def _reset_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return the time until the limits that are used up are reset; the soonest one where the headers do not say which."""
    spent: list[float] = []
    resets: list[float] = []
    for name, after in _resets(headers, now_s):
        remaining = headers.get(name.replace("reset", "remaining"), "").strip()
        if remaining in {"", "0"}:
            (spent if remaining else resets).append(after)
    if spent:
        return max(spent)
    return min(resets, default=None)


def _resets(headers: Mapping[str, str], now_s: float) -> Iterator[tuple[str, float]]:
    for name in headers:
        if _RESET.fullmatch(name.lower()) is None:
            continue
        after = _after_s(headers[name], now_s)
        if after is None:
            after = _rfc_3339(headers[name], now_s)
        elif after >= _FIRST_EPOCH_S:
            seconds = after / 1000 if after >= 1000 * _FIRST_EPOCH_S else after
            after = max(0.0, seconds - now_s)
        if after is not None:
            yield name.lower(), after


def _date(text: str, now_s: float) -> float | None:
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # asctime, or "-0000", which Python would read as local time
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None


def _rfc_3339(text: str, now_s: float) -> float | None:
    try:
        date = datetime.fromisoformat(text.strip())
        return None if date.tzinfo is None else max(0.0, date.timestamp() - now_s)
    except (ValueError, OverflowError):
        return None
