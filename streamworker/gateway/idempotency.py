"""Requests that make a job, remembered for a while: a repeated one gets the same job. Bounded, per process."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from streamworker.gateway.jobs import Submitted

__all__ = ["KEEP_S", "MAX_ENTRIES", "Entry", "Memory"]

KEEP_S = 600.0
MAX_ENTRIES = 20_000
"""Entries that are kept, of some 400 bytes each. The oldest one is forgotten for a new one."""


@dataclass(kw_only=True)
class Entry:
    """One request: the digest of its body, and the job that it made or is making."""

    digest: bytes
    job_id: str
    expires_at: float
    task: asyncio.Task[Submitted]


class Memory:
    """Entries by a key, for `KEEP_S` seconds. Times are in seconds of a monotonic clock."""

    def __init__(self, keep_s: float = KEEP_S, max_entries: int = MAX_ENTRIES) -> None:
        self._keep_s = keep_s
        self._max_entries = max_entries
        self._entries: OrderedDict[object, Entry] = OrderedDict()
        self._by_job: dict[str, object] = {}

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._entries)

    def find(self, key: object, now: float) -> Entry | None:
        """Return the entry of a key, unless it has expired."""
        self._expire(now)
        return self._entries.get(key)

    def add(
        self, key: object, digest: bytes, job_id: str, task: asyncio.Task[Submitted], now: float
    ) -> Entry:
        """Remember a request."""
        self._expire(now)
        self._remove(key)
        while len(self._entries) >= self._max_entries:
            self._remove(next(iter(self._entries)))
        entry = Entry(digest=digest, job_id=job_id, expires_at=now + self._keep_s, task=task)
        self._entries[key] = entry
        self._by_job[job_id] = key
        return entry

    def forget(self, key: object, entry: Entry) -> None:
        """Forget a request, if the entry of its key is still this one."""
        if self._entries.get(key) is entry:
            self._remove(key)

    def forget_job(self, job_id: str) -> None:
        """Forget the request that made a job."""
        if job_id in self._by_job:
            self._remove(self._by_job[job_id])

    def _remove(self, key: object) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and self._by_job.get(entry.job_id) == key:
            del self._by_job[entry.job_id]

    def _expire(self, now: float) -> None:
        while self._entries:
            key = next(iter(self._entries))
            if self._entries[key].expires_at > now:
                return
            self._remove(key)
