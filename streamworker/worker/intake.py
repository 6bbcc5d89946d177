"""From a record to what is to be done with it: a job and where it goes, or a rejection."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import msgspec

from streamworker.model import (
    ConsumerRecord,
    ErrorCode,
    Job,
    JobError,
    Observed,
    ProducerRecord,
    Rejection,
    Status,
    Timing,
    TopicPartition,
    UsageEvent,
    UsageSource,
)
from streamworker.observe import UNTRACED, JobSpan, Tracer
from streamworker.stream.attempt import Attempt
from streamworker.wire.deadletter import dead_letter
from streamworker.wire.job import read_job
from streamworker.worker.routing import choose_upstreams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamworker.ports import Clock, Sink
    from streamworker.wire.event import EventWriter

__all__ = ["Accepted", "Intake", "Refused"]


class Accepted(NamedTuple):
    """A job that can run: the upstreams that may serve it, in order, and its events partition."""

    job: Job
    upstreams: tuple[str, ...]
    to: TopicPartition
    span: JobSpan = UNTRACED


class Refused(NamedTuple):
    """A record that cannot: what is owed for it. `fallback` stands in where the dead letter is too large to write."""

    rejection: Rejection
    code: ErrorCode
    records: Sequence[ProducerRecord]
    fallback: Sequence[ProducerRecord]
    span: JobSpan = UNTRACED


class Intake:
    """Reads records by the contract and by the configuration: known upstreams, allowed topics."""

    def __init__(
        self,
        *,
        sink: Sink,
        writer: EventWriter,
        clock: Clock,
        served: Mapping[str, Sequence[str]],
        fallback: Mapping[str, Sequence[str]] | None = None,
        events_topic: str,
        allowed_reply_to: Sequence[str],
        dlq_topic: str,
        group: str,
        max_job_bytes: int,
        max_record_bytes: int,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self._sink = sink
        self._writer = writer
        self._clock = clock
        self._served = served
        self._fallback = fallback or {}
        self._events_topic = events_topic
        self._allowed_reply_to = frozenset(allowed_reply_to)
        self._dlq_topic = dlq_topic
        self._group = group
        self._max_job_bytes = max_job_bytes
        self._max_record_bytes = max_record_bytes
        self._tracer = tracer

    def take(self, record: ConsumerRecord, deliveries: int, max_deliveries: int) -> Accepted | Refused:
        """Decide about a record that has a value and was now delivered so often."""
        job = read_job(record, max_bytes=self._max_job_bytes)
        span = self._tracer.open_job(job, deliveries)
        if span.trace is not job.trace:
            job = msgspec.structs.replace(job, trace=span.trace)
        return self._decide(record, job, deliveries, max_deliveries)._replace(span=span)

    def _decide(
        self, record: ConsumerRecord, job: Job | Rejection, deliveries: int, max_deliveries: int
    ) -> Accepted | Refused:
        if isinstance(job, Rejection):
            return self._refuse(record, job, ErrorCode.INVALID_JOB)
        if job.reply_to != self._allowed(job.reply_to):
            fault = "reply_to: is not one of the topics that the worker's topics.allowed_reply_to names"
            return self._refuse(record, _rejection(job, fault), ErrorCode.INVALID_JOB)
        upstreams = choose_upstreams(job.upstream, job.model, self._served, self._fallback)
        if not upstreams:
            fault = (
                "upstream: no upstream of that name is configured"
                if job.upstream
                else "upstream: none serves the model"
            )
            return self._refuse(record, _rejection(job, fault), ErrorCode.UNKNOWN_UPSTREAM)
        if _echoed_bytes(job) > self._max_record_bytes:
            fault = "metadata: is too large to be echoed in an event"
            return self._refuse(record, _rejection(job, fault), ErrorCode.INVALID_JOB)
        to = self._partition(job.job_id, job.reply_to)
        if deliveries > max_deliveries:
            return self._give_up(record, job, upstreams[0], to, max_deliveries)
        return Accepted(job, upstreams, to)

    def _allowed(self, reply_to: str | None) -> str | None:
        return reply_to if reply_to in self._allowed_reply_to else None

    def _refuse(self, record: ConsumerRecord, rejection: Rejection, code: ErrorCode) -> Refused:
        message = "; ".join(rejection.faults)
        letter = self._letter(record, code, message)
        event = self._terminal(rejection, code, message)
        to = self._partition(rejection.job_id, self._allowed(rejection.reply_to))
        terminal = self._writer.write(event, to, rejection.job_id.encode(), rejection.trace)
        return Refused(rejection, code, (letter, terminal), (_emptied(letter), terminal))

    def _give_up(
        self, record: ConsumerRecord, job: Job, upstream: str, to: TopicPartition, max_deliveries: int
    ) -> Refused:
        """End a job that was begun too often. Readers follow its latest `started`, so it gets one more."""
        message = f"the job was delivered {max_deliveries} times and never ended: its worker died or lost it each time"
        now = self._clock.now_ms()
        attempt = Attempt(job, attempt_id=uuid4().hex, upstream=upstream, cause="redelivered", now_ms=now)
        started = attempt.started()
        attempt.fail(JobError(ErrorCode.MAX_DELIVERIES, message))
        key = job.job_id.encode()
        events = [self._writer.write(event, to, key, job.trace) for event in (started, attempt.terminal(now))]
        letter = self._letter(record, ErrorCode.MAX_DELIVERIES, message)
        code, rejection = ErrorCode.MAX_DELIVERIES, _rejection(job, message)
        return Refused(rejection, code, (letter, *events), (_emptied(letter), *events))

    def _letter(self, record: ConsumerRecord, code: ErrorCode, message: str) -> ProducerRecord:
        key = record.key if record.key is not None else str(record.at).encode()
        to = self._sink.partition_for(self._dlq_topic, key)
        return dead_letter(record, to, code=code, message=message, group=self._group)

    def _terminal(self, rejection: Rejection, code: ErrorCode, message: str) -> UsageEvent:
        """Return the only event of a job that never had an attempt: `seq` 0, no `started` before it."""
        now = self._clock.now_ms()
        return UsageEvent(
            job_id=rejection.job_id,
            attempt=uuid4().hex,
            seq=0,
            ts=now,
            status=Status.REJECTED,
            finish_reasons={},
            usage=None,
            usage_source=UsageSource.NONE,
            observed=Observed(),
            error=JobError(code, message),
            timing=Timing(queued=max(0, now - rejection.timestamp), first_delta=None, total=0),
            tries=0,
            metadata={},
        )

    def _partition(self, job_id: str, reply_to: str | None) -> TopicPartition:
        return self._sink.partition_for(reply_to or self._events_topic, job_id.encode())


def _echoed_bytes(job: Job) -> int:
    texts = (job.model, *job.metadata, *job.metadata.values())
    return 8192 + 6 * sum(map(len, texts))  # a character is at most six bytes of JSON


def _rejection(job: Job, fault: str) -> Rejection:
    return Rejection(
        job_id=job.job_id,
        source=job.source,
        timestamp=job.timestamp,
        faults=(fault,),
        reply_to=job.reply_to,
        trace=job.trace,
    )


def _emptied(letter: ProducerRecord) -> ProducerRecord:
    note = ("__streamworker.errors.value_left_out", str(len(letter.value or b"")).encode())
    return ProducerRecord(letter.topic_partition, letter.key, None, (*letter.headers, note))
