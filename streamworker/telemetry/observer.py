"""What happened, as metrics and as log lines: one line per job, at its end, with all that is known of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import structlog

from streamworker.core.faults import cut
from streamworker.model import ErrorCode, Status
from streamworker.telemetry import metrics as table
from streamworker.telemetry.metrics import OTHER, Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from structlog.typing import FilteringBoundLogger

    from streamworker.model import Coordinates, Job, JobError, Partition, Rejection, UsageEvent

__all__ = ["NO_UPSTREAM", "Telemetry"]

NO_UPSTREAM = "none"
"""The label value for a job that never got as far as an upstream."""

MAX_FAULTS = 8
_NAME_BYTES = 200
_FAULT_BYTES = 300
_MAX_TOKENS = 1 << 53  # beyond it a counter, which is a double, loses ones
_MEMBER = re.compile(r"[a-z][a-z0-9_]{0,39}")
_REASON = re.compile(r"[a-z_ ]{1,40}")  # a few words; what names partitions or quotes errors is no label
_TOKENS = {"prompt": "prompt_tokens", "completion": "completion_tokens"}


class Telemetry:
    """Implements `streamworker.ports.Observer`. `upstreams` are the configured names: no other becomes a label."""

    def __init__(self, metrics: Metrics, upstreams: Iterable[str]) -> None:
        self._metrics = metrics
        self._upstreams = frozenset(upstreams)
        self._log: FilteringBoundLogger = structlog.get_logger()
        # A set and not a count: a job that is ended twice, or was never told to be started, does not skew it.
        self._open: set[Coordinates] = set()
        self._begin_at_zero()

    def job_started(self, job: Job, upstream: str) -> None:
        """A job was taken up."""
        self._open.add(job.source)
        self._tell_open()
        self._metrics.add(table.JOBS_STARTED, 1, self._label(upstream))

    def first_delta(self, upstream: str, seconds: float) -> None:
        """An attempt got its first delta so long after it started."""
        self._metrics.observe(table.TIME_TO_FIRST_DELTA, seconds, self._label(upstream))

    def deltas_published(self, count: int) -> None:
        """So many delta events were handed to the sink."""
        self._metrics.add(table.DELTAS, count)

    def try_failed(self, job: Job, upstream: str, error: JobError, next_try_s: float) -> None:
        """A try failed before its first delta; the next one follows after so many seconds."""
        self._metrics.add(table.RETRIES, 1, self._label(upstream), error.code.value)
        self._log.info(
            "try.failed",
            job_id=job.job_id,
            upstream=upstream,
            error_code=error.code.value,
            http_status=error.http_status,
            next_try_s=round(next_try_s, 3),
        )

    def fell_back(self, job: Job, upstream: str, error: JobError) -> None:
        """An upstream failed a job for good, and the next one of its list is called."""
        self._metrics.add(table.FALLBACKS, 1, self._label(upstream))
        self._log.warning("job.fell_back", job_id=job.job_id, upstream=upstream, error_code=error.code.value)

    def circuit_changed(self, upstream: str, state: str) -> None:
        """An upstream's circuit is now `closed`, `half_open` or `open`."""
        if state == "open":
            self._metrics.add(table.CIRCUITS_OPENED, 1, self._label(upstream))
        say = self._log.warning if state == "open" else self._log.info
        say(f"circuit.{state}", upstream=upstream)

    def job_ended(self, event: UsageEvent, job: Job, upstream: str) -> None:
        """A terminal event is durable."""
        self._close(job.source)
        self._count_end(event, self._label(upstream))
        say = self._log.info if event.status is Status.COMPLETED else self._log.warning
        say(f"job.{event.status}", **_line(event, job, upstream))

    def job_rejected(self, rejection: Rejection, code: ErrorCode) -> None:
        """A record was no valid job; its dead letter and its terminal event are durable."""
        self._close(rejection.source)
        self._metrics.add(table.JOBS_ENDED, 1, NO_UPSTREAM, Status.REJECTED.value)
        self._metrics.add(table.JOB_ERRORS, 1, code.value)
        self._metrics.add(table.DEAD_LETTERS, 1, code.value)
        self._log.warning(
            "job.rejected",
            job_id=rejection.job_id,
            error_code=code.value,
            faults=[cut(fault, _FAULT_BYTES) for fault in rejection.faults[:MAX_FAULTS]],
            fault_count=len(rejection.faults),
            **_place(rejection.source),
        )

    def job_abandoned(self, job: Job, reason: str) -> None:
        """A job was let go without a terminal event; its next owner runs it."""
        self._close(job.source)
        self._metrics.add(table.JOBS_ABANDONED, 1, reason if _REASON.fullmatch(reason) else OTHER)
        self._log.warning("job.abandoned", job_id=job.job_id, reason=reason, **_place(job.source))

    def tombstone_skipped(self, partition: Partition) -> None:  # noqa: ARG002 - counted as a whole
        """A record without a value was passed over."""
        self._metrics.add(table.TOMBSTONES)

    def record_skipped(self, partition: Partition) -> None:  # noqa: ARG002 - counted as a whole
        """A record was delivered that is finished already, or that runs."""
        self._metrics.add(table.RECORDS_SKIPPED)

    def partitions_changed(self, owned: int, gained: int, lost: int) -> None:
        """A rebalance ended."""
        self._metrics.add(table.REBALANCES)
        self._metrics.set(table.PARTITIONS_OWNED, owned)
        self._log.info("partitions.changed", owned=owned, gained=gained, lost=lost)

    def _begin_at_zero(self) -> None:
        """Let the known series exist from the start, or their first count is no increase to Prometheus."""
        for upstream in self._upstreams:
            for counter in (table.JOBS_STARTED, table.FALLBACKS, table.CIRCUITS_OPENED):
                self._metrics.add(counter, 0, upstream)
            for status in Status:
                self._metrics.add(table.JOBS_ENDED, 0, upstream, status.value)
        for code in ErrorCode:
            self._metrics.add(table.JOB_ERRORS, 0, code.value)

    def _count_end(self, event: UsageEvent, upstream: str) -> None:
        count, status = self._metrics, event.status.value
        count.add(table.JOBS_ENDED, 1, upstream, status)
        count.observe(table.JOB_DURATION, event.timing.total / 1000, upstream, status)
        count.observe(table.QUEUE, event.timing.queued / 1000)
        if event.error is not None:
            count.add(table.JOB_ERRORS, 1, event.error.code.value)
        for kind, name in _TOKENS.items():
            tokens = _count((event.usage or {}).get(name))
            if tokens is not None:
                count.add(table.TOKENS, tokens, upstream, kind, event.usage_source.value)

    def _label(self, upstream: str) -> str:
        return upstream if upstream in self._upstreams else OTHER

    def _close(self, source: Coordinates) -> None:
        self._open.discard(source)
        self._tell_open()

    def _tell_open(self) -> None:
        self._metrics.set(table.JOBS_OPEN, len(self._open))


