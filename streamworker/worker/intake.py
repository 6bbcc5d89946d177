"""Turns a job record into a job and its destination, or into a rejection."""

from __future__ import annotations

from dataclasses import dataclass
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
from streamworker.stream.attempt import Attempt, queued_ms
from streamworker.wire.deadletter import PREFIX, dead_letter
from streamworker.wire.job import read_job
from streamworker.worker.routing import choose_upstreams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamworker.ports import Clock, Sink
    from streamworker.wire.event import EventWriter
    from streamworker.worker.policy import UpstreamPolicy
    from streamworker.worker.results import Results

__all__ = ["Accepted", "Intake", "IntakeRules", "Refused"]


class Accepted(NamedTuple):
    """A job that can run: the upstreams that may serve it, in order, and the partition of its events.

    Waiting jobs of different `value`s take turns.
    """

    job: Job
    upstreams: tuple[str, ...]
    to: TopicPartition
    span: JobSpan = UNTRACED
    value: bytes | str | None = None


class Refused(NamedTuple):
    """A record that cannot run, and the records to write for it.

    `fallback` replaces `records` where the broker refuses the dead letter for its size.
    """

    rejection: Rejection
    code: ErrorCode
    records: Sequence[ProducerRecord]
    fallback: Sequence[ProducerRecord]
    span: JobSpan = UNTRACED


@dataclass(frozen=True, kw_only=True, slots=True)
class IntakeRules:
    """What the configuration says about records. Sizes in bytes; `group` is named in dead letters."""

    events_topic: str
    dlq_topic: str
    allowed_reply_to: frozenset[str]
    group: str
    max_job_bytes: int
    max_record_bytes: int
    max_deliveries: int
    fair_by: str = ""


