"""Limits an amount per minute: in any minute, not on average.

A token bucket would allow twice its limit within one minute.
"""

from __future__ import annotations

from collections import deque

__all__ = ["SlidingWindow"]

SPAN_S = 61.0
"""A minute plus a second of network delay: the upstream counts a call when it arrives there."""


class SlidingWindow:
    """Allows at most `limit` within any minute. Times are in seconds on a monotonic clock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._amounts: deque[Reservation] = deque()
        self._sum = 0.0

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` fits, 0 for now. An amount above the whole limit fits into an
        empty window."""
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
        """Reserve an amount now."""
        taken = Reservation(now, min(amount, self.limit))
        self._amounts.append(taken)
        self._sum += taken.amount
        return taken

    def settle(self, taken: Reservation, amount: float) -> None:
        """Replace a reserved amount by the actual one. Reservations older than a minute are not changed."""
        if not taken.is_past:
            amount = min(amount, self.limit)  # a reservation never exceeds the whole limit
            self._sum += amount - taken.amount
            taken.amount = amount

    def _forget(self, now: float) -> None:
        while self._amounts and self._amounts[0].at <= now - SPAN_S:
            past = self._amounts.popleft()
            past.is_past = True
            self._sum -= past.amount
        if not self._amounts:
            self._sum = 0.0  # remove the rounding error of the float sum


class Reservation:
    """An amount and the time at which it was reserved."""

    __slots__ = ("amount", "at", "is_past")

    def __init__(self, at: float, amount: float) -> None:
        self.at = at
        self.amount = amount
        self.is_past = False
