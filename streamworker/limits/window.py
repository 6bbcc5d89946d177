"""How much may go upstream per minute: in *any* minute, not on average.

A bucket that fills up would let twice its limit pass within one.
"""

from __future__ import annotations

from collections import deque

__all__ = ["SlidingWindow"]

SPAN_S = 61.0
"""A minute, and a second for the way: a call that is on its way counts at the upstream when it arrives."""


class SlidingWindow:
    """At most `limit` within any minute. Times in seconds of a clock that never jumps."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._amounts: deque[Reservation] = deque()
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

    def take(self, amount: float, now: float) -> Reservation:
        """Let so much go."""
        taken = Reservation(now, min(amount, self.limit))
        self._amounts.append(taken)
        self._sum += taken.amount
        return taken

    def settle(self, taken: Reservation, amount: float) -> None:
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


class Reservation:
    """What went, and when."""

    __slots__ = ("amount", "at", "is_past")

    def __init__(self, at: float, amount: float) -> None:
        self.at = at
        self.amount = amount
        self.is_past = False
