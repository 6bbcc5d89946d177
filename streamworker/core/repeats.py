"""What fails again and again, said at first and then now and then: ten lines a second hide all others."""

from __future__ import annotations

from math import inf

__all__ = ["Repeats"]

QUIET_S = 10.0
"""How long what was said is not said again."""


class Repeats:
    """The failures of one kind during one outage. Times in seconds of a clock that never jumps."""

    def __init__(self) -> None:
        self.failures = 0
        self._kept_back = 0
        self._quiet_until = -inf

    def failed(self, now: float) -> int | None:
        """Return how many were kept back since the last that was said; None to keep back this one, too."""
        self.failures += 1
        if now < self._quiet_until:
            self._kept_back += 1
            return None
        kept_back, self._kept_back = self._kept_back, 0
        self._quiet_until = now + QUIET_S
        return kept_back
