"""Where the worker reports: `Observer` for logs and metrics, spans for traces, and their null objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.model import (
        ErrorCode,
        Headers,
        Job,
        JobError,
        ProducerRecord,
        Rejection,
        TopicPartition,
        UsageEvent,
    )
    from streamworker.stream.attempt import Attempt

__all__ = [
    "UNTRACED",
    "UNTRACED_REQUESTS",
    "CancelEffect",
    "JobSpan",
    "KafkaPart",
    "LossReason",
    "Observer",
    "RequestSpan",
    "RequestTracer",
    "Tracer",
    "TrySpan",
    "Untraced",
    "UntracedRequests",
    "trace_headers",
]

CancelEffect = Literal["cancelled", "too_early", "no_open_job"]
"""What a cancel record did: it cancelled a job; every open job with its id was submitted later; there was no such job."""

KafkaPart = Literal["start", "poll", "sink", "commit"]
"""The part of the worker that talks to Kafka: connections at start, poll loop, sink for deltas, partition
committers."""


LossReason = Literal["retention", "reset"]
"""Why job records cannot be read: the topic's retention deleted them, or the log lost its end or was replaced."""


class Observer(Protocol):
    """Is notified of what the worker does, for logs and metrics. Methods must neither raise nor wait."""

    def job_started(self, job: Job, upstream: str) -> None:
        """An attempt at a job began."""
        ...

    def first_delta(self, upstream: str, seconds: float) -> None:
        """An attempt received its first delta, `seconds` after it started."""
        ...

    def deltas_published(self, upstream: str, count: int, size: int, gap_s: float | None) -> None:
        """The deltas of one read of a stream were published: `count` events of `size` bytes in total.

        `gap_s` is the time since this stream's previous read that brought deltas. It is None for the first
        such read, and for held text that is published without a read.
        """
        ...

    def try_failed(self, job: Job, upstream: str, error: JobError, next_try_s: float) -> None:
        """A try failed before its first delta; the next try follows in `next_try_s` seconds."""
        ...

    def fell_back(self, job: Job, upstream: str, error: JobError) -> None:
        """An upstream failed a job permanently; the job continues at the next upstream of its list."""
        ...

    def circuit_changed(self, upstream: str, state: str, reason: str) -> None:
        """An upstream's circuit changed to `closed`, `half_open` or `open`; `reason` is why it opened last."""
        ...

    def cancel_received(self, job_id: str, effect: CancelEffect) -> None:
        """A cancel record was read; `effect` is what it did to the open jobs with its id."""
        ...

    def upstream_held(self, upstream: str, reason: str) -> None:
        """The jobs of an upstream begin to wait.

        `reason` is `unavailable`, `key_refused`, `account_empty` or `rate_limited`. It may change during the hold.
        """
        ...

    def upstream_released(self, upstream: str, reason: str, seconds: float) -> None:
        """The jobs of an upstream do not wait any more, after `seconds`; `reason` is the last one of the hold."""
        ...

    def job_ended(self, event: UsageEvent, job: Job, upstream: str) -> None:
        """A job's terminal event is durable."""
        ...

    def job_rejected(self, rejection: Rejection, code: ErrorCode) -> None:
        """A record is not a valid job; its dead letter and its terminal event are durable."""
        ...

    def job_abandoned(self, job: Job, reason: str) -> None:
        """A job was returned without a terminal event; the partition's next owner runs it."""
        ...

    def tombstone_skipped(self, partition: TopicPartition) -> None:
        """A record without a value was skipped."""
        ...

    def record_skipped(self, partition: TopicPartition) -> None:
        """A record was skipped because its job is finished or in flight."""
        ...

    def duplicate_skipped(self, job: Job, earlier: int) -> None:
        """A job record was skipped because the record at the offset `earlier` of its partition has the same id."""
        ...

    def job_crashed(self, job: Job) -> None:
        """An attempt ended with an unexpected exception; another attempt follows."""
        ...

    def rebalancing(self) -> None:
        """A rebalance began."""
        ...

    def partitions_changed(self, owned: int, gained: int, lost: int) -> None:
        """A rebalance ended: the worker owns `owned` partitions, of which `gained` are new; it lost `lost`."""
        ...

    def move_deferred(self, partition: TopicPartition, streams: int) -> None:
        """A partition with `streams` begun jobs is promised to another worker; it moves when they have ended."""
        ...

    def move_completed(self, partition: TopicPartition, waited_s: float, *, is_forced: bool) -> None:
        """A promised partition moved, `waited_s` seconds after the promise.

        `is_forced` says that jobs were open for longer than `worker.move_timeout_s` and were cut.
        """
        ...

    def streams_cut(self, partition: TopicPartition, streams: int) -> None:
        """A partition was lost with `streams` begun jobs; its next owner runs them again."""
        ...

    def partition_fenced(self, partition: TopicPartition) -> None:
        """Another worker fenced this worker out of a partition that it held."""
        ...

    def records_lost(self, reason: LossReason, records: int) -> None:
        """Job records were deleted or replaced before their jobs had ended; `records` counts offsets."""
        ...

    def committed(self, records: Sequence[ProducerRecord], seconds: float) -> None:
        """A partition's commit is durable, with these records, `seconds` after it began."""
        ...

    def result_part_omitted(self, part: str) -> None:
        """A result was made without `logprobs` or without the whole `completion`, because of its size."""
        ...

    def batch_acknowledged(self, count: int, seconds: float) -> None:
        """The broker acknowledged a batch of `count` deltas, `seconds` after it was sent."""
        ...

    def kafka_failed(self, part: KafkaPart) -> None:
        """A request to Kafka failed and will be retried."""
        ...

    def telemetry_failed(self) -> None:
        """A method of this observer raised an exception after a durable commit, which is a bug."""
        ...