def _line(event: UsageEvent, job: Job, upstream: str) -> dict[str, Any]:
    return {
        "job_id": event.job_id,
        "attempt": event.attempt,
        "upstream": upstream,
        "model": cut(job.model, _NAME_BYTES),
        "status": event.status.value,
        **_error(event.error),
        "deltas": event.observed.deltas,
        "content_chars": event.observed.content_chars,
        "usage": _numbers(event.usage),
        "usage_source": event.usage_source.value,
        "queued_ms": event.timing.queued,
        "first_delta_ms": event.timing.first_delta,
        "total_ms": event.timing.total,
        "tries": event.tries,
        **_place(job.source),
    }


def _error(error: JobError | None) -> dict[str, Any]:
    return {
        "error_code": error and error.code.value,
        # The upstream's own words stay in the event: they may repeat the prompt.
        "error_message": error.message if error is not None and error.upstream is None else None,
        "http_status": error and error.http_status,
    }


def _place(source: Coordinates) -> dict[str, Any]:
    return {"topic": source.topic, "partition": source.partition, "offset": source.offset}


def _numbers(usage: dict[str, Any] | None) -> dict[str, float] | None:
    """Return the counts of a usage object. It is the upstream's, so anything may be in it: only numbers are logged."""
    if usage is None:
        return None
    counts = {name: _count(value) for name, value in usage.items() if _MEMBER.fullmatch(name)}
    return {name: count for name, count in counts.items() if count is not None}


def _count(value: Any) -> float | None:
    """Return what can be a count, None for all else: NaN, -1, true, "12"."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value < _MAX_TOKENS else None
