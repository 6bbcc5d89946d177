"""What happened, as metrics and as log lines: one line per job, at its end, with all that is known of it."""

from __future__ import annotations

import re
from math import nan
from typing import TYPE_CHECKING, Any, get_args

import structlog

from streamworker.model import ErrorCode, Status
from streamworker.observe import KafkaPart
from streamworker.telemetry import metrics as table
from streamworker.telemetry.metrics import OTHER, Metrics
from streamworker.text import truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from structlog.typing import FilteringBoundLogger

    from streamworker.model import (
        Coordinates,
        Headers,
        Job,
        JobError,
        ProducerRecord,
        Rejection,
        TopicPartition,
        UsageEvent,
    )
    from streamworker.ports import Clock

__all__ = ["NO_UPSTREAM", "Telemetry"]

NO_UPSTREAM = "none"
"""The label value for a job that never got as far as an upstream."""

DEAD_LETTER_CODES = (ErrorCode.INVALID_JOB, ErrorCode.UNKNOWN_UPSTREAM, ErrorCode.MAX_DELIVERIES)
"""What makes a record a dead letter."""

REASONS = ("revoked", "fenced", "drain", "drain_timeout", "stopped")
"""Why the worker lets jobs go."""

KAFKA_PARTS = get_args(KafkaPart)

MAX_FAULTS = 8
_NAME_BYTES = 200
_FAULT_BYTES = 300
_MAX_TOKENS = 1 << 53  # beyond it a counter, which is a double, loses ones
_MEMBER = re.compile(r"[a-z][a-z0-9_]{0,39}")
_REASON = re.compile(r"[a-z_ ]{1,40}")  # a few words; what names partitions or quotes errors is no label
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_TOKENS = {"prompt": "prompt_tokens", "completion": "completion_tokens"}