class TrySpan(Protocol):
    """The span of one upstream call."""

    @property
    def trace(self) -> Headers:
        """Trace context for the upstream request."""
        ...

    def first_delta(self) -> None:
        """The call received its first delta."""
        ...

    def ended(self, attempt: Attempt, error: JobError | None) -> None:
        """The call ended. The attempt has ended with it unless another try follows.

        `error` is why this call failed if the attempt does not record it, because another try follows.
        """
        ...


class JobSpan(Protocol):
    """The span of one delivery of a job. The first method that ends it counts."""

    @property
    def trace(self) -> Headers:
        """Trace context of the job's events and calls."""
        ...

    def open_try(self, attempt: Attempt, upstream: str) -> TrySpan:
        """Start the span of the next upstream call."""
        ...

    def ended(self, event: UsageEvent, upstream: str) -> None:
        """The job's terminal event is durable."""
        ...

    def refused(self, code: ErrorCode) -> None:
        """The record is not a valid job; its dead letter and its terminal event are durable."""
        ...

    def abandoned(self, reason: str) -> None:
        """The job was returned without a terminal event; the partition's next owner runs it."""
        ...

    def crashed(self) -> None:
        """An unexpected exception ended the delivery; the job runs again, as another delivery."""
        ...


class Tracer(Protocol):
    """Starts the spans of deliveries. The tracer and its spans must neither raise nor wait."""

    def open_job(self, job: Job | Rejection, deliveries: int) -> JobSpan:
        """Start the span of one delivery. `deliveries` counts from 1."""
        ...


class Untraced:
    """A `Tracer`, `JobSpan` and `TrySpan` that records nothing and passes the job record's trace context on."""

    def __init__(self, trace: Headers = ()) -> None:
        self.trace = trace

    def open_job(self, job: Job | Rejection, deliveries: int) -> Untraced:  # noqa: ARG002 - part of the interface
        """Return a span that carries the trace context of the job's record."""
        return Untraced(job.trace)

    def open_try(self, attempt: Attempt, upstream: str) -> Untraced:  # noqa: ARG002 - part of the interface
        """Return a span that carries the trace context of the job's record."""
        return Untraced(attempt.job.trace)

    def first_delta(self) -> None:
        pass

    def ended(self, *_: object) -> None:
        pass

    def refused(self, code: ErrorCode) -> None:
        pass

    def abandoned(self, reason: str) -> None:
        pass

    def crashed(self) -> None:
        pass


UNTRACED = Untraced()


class RequestSpan(Protocol):
    """The span of one HTTP request that submits a job."""

    @property
    def trace(self) -> Headers:
        """Trace context of the job's record."""
        ...

    def ended(self, status: int | None, *, job_id: str | None, error: str | None) -> None:
        """The request ended. `status` is None if its client disconnected; `error` is the code in an error response."""
        ...


class RequestTracer(Protocol):
    """Starts the spans of HTTP requests. The tracer and its spans must neither raise nor wait."""

    def open_request(self, method: str, route: str, trace: Headers) -> RequestSpan:
        """Start the span of a request. `trace` is the trace context of its headers."""
        ...


class UntracedRequests:
    """A `RequestTracer` and `RequestSpan` that records nothing and passes the request's trace context on."""

    def __init__(self, trace: Headers = ()) -> None:
        self.trace = trace

    def open_request(self, method: str, route: str, trace: Headers) -> UntracedRequests:  # noqa: ARG002 - part of the interface
        """Return a span that carries the trace context of the request."""
        return UntracedRequests(trace)

    def ended(self, status: int | None, *, job_id: str | None, error: str | None) -> None:
        pass


UNTRACED_REQUESTS = UntracedRequests()


def trace_headers(trace: Headers) -> dict[str, str]:
    """Return trace-context record headers as HTTP headers. Values that are not printable ASCII are omitted."""
    texts = ((name, value.decode()) for name, value in trace if value is not None and value.isascii())
    return {name: text for name, text in texts if text.isprintable()}
