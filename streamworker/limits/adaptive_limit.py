"""How many streams may be open at an upstream: it adapts to what is refused, as TCP's window does to lost packets."""

from __future__ import annotations

from math import inf

__all__ = ["AdaptiveLimit"]

CUT = 0.7
CUT_EVERY_S = 1.0
RECOVERY_S = 10.0


class AdaptiveLimit:
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
