"""Cancel records, also those that arrive before their jobs.

A job id may be used again, so a cancel record counts only for jobs that were submitted before it. Times come from the
clocks of two machines: a job that was submitted up to `TOLERANCE_MS` later is cancelled too, unless an earlier job
with this id was submitted before the record. The time inside a UUIDv7 is used in place of the record's timestamp.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamworker.text import UPSTREAM_TEXT_LIMIT, truncate

if TYPE_CHECKING:
    from streamworker.model import Job

__all__ = ["TOLERANCE_MS", "Cancellations", "submitted_ms"]

TOLERANCE_MS = 5000
"""By how much the clock of a cancel record may be behind the clock of its job."""

_UUID7 = re.compile(
    r"(?:^|[^0-9a-f])([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", re.IGNORECASE
)


@dataclass(kw_only=True, slots=True)
class _Cancel:
    timestamp: int
    reason: str


class Cancellations:
    """The latest cancel record of each of the newest `remembered` job ids. Timestamps are in ms."""

    def __init__(self, *, remembered: int = 100_000) -> None:
        self._latest: OrderedDict[str, _Cancel] = OrderedDict()
        self._first_seen: OrderedDict[str, int] = OrderedDict()  # when the first job of an id was submitted
        self._remembered = remembered

    def note(self, job_id: str, timestamp: int, reason: str) -> None:
        """Store a cancel record."""
        cancel = _Cancel(timestamp=timestamp, reason=truncate(reason, UPSTREAM_TEXT_LIMIT))
        known = self._latest.pop(job_id, None)
        self._latest[job_id] = known if known is not None and known.timestamp > timestamp else cancel
        while len(self._latest) > self._remembered:
            self._latest.popitem(last=False)

    def reason_for(self, job: Job) -> str | None:
        """Return why this job is cancelled; None if it is not. Call it once when the job arrives, at least."""
        submitted = submitted_ms(job)
        first = self._first_seen.setdefault(job.job_id, submitted)
        while len(self._first_seen) > self._remembered:
            self._first_seen.popitem(last=False)
        cancel = self._latest.get(job.job_id)
        if cancel is None:
            return None
        is_reused = first < submitted and first <= cancel.timestamp
        late_ms = submitted - cancel.timestamp
        return cancel.reason if late_ms <= (0 if is_reused else TOLERANCE_MS) else None


def submitted_ms(job: Job) -> int:
    """Return when a job was submitted, in ms since the epoch: the time in its id, else its record's timestamp."""
    if (found := _UUID7.search(job.job_id)) is not None:
        return int(found[1] + found[2], 16)
    return job.timestamp
