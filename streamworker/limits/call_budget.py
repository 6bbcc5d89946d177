"""How many calls per period an upstream accepts, learned from refusals that ask for a long wait.

A limit per minute that a burst has used up is refused with a wait of nearly a minute. How many calls were accepted
before, and the time until the next one is accepted, show the limit and its period. Without them every period would end
with another burst of refused calls.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from math import inf

__all__ = ["CallBudget"]

LEAST_ADVISED_S = 5.0
"""The shortest wait that shows a limit per period. A shorter one is left to `CallRate`."""

SPAN_S = 61.0
"""How far back calls are counted while no limit is known."""

MAX_PERIOD_S = 120.0
MARGIN = 1.02
"""By how much a period is taken to be longer: the upstream counts a call when it arrives there."""

MAX_CALLS = 100_000
FORGOTTEN_PERIODS = 10
"""Periods without a refusal after which the limit is forgotten."""


class CallBudget:
    """Calls per period; unlimited until a refusal shows a limit. Times in seconds of a clock that never jumps."""

    def __init__(self) -> None:
        self._calls: deque[float] = deque()  # when the calls began that were not refused
        self._limit: int | None = None
        self._period_s = SPAN_S
        self._clean_since = -inf  # without a refusal
        self._grown_at = -inf
        self._growth = 1
        self._was_spent = False  # since the limit grew last

    def is_known(self, now: float) -> bool:
        """Whether a limit was learned and is not forgotten."""
        if self._limit is not None and now - self._clean_since > FORGOTTEN_PERIODS * self._period_s:
            self._limit, self._period_s = None, SPAN_S
        return self._limit is not None

    def wait_s(self, now: float) -> float:
        """Return the seconds until a call may begin; 0 for now."""
        if not self.is_known(now):
            return 0.0
        self._grow(now)
        over = self._used(now) - (self._limit or 0)
        if over < 0:
            return 0.0
        self._was_spent = True
        return max(0.0, self._calls[over] + MARGIN * self._period_s - now)

    def enter(self, now: float) -> None:
        """Begin a call."""
        self._calls.append(now)
        self._used(now)

    def refused(self, entered_at: float, now: float, advised_s: float | None) -> None:
        """Record a 429 for a call that began at `entered_at`: the upstream does not count it."""
        with suppress(ValueError):  # it began longer ago than the period
            self._calls.remove(entered_at)
        if advised_s is None or advised_s < LEAST_ADVISED_S:
            return
        free_at = now + min(advised_s, MAX_PERIOD_S)
        if self.is_known(now):
            self._period_s = max(self._period_s, free_at - now)
        elif self._used(now):
            # The first call of the period is the one whose place becomes free.
            self._period_s = min(MAX_PERIOD_S, free_at - self._calls[0])
        else:
            return  # no call was accepted: nothing shows how many are
        self._limit = max(1, sum(call >= free_at - MARGIN * self._period_s for call in self._calls))
        self._clean_since = self._grown_at = free_at
        self._growth, self._was_spent = max(1, self._limit // 50), False

    def _used(self, now: float) -> int:
        """Return the number of calls in the present period."""
        calls = self._calls
        while calls and (calls[0] <= now - MARGIN * self._period_s or len(calls) > MAX_CALLS):
            calls.popleft()
        return len(calls)

    def _grow(self, now: float) -> None:
        """Try a few more calls after each period that used the whole limit without a refusal."""
        if self._limit is not None and self._was_spent and now - self._grown_at >= MARGIN * self._period_s:
            self._limit += self._growth
            self._growth, self._was_spent, self._grown_at = 2 * self._growth, False, now