class Telemetry:
    """Implements `streamworker.ports.Observer`. `upstreams` are the configured names: no other becomes a label."""

    def __init__(self, metrics: Metrics, upstreams: Iterable[str], clock: Clock) -> None:
        self._metrics = metrics
        self._upstreams = frozenset(upstreams)
        self._clock = clock
        self._log: FilteringBoundLogger = structlog.get_logger()
        # Not a count: a job that is ended twice, or was never told to be started, does not skew it. In the order of
        # their beginnings, in seconds of the monotonic clock.
        self._open: dict[Coordinates, float] = {}
        self._rebalancing_since: float | None = None
        self._deltas = self._delta_bytes = 0  # since the last scrape
        self._gaps = {upstream: metrics.tally(table.DELTA_GAP, upstream) for upstream in self._upstreams}
        metrics.before_scrape(self._count_deltas)
        metrics.track(table.JOBS_OPEN, lambda: len(self._open))
        metrics.track(table.OLDEST_JOB, self._oldest_s)
        metrics.set(table.START_TIME, clock.now_ms() / 1000)
        self._begin_at_zero()

    def job_started(self, job: Job, upstream: str) -> None:
        """An attempt at a job began; with its first one the job was taken up."""
        label = self._label(upstream)
        self._metrics.add(table.ATTEMPTS, 1, label)
        if job.source not in self._open:
            self._open[job.source] = self._clock.monotonic()
            self._metrics.add(table.JOBS_STARTED, 1, label)
            self._metrics.observe(table.QUEUE, max(0, self._clock.now_ms() - job.timestamp) / 1000)

    def first_delta(self, upstream: str, seconds: float) -> None:
        """An attempt got its first delta so long after it started."""
        self._metrics.observe(table.TIME_TO_FIRST_DELTA, seconds, self._label(upstream))

    def deltas_published(self, upstream: str, count: int, size: int, gap_s: float | None) -> None:
        """One read of a stream gave so many delta events of `size` bytes in all, now with the sink.

        `gap_s` is the time since the read of this stream that brought deltas before; None for the first one, and for
        text that was held and leaves without a read.
        """
        # Told with every delta: sums of ours, for a counter of the library takes its lock each time.
        self._deltas += count
        self._delta_bytes += size
        if gap_s is not None and (gaps := self._gaps.get(upstream)) is not None:
            gaps.add(gap_s)

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
        self._open.pop(job.source, None)
        self._count_end(event, self._label(upstream))
        say = self._log.info if event.status is Status.COMPLETED else self._log.warning
        say(f"job.{event.status}", **_line(event, job, upstream))

    def job_rejected(self, rejection: Rejection, code: ErrorCode) -> None:
        """A record was no valid job; its dead letter and its terminal event are durable."""
        self._open.pop(rejection.source, None)
        # What was delivered too often was a job once, and failed.
        status = Status.FAILED if code is ErrorCode.MAX_DELIVERIES else Status.REJECTED
        self._metrics.add(table.JOBS_ENDED, 1, NO_UPSTREAM, status.value)
        self._metrics.add(table.JOB_ERRORS, 1, code.value)
        self._metrics.add(table.DEAD_LETTERS, 1, code.value)
        self._log.warning(
            "job.rejected",
            job_id=rejection.job_id,
            error_code=code.value,
            faults=[truncate(fault, _FAULT_BYTES) for fault in rejection.faults[:MAX_FAULTS]],
            fault_count=len(rejection.faults),
            **_place(rejection.source),
            **_trace(rejection.trace),
        )

    def job_abandoned(self, job: Job, reason: str) -> None:
        """A job was let go without a terminal event; its next owner runs it."""
        self._open.pop(job.source, None)
        self._metrics.add(table.JOBS_ABANDONED, 1, reason if _REASON.fullmatch(reason) else OTHER)
        place = {**_place(job.source), **_trace(job.trace)}
        self._log.warning("job.abandoned", job_id=job.job_id, reason=reason, **place)

    def tombstone_skipped(self, partition: TopicPartition) -> None:  # noqa: ARG002 - counted as a whole
        """A record without a value was passed over."""
        self._metrics.add(table.TOMBSTONES)

    def record_skipped(self, partition: TopicPartition) -> None:  # noqa: ARG002 - counted as a whole
        """A record was delivered that is finished already, or that runs."""
        self._metrics.add(table.RECORDS_SKIPPED)

    def job_crashed(self, job: Job) -> None:  # noqa: ARG002 - counted as a whole; the log line names it
        """An attempt ended by a bug of ours; another one follows."""
        self._metrics.add(table.JOB_CRASHES)

    def rebalancing(self) -> None:
        """A rebalance began."""
        if self._rebalancing_since is None:
            self._rebalancing_since = self._clock.monotonic()

    def partitions_changed(self, owned: int, gained: int, lost: int) -> None:
        """A rebalance ended."""
        began, self._rebalancing_since = self._rebalancing_since, None
        if began is not None:
            self._metrics.observe(table.REBALANCE_SECONDS, self._clock.monotonic() - began)
        self._metrics.add(table.REBALANCES)
        self._metrics.set(table.PARTITIONS_OWNED, owned)
        self._log.info("partitions.changed", owned=owned, gained=gained, lost=lost)

    def partition_fenced(self, partition: TopicPartition) -> None:  # noqa: ARG002 - as above
        """Another worker shut us out of a partition that we thought ours."""
        self._metrics.add(table.PARTITIONS_FENCED)

    def committed(self, records: Sequence[ProducerRecord], seconds: float) -> None:
        """A lane's commit is durable, with these records, so long after it began."""
        self._metrics.observe(table.COMMIT_SECONDS, seconds)
        self._metrics.observe(table.COMMIT_RECORDS, len(records))
        for record in records:
            kind = next((value for name, value in record.headers if name == "streamworker-type"), None)
            if kind is not None:  # a dead letter is no event
                self._count_events(kind.decode(), 1, record.size)

    def batch_acknowledged(self, count: int, seconds: float) -> None:
        """A batch of so many deltas is acknowledged, so long after it was sent."""
        self._metrics.observe(table.BATCH_SECONDS, seconds)
        self._metrics.observe(table.BATCH_RECORDS, count)

    def kafka_failed(self, part: KafkaPart) -> None:
        """A request to Kafka failed and is made again."""
        self._metrics.add(table.KAFKA_FAILURES, 1, part)

    def _begin_at_zero(self) -> None:
        """Let the known series exist from the start, or their first count is no increase to Prometheus."""
        add = self._metrics.add
        for upstream in self._upstreams:
            for counter in (table.JOBS_STARTED, table.ATTEMPTS, table.FALLBACKS, table.CIRCUITS_OPENED):
                add(counter, 0, upstream)
            for gauge in (
                table.CIRCUIT_STATE,
                table.STREAMS_OPEN,
                table.STREAMS_LIMIT,
                table.UPSTREAM_WAITING,
            ):
                self._metrics.set(gauge, nan, upstream)  # not zero: nobody has told yet
            for status in Status:
                add(table.JOBS_ENDED, 0, upstream, status.value)
        for code in ErrorCode:
            add(table.JOB_ERRORS, 0, code.value)
        for code in DEAD_LETTER_CODES:
            add(table.DEAD_LETTERS, 0, code.value)
        for reason in REASONS:
            add(table.JOBS_ABANDONED, 0, reason)
        for part in KAFKA_PARTS:
            add(table.KAFKA_FAILURES, 0, part)
        for kind in ("started", "delta", "usage"):
            self._count_events(kind, 0, 0)

    def _count_deltas(self) -> None:
        self._count_events("delta", self._deltas, self._delta_bytes)
        self._deltas = self._delta_bytes = 0

    def _count_events(self, kind: str, count: int, size: int) -> None:
        self._metrics.add(table.EVENTS, count, kind)
        self._metrics.add(table.EVENT_BYTES, size, kind)

    def _oldest_s(self) -> float:
        began = next(iter(self._open.values()), None)
        return 0.0 if began is None else self._clock.monotonic() - began

    def _count_end(self, event: UsageEvent, upstream: str) -> None:
        count, status = self._metrics, event.status.value
        count.add(table.JOBS_ENDED, 1, upstream, status)
        count.observe(table.JOB_DURATION, event.timing.total / 1000, upstream, status)
        if event.error is not None:
            count.add(table.JOB_ERRORS, 1, event.error.code.value)
        for kind, name in _TOKENS.items():
            tokens = _count((event.usage or {}).get(name))
            if tokens is not None:
                count.add(table.TOKENS, tokens, upstream, kind, event.usage_source.value)

    def _label(self, upstream: str) -> str:
        return upstream if upstream in self._upstreams else OTHER


def _line(event: UsageEvent, job: Job, upstream: str) -> dict[str, Any]:
    return {
        "job_id": event.job_id,
        "attempt": event.attempt,
        "upstream": upstream,
        "model": truncate(job.model, _NAME_BYTES),
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
        **_trace(job.trace),
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


def _trace(trace: Headers) -> dict[str, str]:
    """Return the id of the trace that the job belongs to, if it does: the way from a line to its spans."""
    found = _TRACEPARENT.fullmatch(dict(trace).get("traceparent") or b"")
    return {} if found is None else {"trace_id": found[1].decode()}


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
