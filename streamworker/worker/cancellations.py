"""Cancellations that may come before their job does.

A control record names a job by its id, and ids may be used again: a cancellation counts for jobs that were submitted
before it, and never for one that came after, which the record timestamps tell.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from streamworker.text import UPSTREAM_TEXT_LIMIT, truncate

__all__ = ["Cancellations"]


class _Cancel(NamedTuple):
    timestamp: int
    reason: str


class Cancellations:
    """The latest cancellation of each of the newest `remembered` job ids. Timestamps are the records', in ms."""

    def __init__(self, *, remembered: int = 100_000) -> None:
        self._latest: OrderedDict[str, _Cancel] = OrderedDict()
        self._remembered = remembered

    def note(self, job_id: str, timestamp: int, reason: str) -> None:
        """Take a cancellation in."""
        known = self._latest.pop(job_id, None)
        if known is not None and known.timestamp > timestamp:
            timestamp, reason = known
        self._latest[job_id] = _Cancel(timestamp, truncate(reason, UPSTREAM_TEXT_LIMIT))
        while len(self._latest) > self._remembered:
            self._latest.popitem(last=False)

    def reason_for(self, job_id: str, submitted: int) -> str | None:
        """Return why a job that was submitted at this time is cancelled, None if it is not."""
        cancel = self._latest.get(job_id)
        return None if cancel is None or cancel.timestamp < submitted else cancel.reason
