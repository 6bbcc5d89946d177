"""A cache of the snapshots of ended jobs."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from streamworker.wire.json import encode

if TYPE_CHECKING:
    from streamworker.gateway.feeds import JobSnapshot

__all__ = ["EndedJobs"]

_BYTES = 32 << 20
_FRESH_S = 60.0
"""For how long a snapshot is returned. A job that is run again has another ending then."""

_OVERHEAD = 1000


class _Entry(NamedTuple):
    snapshot: JobSnapshot
    size: int
    expires: float


class EndedJobs:
    """A cache that is bounded in bytes; the entries that were used least recently are dropped."""

    def __init__(self, limit_bytes: int = _BYTES, fresh_s: float = _FRESH_S) -> None:
        self._limit = limit_bytes
        self._fresh_s = fresh_s
        self._jobs: OrderedDict[bytes, _Entry] = OrderedDict()
        self.size = 0
        """Estimated size of the entries, in bytes."""

    def get(self, key: bytes, now: float) -> JobSnapshot | None:
        """Return the snapshot of a job. `now` is a monotonic time in seconds."""
        entry = self._jobs.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            self.forget(key)
            return None
        self._jobs.move_to_end(key)
        return entry.snapshot

    def add(self, key: bytes, snapshot: JobSnapshot, now: float) -> None:
        """Keep the snapshot of an ended job, unless it is larger than an eighth of the limit."""
        size = _OVERHEAD + len(encode(list(snapshot.choices))) + len(snapshot.ending_value or b"")
        if size > self._limit // 8:
            return
        self.forget(key)
        self._jobs[key] = _Entry(snapshot, size, now + self._fresh_s)
        self.size += size
        while self.size > self._limit:
            self.size -= self._jobs.popitem(last=False)[1].size

    def forget(self, key: bytes) -> None:
        """Drop a job: it is run again."""
        if (entry := self._jobs.pop(key, None)) is not None:
            self.size -= entry.size

    def clear(self) -> None:
        """Drop all jobs."""
        self._jobs.clear()
        self.size = 0
