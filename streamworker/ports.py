"""The ends of the pipe, as small protocols. `worker` speaks to these; `kafka`, `upstream` and `telemetry` are behind.

What an adapter may raise is part of its contract; anything else is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from streamworker.core.attempt import Attempt
    from streamworker.model import (
        CommitPoint,
        ErrorCode,
        Headers,
        Job,
        JobError,
        Outgoing,
        Partition,
        Record,
        Rejection,
        UsageEvent,
    )

__all__ = [
    "UNTRACED",
    "Answer",
    "Assignments",
    "Clock",
    "Committer",
    "Committers",
    "JobSpan",
    "KafkaPart",
    "Observer",
    "Receipt",
    "Sink",
    "Source",
    "Tracer",
    "TrySpan",
    "Untraced",
    "Upstream",
]


KafkaPart = Literal["start", "poll", "sink", "lane"]
"""Who talks to Kafka: the connections at the start, the poll loop, the sink of the deltas, the commit lanes."""


class Clock(Protocol):
    """Time, so that tests can turn it."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch, for what others read."""
        ...

    def monotonic(self) -> float:
        """Seconds of a clock that never jumps, for waiting."""
        ...


class Assignments(Protocol):
    """Is told which partitions are ours. Called in the consumer's own task: it must return at once."""

    def rebalancing(self) -> None:
        """The group calls its members together; what is ours is known when `assigned` is called."""
        ...

    def assigned(self, partitions: frozenset[Partition], *, is_continuous: bool) -> None:
        """These are ours now, all of them.

        `is_continuous` is false when we were out of the group in between: another worker may have owned, and given
        back, what we still think ours.
        """
        ...


class Source(Protocol):
    """The consumer group's side of the job topics."""

    async def start(self, assignments: Assignments) -> None:
        """Join the group. Raises KafkaError."""
        ...

    async def receive(self, partitions: Collection[Partition], limit: int) -> list[Record]:
        """Return records of these partitions, at most `limit`, waiting a moment for them. Raises KafkaError.

        Without partitions it returns at once; it is called all the same, so that the group's errors are seen.
        """
        ...

    def seek(self, partition: Partition, offset: int) -> None:
        """Read this partition from here on."""
        ...

    async def confirm_membership(self) -> bool:
        """Ask the group's coordinator whether we still are a member. Raises KafkaError where it cannot tell now."""
        ...

    async def stop(self) -> None:
        """Leave the group. Bounded in time."""
        ...


class Receipt(Protocol):
    """What one job is owed by the sink: the acknowledgement of everything it published."""

    async def settled(self) -> None:
        """Wait until every record is acknowledged. Raises RecordTooLarge if the broker refused one."""
        ...


class Sink(Protocol):
    """Where deltas go: in order per partition, acknowledged by all in-sync replicas."""

    def receipt(self) -> Receipt:
        """Open an account for a job."""
        ...

    def publish(self, record: Outgoing, receipt: Receipt) -> None:
        """Take a record. Never waits; ask `has_room` first and wait for `room` if it says no."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether the broker keeps up. While it does not, whoever has more to publish waits."""
        ...

    async def room(self) -> None:
        """Wait until there is room."""
        ...

    def partition_for(self, topic: str, key: bytes) -> Partition:
        """Choose the partition as Kafka's default partitioner does. Raises KafkaRefused for an unknown topic."""
        ...


class Committer(Protocol):
    """How one assigned partition's progress becomes durable."""

    async def open(self) -> CommitPoint:
        """Shut out the former owner, then read what was committed, or where the log begins. Raises KafkaError."""
        ...

    async def commit(self, records: Sequence[Outgoing], point: CommitPoint) -> None:
        """Write the records and the point. Retries what may pass by itself.

        Raises:
            Fenced: another worker owns the partition; nothing was written.
            RecordTooLarge: one of the records is refused; nothing was written.
        """
        ...

    async def close(self) -> None:
        """Let go. Bounded in time; never raises."""
        ...


class Committers(Protocol):
    """Makes a committer per assigned partition."""

    def committer(self, partition: Partition) -> Committer:
        """Return a new one, not opened."""
        ...


class Answer(Protocol):
    """An upstream's answer: the body of its event stream, as it comes."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Go through the body. Raises UpstreamError when the connection breaks."""
        ...

    async def drain(self) -> None:
        """After the end was seen: read on for a moment, so that the connection can serve the next call."""
        ...


class Upstream(Protocol):
    """One configured upstream."""

    def call(self, body: bytes, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Open a streaming completion; entering waits for the answer. Raises UpstreamError.

        Leaving before the end of the body closes the connection, so that the upstream stops generating.
        """
        ...


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

    def tombstone_skipped(self, partition: Partition) -> None:
        """A record without a value was passed over."""
        ...

    def record_skipped(self, partition: Partition) -> None:
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

    def partition_fenced(self, partition: Partition) -> None:
        """Another worker shut us out of a partition that we thought ours."""
        ...

    def committed(self, records: Sequence[Outgoing], seconds: float) -> None:
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
