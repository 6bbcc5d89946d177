"""The observer that counts and logs: metrics for everything, and one log line per job, at its end."""

from __future__ import annotations

import re
from math import nan
from typing import TYPE_CHECKING, Any, get_args

import structlog
from msgspec import UNSET

from streamworker.model import ErrorCode, Status
from streamworker.observe import CancelEffect, KafkaPart, LossReason
from streamworker.telemetry import metrics as table
from streamworker.telemetry.metrics import OTHER, Metrics
from streamworker.text import truncate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
"""The labels upstream and model of a job that was rejected before an upstream was chosen."""

DEAD_LETTER_CODES = (ErrorCode.INVALID_JOB, ErrorCode.UNKNOWN_UPSTREAM, ErrorCode.MAX_DELIVERIES)
"""The error codes of dead letters."""

REASONS = ("moved", "revoked", "fenced", "drain", "drain_timeout", "stopped")
"""Why the worker returns jobs without a terminal event."""

KAFKA_PARTS = get_args(KafkaPart)

MAX_FAULTS = 8
_NAME_BYTES = 200
_VALUE_BYTES = 64
_MAX_VALUES = 150
"""Values of the jobs' metadata with a label of their own; with every status they stay below `MAX_SERIES`."""

_MAX_MODELS = 32
"""Configured models with a label of their own; with every error code, and 26 upstreams, they stay below `MAX_SERIES`."""

_HELD_ADVICE = {
    "key_refused": "replace the key: a new key file is tried at once, a key in a variable needs a restart",
    "account_empty": "top up the account, or replace the key",
    "rate_limited": "wait, or have the limit raised",
    "unavailable": "check the upstream, its address and the network with `streamworker check`",
}
"""What to do about an upstream that is held, by the reason. Its jobs wait meanwhile, and one call at a time probes it."""

_PATTERN = frozenset("*?[")
_NO_VALUE = "none"
_FAULT_BYTES = 300
_MAX_TOKENS = 1 << 53  # a counter is a double: above this value it loses increments of 1
_MEMBER = re.compile(r"[a-z][a-z0-9_]{0,39}")
_REASON = re.compile(
    r"[a-z_ ]{1,40}"
)  # a few words; a text with a partition or an error would be an unbounded label
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_TOKENS = {"prompt": "prompt_tokens", "completion": "completion_tokens"}


