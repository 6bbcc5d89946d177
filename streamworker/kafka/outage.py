"""An outage in the log: what fails ten times a second is said at first, then now and then, and once when it is over."""

from __future__ import annotations

import structlog

from streamworker.core.repeats import Repeats

__all__ = ["Outage"]

log = structlog.get_logger()


class Outage:
    """The outages of one place. Each kind of failure is an event of its own; `recovered` is the one of their end."""

    def __init__(self, recovered: str, **place: str) -> None:
        """`place` goes into every line."""
        self._recovered = recovered
        self._place = place
        self._kinds: dict[str, Repeats] = {}

    def failed(self, event: str, now: float, **facts: object) -> None:
        """Say what failed, if it was not said a moment ago; `repeats` tells how often it was not."""
        repeats = self._kinds.setdefault(event, Repeats()).failed(now)
        if repeats is not None:
            log.warning(event, **self._place, **facts, **({"repeats": repeats} if repeats else {}))

    def worked(self) -> None:
        """Say that it works again, if it did not."""
        if self._kinds:
            failures = sum(kind.failures for kind in self._kinds.values())
            self._kinds.clear()
            log.info(self._recovered, **self._place, failures=failures)
