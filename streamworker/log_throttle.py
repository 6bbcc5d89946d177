"""Throttle repeated failure logs: the first, then at most one per interval, with the number suppressed."""

from __future__ import annotations

from math import inf

import structlog

__all__ = ["QUIET_S", "LogThrottle", "OutageLog"]

log = structlog.get_logger()

QUIET_S = 10.0
"""Seconds after a log line during which the same failure is not logged again."""


class LogThrottle:
    """Decide which failures of one kind are logged. Times are in seconds of a monotonic clock."""

    __slots__ = ("_interval_s", "_quiet_until", "_suppressed", "failures")

    def __init__(self, interval_s: float = QUIET_S) -> None:
        self.failures = 0
        self._interval_s = interval_s
        self._suppressed = 0
        self._quiet_until = -inf

    def failed(self, now: float) -> dict[str, int] | None:
        """Count a failure. Return the fields that its log line has besides, or None if it must not be logged.

        The only field is `suppressed`, the number of failures since the last line; it is absent when it is 0.
        """
        self.failures += 1
        if now < self._quiet_until:
            self._suppressed += 1
            return None
        suppressed, self._suppressed = self._suppressed, 0
        self._quiet_until = now + self._interval_s
        return {"suppressed": suppressed} if suppressed else {}


class OutageLog:
    """Log the outages of one resource: each kind of failure under its own event, and one event when it is over."""

    def __init__(self, recovered: str, *, interval_s: float = QUIET_S, **resource: str) -> None:
        """`recovered` is the event that ends an outage; `resource` is added to every line."""
        self._recovered = recovered
        self._interval_s = interval_s
        self._resource = resource
        self._kinds: dict[str, LogThrottle] = {}

    @property
    def failures(self) -> int:
        """Failures since the last success, of every kind."""
        return sum(kind.failures for kind in self._kinds.values())

    def failed(self, event: str, now: float, **facts: object) -> None:
        """Log a failure at level warning, unless the same event was logged less than an interval ago."""
        throttle = self._kinds.get(event)
        if throttle is None:
            throttle = self._kinds[event] = LogThrottle(self._interval_s)
        fields = throttle.failed(now)
        if fields is not None:
            log.warning(event, **self._resource, **facts, **fields)

    def worked(self) -> None:
        """Log the recovery with the number of failures, if there was one since the last success."""
        if self._kinds:
            failures = self.failures
            self._kinds.clear()
            log.info(self._recovered, **self._resource, failures=failures)