class Telemetry:
    """Implement `streamworker.observe.Observer`. Only configured names become labels.

    `upstreams` has the models of each upstream: the names among them, and not the patterns, become labels too.
    `label_metadata` names the member of the jobs' metadata whose values are a label and a log field, if it is not empty.
    """

    def __init__(
        self,
        metrics: Metrics,
        upstreams: Mapping[str, Iterable[str]],
        clock: Clock,
        *,
        label_metadata: str = "",
    ) -> None:
        self._metrics = metrics
        self._upstreams = frozenset(upstreams)
        self._models = _models_with_label(upstreams)
        self._label_metadata = label_metadata
        self._values: set[str] = set()
        self._clock = clock
        self._log: FilteringBoundLogger = structlog.get_logger()
        # The start of each open job, in seconds of the monotonic clock; the oldest one is first. A counter would be
        # wrong after a job that ends twice, or ends without a start.
        self._open: dict[Coordinates, float] = {}
        self._rebalancing_since: float | None = None
        self._deltas = self._delta_bytes = 0  # since the last scrape
        self._gaps = {upstream: metrics.tally(table.DELTA_GAP, upstream) for upstream in self._upstreams}
        self._batch_s, self._batch_records = (
            metrics.tally(table.BATCH_DURATION),
            metrics.tally(table.BATCH_RECORDS),
        )
        metrics.before_scrape(self._count_deltas)
        metrics.track(table.JOBS_OPEN, lambda: len(self._open))
        metrics.track(table.OLDEST_JOB, self._oldest_s)
        metrics.set(table.START_TIME, clock.now_ms() / 1000)
        self._begin_at_zero()

    def job_started(self, job: Job, upstream: str) -> None:
        """Count an attempt that started; the first one of a job also starts the job."""
        label = self._label(upstream)
        self._metrics.add(table.ATTEMPTS, 1, label)
        if job.source not in self._open:
            self._open[job.source] = self._clock.monotonic()
            self._metrics.add(table.JOBS_STARTED, 1, label)
            if job.timestamp > 0:  # otherwise the record has no usable timestamp
                self._metrics.observe(
                    table.QUEUE_DURATION, max(0, self._clock.now_ms() - job.timestamp) / 1000
                )

    def first_delta(self, upstream: str, seconds: float) -> None:
        """Record the time from an attempt's start to its first delta."""
        self._metrics.observe(table.TIME_TO_FIRST_DELTA, seconds, self._label(upstream))

    def deltas_published(self, upstream: str, count: int, size: int, gap_s: float | None) -> None:
        """Count the delta events of one read: `count` events with `size` bytes in total.

        `gap_s` is the time since the previous read of the stream that brought deltas. It is None for the first read,
        and for held text that is published without a read.
        """
        # Called for every delta, so without the lock of a library counter; the sums are added before a scrape.
        self._deltas += count
        self._delta_bytes += size
        if gap_s is not None and (gaps := self._gaps.get(upstream)) is not None:
            gaps.add(gap_s)

    def try_failed(self, job: Job, upstream: str, error: JobError, next_try_s: float) -> None:
        """Count and log a try that failed before its first delta. The next one follows in `next_try_s` seconds."""
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
        """Count and log that a job continues at a fallback, because `upstream` failed it."""
        self._metrics.add(table.FALLBACKS, 1, self._label(upstream))
        self._log.warning("job.fell_back", job_id=job.job_id, upstream=upstream, error_code=error.code.value)

    def circuit_changed(self, upstream: str, state: str, reason: str) -> None:
        """Log the new state of an upstream's circuit: `closed`, `half_open` or `open`."""
        if state == "open":
            self._metrics.add(table.CIRCUITS_OPENED, 1, self._label(upstream))
        write = self._log.warning if state == "open" else self._log.info
        write(f"circuit.{state}", upstream=upstream, reason=reason)

    def cancel_received(self, job_id: str, effect: CancelEffect) -> None:
        """Count a cancel record; log one that had no effect on an open job of this worker."""
        self._metrics.add(table.CANCELS, 1, effect)
        if effect != "cancelled":
            self._log.info("cancel.without_effect", job_id=truncate(job_id, _NAME_BYTES), reason=effect)

    def upstream_held(self, upstream: str, reason: str) -> None:
        """Log that the jobs of an upstream begin to wait, and why."""
        self._log.warning(
            "upstream.held", upstream=upstream, reason=reason, advice=_HELD_ADVICE.get(reason, "wait")
        )

    def upstream_released(self, upstream: str, reason: str, seconds: float) -> None:
        """Log that the jobs of an upstream do not wait any more, after `seconds`."""
        self._log.info("upstream.released", upstream=upstream, reason=reason, held_s=round(seconds, 1))

    def job_ended(self, event: UsageEvent, job: Job, upstream: str) -> None:
        """Count and log a job whose terminal event is durable."""
        self._open.pop(job.source, None)
        self._count_end(event, self._label(upstream))
        if event.error is not None:
            self._count_error(event.error.code, upstream, job.model)
        if self._label_metadata:
            self._count_by_metadata(event, self._label_of_metadata(job))
        write = self._log.info if event.status is Status.COMPLETED else self._log.warning
        write(f"job.{event.status}", **_line(event, job, upstream), **self._metadata(job))

    def job_rejected(self, rejection: Rejection, code: ErrorCode) -> None:
        """Count and log a record that is not a valid job. Its dead letter and its terminal event are durable."""
        self._open.pop(rejection.source, None)
        # A record with too many deliveries is a valid job that failed.
        status = Status.FAILED if code is ErrorCode.MAX_DELIVERIES else Status.REJECTED
        self._metrics.add(table.JOBS_ENDED, 1, NO_UPSTREAM, status.value)
        self._metrics.add(table.JOB_ERRORS, 1, NO_UPSTREAM, code.value, NO_UPSTREAM)
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
        """Count and log a job that was returned without a terminal event; its next owner runs it."""
        self._open.pop(job.source, None)
        self._metrics.add(table.JOBS_ABANDONED, 1, reason if _REASON.fullmatch(reason) else OTHER)
        place = {**_place(job.source), **_trace(job.trace)}
        self._log.warning("job.abandoned", job_id=job.job_id, reason=reason, **place)

    def tombstone_skipped(self, partition: TopicPartition) -> None:  # noqa: ARG002 - without a label
        """Count a record without a value, which was skipped."""
        self._metrics.add(table.TOMBSTONES)

    def record_skipped(self, partition: TopicPartition) -> None:  # noqa: ARG002 - without a label
        """Count a fetched record whose job has ended or is running."""
        self._metrics.add(table.RECORDS_SKIPPED)

    def duplicate_skipped(self, job: Job, earlier: int) -> None:
        """Count and log a job record that repeats the id of an earlier one of its partition."""
        self._metrics.add(table.DUPLICATES_SKIPPED)
        place = {**_place(job.source), **_trace(job.trace)}
        self._log.info("job.duplicate_skipped", job_id=job.job_id, earlier_offset=earlier, **place)

    def job_crashed(self, job: Job) -> None:  # noqa: ARG002 - `job.crashed` names the job
        """Count an attempt that ended with an unexpected exception."""
        self._metrics.add(table.JOB_CRASHES)

    def rebalancing(self) -> None:
        """Start timing a rebalance."""
        if self._rebalancing_since is None:
            self._rebalancing_since = self._clock.monotonic()

    def partitions_changed(self, owned: int, gained: int, lost: int) -> None:
        """Record and log the end of a rebalance."""
        began, self._rebalancing_since = self._rebalancing_since, None
        if began is not None:
            self._metrics.observe(table.REBALANCE_DURATION, self._clock.monotonic() - began)
        self._metrics.add(table.REBALANCES)
        self._metrics.set(table.PARTITIONS_OWNED, owned)
        self._log.info("partitions.changed", owned=owned, gained=gained, lost=lost)

    def move_deferred(self, partition: TopicPartition, streams: int) -> None:
        """Count and log a partition that moves to another worker when its `streams` begun jobs have ended."""
        self._metrics.add(table.MOVES_DEFERRED)
        self._log.info("partition.promised", partition=str(partition), streams=streams)

    def move_completed(self, partition: TopicPartition, waited_s: float, *, is_forced: bool) -> None:
        """Record and log a promised partition that moved `waited_s` seconds after the promise."""
        self._metrics.observe(table.MOVE_WAIT, waited_s)
        self._metrics.add(table.MOVES_FORCED, is_forced)
        self._log.info(
            "partition.moved", partition=str(partition), waited_s=round(waited_s, 1), is_forced=is_forced
        )

    def streams_cut(self, partition: TopicPartition, streams: int) -> None:
        """Count and log begun jobs whose partition was lost; another worker repeats their calls."""
        self._metrics.add(table.STREAMS_CUT, streams)
        self._log.warning("partition.streams_cut", partition=str(partition), streams=streams)

    def partition_fenced(self, partition: TopicPartition) -> None:  # noqa: ARG002 - without a label
        """Count a partition on which another worker fenced this one."""
        self._metrics.add(table.PARTITIONS_FENCED)

    def records_lost(self, reason: LossReason, records: int) -> None:
        """Count job records that were deleted or replaced before their jobs had ended."""
        self._metrics.add(table.RECORDS_LOST, records, reason)

    def committed(self, records: Sequence[ProducerRecord], seconds: float) -> None:
        """Record a durable commit: its records, and the seconds since it started."""
        self._metrics.observe(table.COMMIT_DURATION, seconds)
        self._metrics.observe(table.COMMIT_RECORDS, len(records))
        for record in records:
            kind = next((value for name, value in record.headers if name == "streamworker-type"), None)
            if kind == b"result":
                self._metrics.add(table.RESULTS)
                self._metrics.add(table.RESULT_BYTES, record.size)
            elif kind is not None:  # a dead letter is not an event
                self._count_events(kind.decode(), 1, record.size)

    def result_part_omitted(self, part: str) -> None:
        """Count a part of a completion that was left out of its result."""
        self._metrics.add(table.RESULT_PARTS_OMITTED, 1, part)

    def batch_acknowledged(self, count: int, seconds: float) -> None:
        """Record a batch of `count` deltas that was acknowledged `seconds` after it was sent."""
        self._batch_s.add(seconds)
        self._batch_records.add(count)

    def kafka_failed(self, part: KafkaPart) -> None:
        """Count a failed request to Kafka that is repeated."""
        self._metrics.add(table.KAFKA_FAILURES, 1, part)

    def telemetry_failed(self) -> None:
        """Count an exception in logs or metrics after a durable commit."""
        self._metrics.add(table.TELEMETRY_FAILURES)

    def _begin_reasons_at_zero(self) -> None:
        for reason in get_args(LossReason):
            self._metrics.add(table.RECORDS_LOST, 0, reason)

    def _begin_at_zero(self) -> None:
        """Create the known series, so that Prometheus sees their first count as an increase from 0."""
        add = self._metrics.add
        self._begin_reasons_at_zero()
        for upstream in self._upstreams:
            for counter in (table.JOBS_STARTED, table.ATTEMPTS, table.FALLBACKS, table.CIRCUITS_OPENED):
                add(counter, 0, upstream)
            for gauge in (
                table.CIRCUIT_STATE,
                table.STREAMS_OPEN,
                table.STREAMS_LIMIT,
                table.UPSTREAM_WAITING,
                table.UPSTREAM_HELD,
                table.UPSTREAM_HELD_DURATION,
            ):
                self._metrics.set(gauge, nan, upstream)  # not zero: the value is not known yet
            for status in Status:
                add(table.JOBS_ENDED, 0, upstream, status.value)
            for code in ErrorCode:
                for model in (*self._models[upstream], OTHER):
                    add(table.JOB_ERRORS, 0, upstream, code.value, model)
        for counter, labels in (
            (table.DEAD_LETTERS, [code.value for code in DEAD_LETTER_CODES]),
            (table.JOBS_ABANDONED, REASONS),
            (table.CANCELS, get_args(CancelEffect)),
            (table.KAFKA_FAILURES, KAFKA_PARTS),
            (table.RESULT_PARTS_OMITTED, ("logprobs", "completion")),
        ):
            for label in labels:
                add(counter, 0, label)
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
        for kind, name in _TOKENS.items():
            tokens = _count((event.usage or {}).get(name))
            if tokens is not None:
                count.add(table.TOKENS, tokens, upstream, kind, event.usage_source.value)
            voided = None if event.voided is UNSET else _count(event.voided.usage.get(name))
            if voided is not None:
                count.add(table.TOKENS, voided, upstream, kind, "voided")

    def _count_error(self, code: ErrorCode, upstream: str, model: str) -> None:
        label = model if model in self._models.get(upstream, ()) else OTHER
        self._metrics.add(table.JOB_ERRORS, 1, self._label(upstream), code.value, label)

    def _count_by_metadata(self, event: UsageEvent, value: str) -> None:
        self._metrics.add(table.JOBS_BY_METADATA, 1, value, event.status.value)
        for kind, name in _TOKENS.items():
            tokens = _count((event.usage or {}).get(name))
            if tokens is not None:
                self._metrics.add(table.TOKENS_BY_METADATA, tokens, value, kind)

    def _label_of_metadata(self, job: Job) -> str:
        """Return the label of the job's value: `none` without a value, `other` above the bound on labels."""
        value = job.metadata.get(self._label_metadata)
        if value is None:
            return _NO_VALUE
        value = truncate(value, _VALUE_BYTES)
        if value not in self._values and len(self._values) >= _MAX_VALUES:
            return OTHER
        self._values.add(value)
        return value

    def _metadata(self, job: Job) -> dict[str, dict[str, str]]:
        """Return the configured member of the job's metadata, for its log line."""
        value = job.metadata.get(self._label_metadata) if self._label_metadata else None
        return {} if value is None else {"metadata": {self._label_metadata: truncate(value, _VALUE_BYTES)}}

    def _label(self, upstream: str) -> str:
        return upstream if upstream in self._upstreams else OTHER


