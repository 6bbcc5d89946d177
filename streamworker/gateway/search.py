"""Where to look for a job's first event without an index: the plan of a search, from the id alone.

The log is searched from an offset that belongs to a time before the job was submitted. The search ends at the first
event of the job. If that is not a `started`, the bound was too late (the clock of a worker is slow), and the plan steps
back, each time four times as far, until a `started` is found or the log begins.

There is no I/O and no clock here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SearchLimits", "SearchPlan"]

_STEP = 4
_CREATE_TIME_MARGIN_S = 60.0
_APPEND_TIME_MARGIN_S = 5.0
_LONGEST_WAIT_MS = 7 * 24 * 3_600_000
"""Kafka's default retention: a job that was submitted before is in no topic any more, and waits for nothing."""


@dataclass(frozen=True, kw_only=True)
class SearchLimits:
    """How far a search may go."""

    lookback_s: float = 3600.0
    """For ids without a time, if the client gives none."""

    max_records: int = 2_000_000
    max_s: float = 10.0


class SearchPlan:
    """The search for one job in one partition.

    `id_ms` is the time in the job's id, `since_ms` the one that the client gave, both in ms since the epoch.
    `has_append_time`: whether the broker sets the records' timestamps, so that no worker's clock matters.
    """

    def __init__(
        self,
        limits: SearchLimits,
        *,
        now_ms: int,
        id_ms: int | None = None,
        since_ms: int | None = None,
        has_append_time: bool = False,
    ) -> None:
        self._limits = limits
        margin_s = _APPEND_TIME_MARGIN_S if has_append_time else _CREATE_TIME_MARGIN_S
        self._margin_ms = round(margin_s * 1000)
        known = [time for time in (since_ms, id_ms) if time is not None]
        self._has_time = bool(known)
        lookback_ms = round(limits.lookback_s * 1000)
        self._submitted_ms = min(now_ms, known[0]) if known else now_ms - lookback_ms + self._margin_ms
        self._fresh_ms = now_ms - lookback_ms
        self._is_ancient = id_ms is not None and id_ms < now_ms - _LONGEST_WAIT_MS
        self.cost_records = 0
        self.cost_s = 0.0

    @property
    def bound_ms(self) -> int:
        """The time from which on the log is searched now, in ms since the epoch."""
        return max(0, self._submitted_ms - self._margin_ms)

    @property
    def is_fresh(self) -> bool:
        """Whether the job may be so new that it has no event yet, although older records of the log were deleted."""
        return not self._has_time or self._submitted_ms >= self._fresh_ms

    def may_wait(self, *, is_whole: bool) -> bool:
        """Whether a job without an event may be in the queue. `is_whole`: the log has all records since its submission."""
        return self.is_fresh or (is_whole and not self._is_ancient)

    def step_back(self) -> None:
        """Look further back: the first event that was found does not begin the job."""
        self._margin_ms *= _STEP

    def scanned(self, records: int, seconds: float) -> None:
        """Note what a scan has cost."""
        self.cost_records += records
        self.cost_s += seconds

    @property
    def left_records(self) -> int:
        """How many records may be scanned."""
        return max(0, self._limits.max_records - self.cost_records)

    @property
    def left_s(self) -> float:
        """For how long the search may go on, in seconds."""
        return max(0.0, self._limits.max_s - self.cost_s)

    @property
    def advice(self) -> str:
        """What the client can do about a search that found nothing."""
        if self._has_time:
            return "its events are older than the log, or the search limit was reached before its first event"
        return "its id has no time in it, so only the newest records were searched: pass `since` or a cursor"
