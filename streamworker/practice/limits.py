"""Limits that the server enforces, and mishaps: random faults of a share of the calls."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from math import ceil
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from streamworker.practice.script import Fault

if TYPE_CHECKING:
    from streamworker.practice.script import Script

WINDOW_S: Final = 60.0
_STREAMS_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits; None means unlimited. Requests and tokens are counted over the last 60 seconds.

    A call that exceeds a limit is answered 429 with `retry-after` and `retry-after-ms`, and is not counted. The tokens
    of the prompt and of the whole answer are counted when the call arrives.
    """

    streams: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishaps:
    """Shares (0 to 1) of calls that fail although their script has no fault. `seed` determines which ones.

    `limited` calls are answered 429; `stalled` calls stop sending and `broken` calls are reset, each after a random
    number of deltas. A fault of the script has precedence.
    """

    limited: float = 0.0
    stalled: float = 0.0
    broken: float = 0.0
    seed: int = 0
    retry_after_ms: int = 100

    def __post_init__(self) -> None:
        """Validate that the shares add up to at most 1. Raises ValueError."""
        shares = (self.limited, self.stalled, self.broken)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"the shares of mishaps add up to {sum(shares):g}: they must be 0 to 1 together")


class Excess(NamedTuple):
    """The limit that a call exceeds, and the time until the next call is allowed."""

    limit: str
    retry_after_s: float

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Return the retry headers as OpenAI and Azure send them."""
        return [
            ("retry-after", str(ceil(self.retry_after_s))),
            ("retry-after-ms", f"{self.retry_after_s * 1000:.0f}"),
        ]


class CallLimiter:
    """Enforce the limits. `now` is in seconds of a monotonic clock."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._came: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self.open = 0
        self.peak = 0

    def enter(self, now: float, tokens: int) -> Excess | None:
        """Admit a call, which must call `leave` at its end; or return the limit that it exceeds."""
        self._forget(now - WINDOW_S)
        excess = self._excess(now, tokens)
        if excess is None:
            self._came.append((now, tokens))
            self._tokens += tokens
            self.open += 1
            self.peak = max(self.peak, self.open)
        return excess

    def leave(self) -> None:
        """Release an admitted call."""
        self.open -= 1

    def _excess(self, now: float, tokens: int) -> Excess | None:
        limits = self._limits
        if limits.streams is not None and self.open >= limits.streams:
            return Excess("streams", _STREAMS_RETRY_S)
        if limits.requests_per_minute is not None and len(self._came) >= limits.requests_per_minute:
            return Excess("requests_per_minute", self._until(now, calls=1))
        if limits.tokens_per_minute is not None and self._tokens + tokens > limits.tokens_per_minute:
            over = self._tokens + tokens - limits.tokens_per_minute
            return Excess("tokens_per_minute", self._until(now, tokens=over))
        return None

    def _until(self, now: float, calls: int = 0, tokens: int = 0) -> float:
        """Return the seconds until this number of calls or tokens has left the window."""
        for came, cost in self._came:
            calls -= 1
            tokens -= cost
            if calls <= 0 and tokens <= 0:
                return came + WINDOW_S - now
        return WINDOW_S

    def _forget(self, before: float) -> None:
        while self._came and self._came[0][0] <= before:
            self._tokens -= self._came.popleft()[1]


class Luck:
    """Draw the mishap of each call."""

    def __init__(self, mishaps: Mishaps) -> None:
        self._mishaps = mishaps
        self._random = Random(mishaps.seed)  # noqa: S311 - the same seed must give the same mishaps

    def befall(self, script: Script, deltas: int) -> tuple[Script, str | None]:
        """Return the script with a mishap inserted, and the mishap's name. `deltas` is the number of deltas of the script."""
        drawn, after = self._random.random(), self._random.randint(0, deltas)
        if script != script.well():
            return script, None
        mishaps = self._mishaps
        for name, share in (
            ("limited", mishaps.limited),
            ("stalled", mishaps.stalled),
            ("broken", mishaps.broken),
        ):
            if drawn < share:
                return self._with(script, name, after), name
            drawn -= share
        return script, None

    def _with(self, script: Script, mishap: str, after: int) -> Script:
        if mishap == "limited":
            return replace(script, status=429, retry_after_ms=str(self._mishaps.retry_after_ms))
        return replace(script, fault=Fault.STALL if mishap == "stalled" else Fault.BREAK, after=after)