def _models_with_label(upstreams: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Return the models of each upstream that have a label of their own: the first `_MAX_MODELS` that are not patterns."""
    room, found = _MAX_MODELS, {}
    for upstream, models in upstreams.items():
        found[upstream] = [name for name in dict.fromkeys(models) if not _PATTERN & set(name)][:room]
        room -= len(found[upstream])
    return found


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
        # The upstream's own message is only in the event: it may contain the prompt.
        "error_message": error.message if error is not None and error.upstream is None else None,
        "http_status": error and error.http_status,
    }


def _place(source: Coordinates) -> dict[str, Any]:
    return {"topic": source.topic, "partition": source.partition, "offset": source.offset}


def _trace(trace: Headers) -> dict[str, str]:
    """Return the id of the job's trace as a log field, if its headers name a valid one."""
    found = _TRACEPARENT.fullmatch(dict(trace).get("traceparent") or b"")
    return {} if found is None else {"trace_id": found[1].decode()}


def _numbers(usage: dict[str, Any] | None) -> dict[str, float] | None:
    """Return the counts of a usage object. An upstream may write anything into it, so only numbers are logged."""
    if usage is None:
        return None
    counts = {name: _count(value) for name, value in usage.items() if _MEMBER.fullmatch(name)}
    return {name: count for name, count in counts.items() if count is not None}


def _count(value: Any) -> float | None:
    """Return a value that is a valid count, else None: for NaN, -1, true, "12"."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 <= value < _MAX_TOKENS else None
