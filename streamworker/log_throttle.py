"""Throttle repeated failure logs: the first, then at most one per interval, with the number suppressed."""

from __future__ import annotations

from math import inf

import structlog

__all__ = ["LogThrottle", "OutageLog"]

log = structlog.get_logger()

QUIET_S = 10.0
"""How long what was said is not said again."""


class LogThrottle:
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


class OutageLog:
    """The outages of one place. Each kind of failure is an event of its own; `recovered` is the one of their end."""

    def __init__(self, recovered: str, **place: str) -> None:
        """`place` goes into every line."""
        self._recovered = recovered
        self._place = place
        self._kinds: dict[str, LogThrottle] = {}

    def failed(self, event: str, now: float, **facts: object) -> None:
        """Say what failed, if it was not said a moment ago; `repeats` tells how often it was not."""
        suppressed = self._kinds.setdefault(event, LogThrottle()).failed(now)
        if suppressed is not None:
            log.warning(event, **self._place, **facts, **({"repeats": suppressed} if suppressed else {}))

    def worked(self) -> None:
        """Say that it works again, if it did not."""
        if self._kinds:
            failures = sum(kind.failures for kind in self._kinds.values())
            self._kinds.clear()
            log.info(self._recovered, **self._place, failures=failures)