class Intake:
    """Turns job records into jobs, or into the records that a rejection owes."""

    def __init__(
        self,
        rules: IntakeRules,
        policies: Mapping[str, UpstreamPolicy],
        *,
        sink: Sink,
        writer: EventWriter,
        clock: Clock,
        tracer: Tracer = UNTRACED,
        results: Results | None = None,
    ) -> None:
        self._rules = rules
        self._policies = policies
        self._sink = sink
        self._writer = writer
        self._clock = clock
        self._tracer = tracer
        self._results = results

    def take(self, record: ConsumerRecord, deliveries: int) -> Accepted | Refused:
        """Decide about a record that has a value; `deliveries` counts this delivery too. Raises KafkaRefused."""
        job = _unreadable(record) or read_job(record, max_bytes=self._rules.max_job_bytes)
        span = self._tracer.open_job(job, deliveries)
        if span.trace is not job.trace:
            job = msgspec.structs.replace(job, trace=span.trace)
        return self._decide(record, job, deliveries)._replace(span=span)

    def own_id(self, record: ConsumerRecord) -> str | None:
        """Return the id that a record gives to its job; None if it gives none, or if the record is rejected."""
        if record.value is None or record.unreadable is not None:
            return None
        job = read_job(record, max_bytes=self._rules.max_job_bytes)
        if isinstance(job, Rejection) or job.job_id == str(record.at):
            return None
        upstreams = choose_upstreams(job.upstream, job.model, self._policies)
        return None if self._find_fault(job, upstreams) else job.job_id

    @property
    def max_deliveries(self) -> int:
        """How often a record is delivered before it becomes a dead letter."""
        return self._rules.max_deliveries

    def give_up_unread(self, record: ConsumerRecord) -> Refused:
        """Return the dead letter and the terminal event of a record whose reading raises an exception."""
        message = f"the worker failed {self._rules.max_deliveries} times while it read this record"
        rejection = Rejection(
            job_id=str(record.at), source=record.at, timestamp=record.timestamp, faults=(message,)
        )
        return self._refuse(record, rejection, ErrorCode.MAX_DELIVERIES)

    def _decide(self, record: ConsumerRecord, job: Job | Rejection, deliveries: int) -> Accepted | Refused:
        if isinstance(job, Rejection):
            return self._refuse(record, job, ErrorCode.INVALID_JOB)
        upstreams = choose_upstreams(job.upstream, job.model, self._policies)
        if (refusal := self._find_fault(job, upstreams)) is not None:
            fault, code = refusal
            return self._refuse(record, _rejection(job, fault), code)
        to = self._partition(job.job_id, job.reply_to)
        if deliveries > self._rules.max_deliveries:
            return self._give_up(record, job, upstreams[0], to)
        return Accepted(job, upstreams, to, value=self._fair_value(record, job))

    def _find_fault(self, job: Job, upstreams: Sequence[str]) -> tuple[str, ErrorCode] | None:
        """Return why a valid job cannot run with this configuration; None if it can."""
        if job.reply_to != self._allowed(job.reply_to):
            fault = "reply_to: is not one of the topics that the worker's topics.allowed_reply_to names"
            return fault, ErrorCode.INVALID_JOB
        if not upstreams:
            fault = (
                "upstream: no upstream of that name is configured"
                if job.upstream
                else "upstream: none serves the model"
            )
            return fault, ErrorCode.UNKNOWN_UPSTREAM
        if _echoed_bytes(job) > self._rules.max_record_bytes:
            return "metadata: is too large to be echoed in an event", ErrorCode.INVALID_JOB
        return None

    def _fair_value(self, record: ConsumerRecord, job: Job) -> bytes | str | None:
        """Return the value by which the job takes turns with others; None if it has none."""
        if not self._rules.fair_by:
            return None
        if self._rules.fair_by == "key":
            return record.key
        return job.metadata.get(self._rules.fair_by.removeprefix("metadata:"))

    def _allowed(self, reply_to: str | None) -> str | None:
        return reply_to if reply_to in self._rules.allowed_reply_to else None

    def _refuse(self, record: ConsumerRecord, rejection: Rejection, code: ErrorCode) -> Refused:
        message = "; ".join(rejection.faults)
        letter = self._letter(record, code, message)
        event = self._terminal(rejection, code, message)
        to = self._partition(rejection.job_id, self._allowed(rejection.reply_to))
        terminal = self._writer.write(event, to, rejection.job_id.encode(), rejection.trace)
        ending = (terminal, *self._result(event, rejection))
        return Refused(rejection, code, (letter, *ending), (_coordinates_only(record, letter), *ending))

    def _give_up(self, record: ConsumerRecord, job: Job, upstream: str, to: TopicPartition) -> Refused:
        """End a job that was delivered too often. Readers follow its latest `started`, so it gets one more."""
        times = self._rules.max_deliveries
        message = f"the worker died or failed {times} times while this job ran"
        now = self._clock.now_ms()
        attempt = Attempt(job, attempt_id=uuid4().hex, upstream=upstream, cause="redelivered", now_ms=now)
        started = attempt.started()
        attempt.fail(JobError(ErrorCode.MAX_DELIVERIES, message))
        key, terminal = job.job_id.encode(), attempt.terminal(now)
        events = [self._writer.write(event, to, key, job.trace) for event in (started, terminal)]
        letter = self._letter(record, ErrorCode.MAX_DELIVERIES, message)
        code, rejection = ErrorCode.MAX_DELIVERIES, _rejection(job, message)
        ending = (*events, *self._result(terminal, rejection, upstream))
        return Refused(rejection, code, (letter, *ending), (_coordinates_only(record, letter), *ending))

    def _result(
        self, event: UsageEvent, rejection: Rejection, upstream: str | None = None
    ) -> tuple[ProducerRecord, ...]:
        """Return the result record, if results are on. It has no completion, because no call was made."""
        if self._results is None:
            return ()
        record, _ = self._results.write(
            event, rejection.source, model=rejection.model, upstream=upstream, trace=rejection.trace
        )
        return (record,)

    def _letter(self, record: ConsumerRecord, code: ErrorCode, message: str) -> ProducerRecord:
        key = record.key if record.key is not None else str(record.at).encode()
        to = self._sink.partition_for(self._rules.dlq_topic, key)
        if record.unreadable is not None:  # Kafka wants a key or a value
            record = msgspec.structs.replace(record, key=key)
        return dead_letter(record, to, code=code, message=message, group=self._rules.group)

    def _terminal(self, rejection: Rejection, code: ErrorCode, message: str) -> UsageEvent:
        """Return the only event of a job that had no attempt: `seq` 0, no `started` before it."""
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
            timing=Timing(queued=queued_ms(rejection.timestamp, now), first_delta=None, total=0),
            tries=0,
            metadata={},
        )

    def _partition(self, job_id: str, reply_to: str | None) -> TopicPartition:
        return self._sink.partition_for(reply_to or self._rules.events_topic, job_id.encode())


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
        model=job.model,
        trace=job.trace,
    )


def _unreadable(record: ConsumerRecord) -> Rejection | None:
    """Return the rejection of a record that could not be decoded; its id is made of its coordinates."""
    if record.unreadable is None:
        return None
    return Rejection(
        job_id=str(record.at), source=record.at, timestamp=record.timestamp, faults=(record.unreadable,)
    )


def _coordinates_only(record: ConsumerRecord, letter: ProducerRecord) -> ProducerRecord:
    """Return a dead letter without the record's key, value and headers, for a topic in which they do not fit."""
    left_out = len(record.value or b""), sum(len(name) + len(value or b"") for name, value in record.headers)
    notes = tuple(
        (f"{PREFIX}{name}_left_out", str(size).encode())
        for name, size in zip(("value", "headers"), left_out, strict=True)
    )
    errors = letter.headers[len(record.headers) :]
    return ProducerRecord(letter.topic_partition, str(record.at).encode(), None, errors + notes)
