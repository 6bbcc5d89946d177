"""Where the worker reports what happened: `Observer` for logs and metrics, spans for traces, and their null objects."""

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

__all__ = ["UNTRACED", "JobSpan", "KafkaPart", "Observer", "Tracer", "TrySpan", "Untraced", "trace_headers"]

KafkaPart = Literal["start", "poll", "sink", "commit"]
"""Who talks to Kafka: the connections at the start, the poll loop, the sink of the deltas, the commit lanes."""


class Observer(Protocol):
    """Is told what happened, for logs and metrics. Must neither raise nor wait."""

    def job_started(self, job: Job, upstream: str) -> None:
        """An attempt at a job began; with its first one the job was taken up."""
        ...

    def first_delta(self, upstream: str, seconds: float) -> None:
        """An attempt got its first delta so long after it started."""
        ...

    def deltas_published(self, upstream: str, count: int, size: int, gap_s: float | None) -> None:
        """One read of a stream gave so many delta events of `size` bytes in all, now with the sink.

        `gap_s` is the time since the read of this stream that brought deltas before; None for the first one, and for
        text that was held and leaves without a read.
        """
        ...

    def try_failed(self, job: Job, upstream: str, error: JobError, next_try_s: float) -> None:
        """A try failed before its first delta; the next one follows after so many seconds."""
        ...

    def fell_back(self, job: Job, upstream: str, error: JobError) -> None:
        """An upstream failed a job for good, and the next one of its list is called."""
        ...

    def circuit_changed(self, upstream: str, state: str) -> None:
        """An upstream's circuit is now `closed`, `half_open` or `open`."""
        ...

    def job_ended(self, event: UsageEvent, job: Job, upstream: str) -> None:
        """A terminal event is durable."""
        ...

    def job_rejected(self, rejection: Rejection, code: ErrorCode) -> None:
        """A record was no valid job; its dead letter and its terminal event are durable."""
        ...

    def job_abandoned(self, job: Job, reason: str) -> None:
        """A job was let go without a terminal event; its next owner runs it."""
        ...

    def tombstone_skipped(self, partition: TopicPartition) -> None:
        """A record without a value was passed over."""
        ...

    def record_skipped(self, partition: TopicPartition) -> None:
        """A record was delivered that is finished already, or that runs."""
        ...

    def job_crashed(self, job: Job) -> None:
        """An attempt ended by a bug of ours; another one follows."""
        ...

    def rebalancing(self) -> None:
        """A rebalance began."""
        ...

    def partitions_changed(self, owned: int, gained: int, lost: int) -> None:
        """A rebalance ended."""
        ...

    def partition_fenced(self, partition: TopicPartition) -> None:
        """Another worker shut us out of a partition that we thought ours."""
        ...

    def committed(self, records: Sequence[ProducerRecord], seconds: float) -> None:
        """A lane's commit is durable, with these records, so long after it began."""
        ...

    def batch_acknowledged(self, count: int, seconds: float) -> None:
        """A batch of so many deltas is acknowledged, so long after it was sent."""
        ...

    def kafka_failed(self, part: KafkaPart) -> None:
        """A request to Kafka failed and is made again."""
        ...


class TrySpan(Protocol):
    """One upstream call, as a trace has it."""

    @property
    def trace(self) -> Headers:
        """The trace context for the upstream's request."""
        ...

    def first_delta(self) -> None:
        """The call gave its first delta."""
        ...

    def ended(self, attempt: Attempt, error: JobError | None) -> None:
        """The call is over, and the attempt with it unless it waits for another one.

        `error` is why this call failed, if the attempt does not say: because another one follows.
        """
        ...


class JobSpan(Protocol):
    """One delivery of a job, as a trace has it. Exactly one of its ends counts: the first."""

    @property
    def trace(self) -> Headers:
        """The trace context that the job carries from here on: into its events and calls."""
        ...

    def open_try(self, attempt: Attempt, upstream: str) -> TrySpan:
        """An upstream is called next."""
        ...

    def ended(self, event: UsageEvent, upstream: str) -> None:
        """The terminal event is durable."""
        ...

    def refused(self, code: ErrorCode) -> None:
        """The record cannot be run; its dead letter and its terminal event are durable."""
        ...

    def abandoned(self, reason: str) -> None:
        """The job was let go without a terminal event; its next owner runs it."""
        ...

    def crashed(self) -> None:
        """A bug of ours ended it; it is run anew, as another delivery."""
        ...


class Tracer(Protocol):
    """Opens the spans of deliveries. It and its spans must neither raise nor wait."""

    def open_job(self, job: Job | Rejection, deliveries: int) -> JobSpan:
        """A record was delivered for the so-manieth time, and is a job or is not."""
        ...


class Untraced:
    """No tracing: a `Tracer`, `JobSpan` and `TrySpan` that hands on the context that the job's record carried."""

    def __init__(self, trace: Headers = ()) -> None:
        self.trace = trace

    def open_job(self, job: Job | Rejection, deliveries: int) -> Untraced:  # noqa: ARG002 - the port's
        """Hand on."""
        return Untraced(job.trace)

    def open_try(self, attempt: Attempt, upstream: str) -> Untraced:  # noqa: ARG002 - the port's
        """Hand on."""
        return Untraced(attempt.job.trace)

    def first_delta(self) -> None:
        """Nothing."""

    def ended(self, *_: object) -> None:
        """Nothing."""

    def refused(self, code: ErrorCode) -> None:
        """Nothing."""

    def abandoned(self, reason: str) -> None:
        """Nothing."""

    def crashed(self) -> None:
        """Nothing."""


UNTRACED = Untraced()


def trace_headers(trace: Headers) -> dict[str, str]:
    """Return trace-context record headers as HTTP headers; values that are no printable ASCII are left out."""
    texts = ((name, value.decode()) for name, value in trace if value is not None and value.isascii())
    return {name: text for name, text in texts if text.isprintable()}
