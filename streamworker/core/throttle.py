"""How much may go upstream: so much per minute, and so many streams at once.

A throttle holds for *any* minute, not for the average: a bucket that fills up would let twice its limit pass within
one. The number of streams adapts to what the upstream refuses, as TCP's window does to lost packets.
"""

from __future__ import annotations

from collections import deque
from math import inf

__all__ = ["Concurrency", "Throttle"]

SPAN_S = 61.0
"""A minute, and a second for the way: a call that is on its way counts at the upstream when it arrives."""

CUT = 0.7
CUT_EVERY_S = 1.0
RECOVERY_S = 10.0


class Throttle:
    """At most `limit` within any minute. Times in seconds of a clock that never jumps."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._amounts: deque[Taken] = deque()
        self._sum = 0.0

    def wait_s(self, amount: float, now: float) -> float:
        """Return how long until so much may go, 0 for now. More than the whole limit goes when nothing else did."""
        self._forget(now)
        over = self._sum + min(amount, self.limit) - self.limit
        if over <= 0:
            return 0.0
        for taken in self._amounts:
            over -= taken.amount
            if over <= 0:
                return max(0.0, taken.at + SPAN_S - now)
        return SPAN_S

    def take(self, amount: float, now: float) -> Taken:
        """Let so much go."""
        taken = Taken(now, min(amount, self.limit))
        self._amounts.append(taken)
        self._sum += taken.amount
        return taken

    def settle(self, taken: Taken, amount: float) -> None:
        """Replace what was reserved by what it came to. What is older than a minute is history."""
        if not taken.is_past:
            amount = min(amount, self.limit)  # it fills its minute, and no more than that
            self._sum += amount - taken.amount
            taken.amount = amount

    def _forget(self, now: float) -> None:
        while self._amounts and self._amounts[0].at <= now - SPAN_S:
            past = self._amounts.popleft()
            past.is_past = True
            self._sum -= past.amount
        if not self._amounts:
            self._sum = 0.0  # floats do not add up to nothing by themselves


class Taken:
    """What went, and when."""

    __slots__ = ("amount", "at", "is_past")

    def __init__(self, at: float, amount: float) -> None:
        self.at = at
        self.amount = amount
        self.is_past = False


class Concurrency:
    """How many streams may be open: `ceiling`, or less while the upstream refuses calls with 429.

    Additive increase: the whole ceiling within `RECOVERY_S`. Multiplicative decrease: to `CUT` of what is open, once in
    `CUT_EVERY_S`: an upstream that refuses a share of all calls, whatever we do, must not starve us.
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self._limit = float(ceiling)
        self._known_at = 0.0
        self._cut_at = -CUT_EVERY_S

    def limit(self, now: float) -> int:
        """Return how many streams may be open now, at least one."""
        self._recover(now)
        return int(self._limit)

    def wait_s(self, open_streams: int, now: float) -> float:
        """Return how long until one more fits if none of the open ones ends, 0 for now."""
        if open_streams >= self.ceiling:
            return inf
        self._recover(now)
        return max(0.0, (open_streams + 1 - self._limit) * RECOVERY_S / self.ceiling)

    def refused(self, called_at: float, open_streams: int, now: float) -> None:
        """A call was answered 429. One that was on its way when we last cut says nothing new."""
        self._recover(now)
        if called_at > self._cut_at and now - self._cut_at >= CUT_EVERY_S:
            self._cut_at = now
            self._limit = max(1.0, CUT * min(self._limit, open_streams))

    def _recover(self, now: float) -> None:
        grown = self._limit + (now - self._known_at) * self.ceiling / RECOVERY_S
        self._limit = min(float(self.ceiling), max(self._limit, grown))
        self._known_at = now
