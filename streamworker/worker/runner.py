"""One attempt at one job: calls the upstream, publishes its deltas, writes the terminal event.

Readers rely on this order: the upstream is called at once; deltas wait until `started` is written; the terminal event
waits until every delta is acknowledged; the offset is committed with the terminal event.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from random import random
from typing import TYPE_CHECKING
from uuid import uuid4

from streamworker.errors import UpstreamError
from streamworker.limits.limiter import Verdict
from streamworker.model import Advice, Coordinates, ErrorCode, JobError, Status, UsageSource
from streamworker.observe import UNTRACED, trace_headers
from streamworker.stream.attempt import Attempt, State
from streamworker.stream.coalesce import MAX_MERGED_BYTES, Coalescer
from streamworker.stream.retry import next_try_s
from streamworker.wire.job import request_body
from streamworker.worker.publisher import DeltaPublisher, too_large
from streamworker.worker.reading import AnswerReader
from streamworker.worker.timeouts import Interrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.limits.limiter import Slot
    from streamworker.model import Cause, Event, ProducerRecord, UsageEvent
    from streamworker.observe import Observer, TrySpan
    from streamworker.ports import Answer, Clock, Sink
    from streamworker.stream.usage import Tokenizer, VoidedUsage
    from streamworker.wire.event import EventWriter
    from streamworker.worker.committer import PartitionCommitter
    from streamworker.worker.intake import Accepted
    from streamworker.worker.policy import UpstreamPolicy
    from streamworker.worker.queues import UpstreamQueues
    from streamworker.worker.results import Results
    from streamworker.worker.timeouts import StreamTimeouts

__all__ = ["AttemptRunner", "Tools"]

_REPEAT_S = 1.0
"""Seconds until a refused job is called again, while the calls of other jobs show whether the refusal is its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tools:
    """What all deliveries of a worker share.

    `max_record_bytes` bounds an event record, `max_event_bytes` a server-sent event of an upstream. Text deltas are
    held for at most `coalesce_s` seconds to be merged; 0 holds none. A job with merged deltas has no such limit.
    """

    sink: Sink
    writer: EventWriter
    clock: Clock
    observer: Observer
    queues: UpstreamQueues
    max_record_bytes: int
    max_event_bytes: int
    tokenizer: Tokenizer | None = None
    coalesce_s: float = 0
    results: Results | None = None
    """Makes the records of the results topic, if there is one."""


class AttemptRunner:
    """Runs one attempt: waits for a slot, opens the attempt at that slot's upstream, calls until the attempt ends.

    The runner alone holds the slot of the current try. Call `release` in the end, whatever happened.
    """

    def __init__(
        self,
        tools: Tools,
        accepted: Accepted,
        committer: PartitionCommitter,
        timeouts: StreamTimeouts,
        *,
        upstreams: Sequence[str],
        cause: Cause,
        tries: int = 0,
        voided: VoidedUsage | None = None,
        waits_since: float | None = None,
        on_opened: Callable[[], None] = lambda: None,
    ) -> None:
        """`upstreams` may serve the job, in order; `tries` is the number of calls that earlier attempts made, and `voided` has their usage reports.

        `waits_since` is when the job began to wait for an upstream, on the loop's clock; now by default. `on_opened` is called when the attempt is opened, before its `started` event is written.
        """
        self._tools = tools
        self._queues = tools.queues
        self._accepted = accepted
        self._job = accepted.job
        self._committer = committer
        self._timeouts = timeouts
        self._upstreams = upstreams
        self._cause: Cause = cause
        self._tries_before = tries
        self._voided = voided
        self._on_opened = on_opened
        self.policy: UpstreamPolicy = self._queues.policies[upstreams[0]]
        """The settings of the attempt's upstream."""
        self.fallbacks: Sequence[str] = ()
        """The upstreams that remain for another attempt."""
        self.is_finished = False
        """Whether the job's terminal event is durable."""
        self.is_between_tries = False
        """Whether a try has failed and the job waits for the next one: no call is open."""
        self._completion = None if tools.results is None else tools.results.assembler()
        self._started_at: Coordinates | None = None
        self._slot: Slot | None = None
        self._span: TrySpan = UNTRACED
        self._advice = Advice()
        self._next_try_s = 0.0
        self._free_tries = 0  # tries that failed for a reason that concerns every job of the upstream
        self._was_refused = False
        self._waits_since = asyncio.get_running_loop().time() if waits_since is None else waits_since

    async def stream(self) -> Attempt:
        """Run the attempt until it has ended and all its deltas are acknowledged; the terminal event is not written.

        A cancellation of the task closes the upstream's connection at once and writes nothing more.
        """
        no_slot = await self._wait_for_slot(self._upstreams)
        if self._slot is not None:
            name = self._slot.upstream
            self.policy = self._queues.policies[name]
            self.fallbacks = self._upstreams[self._upstreams.index(name) + 1 :]
        attempt = self._open()
        if self._completion is not None:
            self._completion.start(attempt=attempt.id, model=self._job.model, started_ms=attempt.opened_ms)
        started = self._committer.start(self._record(attempt.started()))
        publisher = DeltaPublisher(
            self._tools,
            attempt,
            self._timeouts,
            to=self._accepted.to,
            upstream=self.policy.name,
            started=started,
            on_first_delta=self._on_first_delta,
            completion=self._completion,
        )
        self._tools.observer.job_started(self._job, self.policy.name)
        if isinstance(no_slot, JobError):
            attempt.fail(no_slot)
        elif no_slot is not None:
            await self._interrupt(attempt, publisher, no_slot)
        await self._call_until_ended(attempt, publisher)
        offset = await started
        self._started_at = None if offset is None else Coordinates(*self._accepted.to, offset)
        await publisher.settle()
        return attempt

    async def finish(self, attempt: Attempt) -> UsageEvent:
        """Write the terminal event and commit the job's offset; return the event once both are durable.

        The result is written with them, if there is a results topic.
        """
        event, records, fallback = self._ending(attempt)
        await self._committer.finish(self._job.source.offset, records, fallback=fallback)
        self.is_finished = True
        self._tools.observer.job_ended(event, self._job, self.policy.name)
        self._accepted.span.ended(event, self.policy.name)
        return event

    def release(self) -> None:
        """Release the slot, if the runner holds one: the job is not in flight any more."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._queues.release(slot)

    def _open(self) -> Attempt:
        self._on_opened()
        return Attempt(
            self._job,
            attempt_id=uuid4().hex,
            upstream=self.policy.name,
            cause=self._cause,
            now_ms=self._tools.clock.now_ms(),
            max_event_bytes=self._tools.max_event_bytes,
            scrub=self.policy.scrub,
            tries=self._tries_before,
            voided=self._voided,
            tokenizer=self._tools.tokenizer,
            coalescer=self._coalescer(),
        )

    def _coalescer(self) -> Coalescer | None:
        if self._job.deltas == "merged":
            # A character takes at most six bytes of JSON.
            return Coalescer(merged=True, max_bytes=min(MAX_MERGED_BYTES, self._tools.max_record_bytes // 8))
        return Coalescer() if self._tools.coalesce_s > 0 else None

    async def _wait_for_slot(
        self, upstreams: Sequence[str], *, is_retry: bool = False
    ) -> Interrupt | JobError | None:
        """Wait for the slot of the next try; return what ended the wait without one, None if there is a slot."""
        if (pending := self._timeouts.pending) is not None:
            return pending
        async with self._timeouts.watch():
            if self._next_try_s:
                await self._queues.rest(self._next_try_s)
            try:
                self._slot = await self._enter(upstreams, is_retry=is_retry)
            except UpstreamError as refusal:
                return refusal.error
        return self._timeouts.interrupted_by

    async def _enter(self, upstreams: Sequence[str], *, is_retry: bool) -> Slot:
        """Wait for a slot, and for commits to succeed: the result of a call could not be recorded. Raises UpstreamError."""
        while True:
            await self._committer.flowing()
            slot = await self._queues.enter(
                upstreams,
                self._job,
                value=self._accepted.value,
                is_retry=is_retry,
                is_patient=not (is_retry and self._queues.has_open(self.fallbacks)),
                since=self._waits_since,
            )
            if not self._committer.is_stalled:
                return slot
            self._queues.release(slot)  # commits began to fail while the job waited

    # Tries

    async def _call_until_ended(self, attempt: Attempt, publisher: DeltaPublisher) -> None:
        """Call the upstream, and again while tries fail before the first delta and another one is due."""
        while not attempt.is_ended:
            if (pending := self._timeouts.pending) is not None:
                await self._interrupt(attempt, publisher, pending)
            elif self._slot is not None:
                await self._try(attempt, publisher, self._slot)
            else:
                no_slot = await self._wait_for_next_try()
                if isinstance(no_slot, JobError):
                    # The job's own error has the upstream's words; it counts if the job waited for the same reason.
                    own = attempt.error
                    attempt.fail(own if own is not None and own.code is no_slot.code else no_slot)
                elif no_slot is not None:
                    await self._interrupt(attempt, publisher, no_slot)

    async def _wait_for_next_try(self) -> Interrupt | JobError | None:
        """Wait for the slot of another try of this attempt; return what ended the wait without one, None if there is a slot."""
        self.is_between_tries = True
        try:
            return await self._wait_for_slot([self.policy.name], is_retry=True)
        finally:
            self.is_between_tries = False

    async def _try(self, attempt: Attempt, publisher: DeltaPublisher, slot: Slot) -> None:
        """Make one call, read its stream, and decide what follows. Nothing is held between two tries."""
        self._span = self._accepted.span.open_try(attempt, self.policy.name)
        self._advice = Advice()
        failure: JobError | None = None
        try:
            async with self._timeouts.watch(
                first_delta_s=self.policy.first_delta_timeout_s,
                idle_s=self.policy.idle_timeout_s,
                on_cancel=partial(self._wind_up, attempt, publisher),
            ):
                await self._call(attempt, publisher)
            interrupt = self._timeouts.interrupted_by
            if interrupt is not None and not attempt.is_ended:
                await self._interrupt(attempt, publisher, interrupt)
            if attempt.state is State.TRY_FAILED and attempt.error is not None:
                failure = attempt.error
                self._retry_or_end(attempt, slot, failure)
            elif attempt.status is Status.COMPLETED:
                self._queues.succeeded(slot)
        finally:
            self._span.ended(attempt, failure)
        self._end_call(attempt, slot, failure)

    async def _call(self, attempt: Attempt, publisher: DeltaPublisher) -> None:
        attempt.call()
        body = request_body(
            self._job, include_usage=self.policy.include_usage, continuous_usage=self.policy.continuous_usage
        )
        try:
            async with self.policy.upstream.call(body, trace_headers(self._span.trace)) as answer:
                del body  # it holds the prompt, and the answer may stream for minutes
                attempt.answer(answer.status, answer.content_type)
                if self._slot is not None:
                    self._queues.answered(self._slot)
                await self._read(answer, attempt, publisher)
                if attempt.status is Status.COMPLETED:
                    await answer.drain()
        except UpstreamError as error:
            self._advice = error.advice or self._advice
            await self._break(attempt, publisher, error.error)
        finally:
            publisher.stop_timer()

    async def _read(self, answer: Answer, attempt: Attempt, publisher: DeltaPublisher) -> None:
        await AnswerReader(answer, attempt, publisher, self._tools.clock).read()
        if attempt.is_listening:
            publisher.stop_timer()
            await publisher.publish(attempt.close(self._tools.clock.now_ms()))

    def _retry_or_end(self, attempt: Attempt, slot: Slot, error: JobError) -> None:
        """Decide whether another try follows a failed one, and when."""
        verdict = self._queues.failed(slot, error, self._job.job_id, is_repeated=self._was_refused)
        if verdict is not Verdict.OWN and self._advice.should_retry is not False:
            self._was_refused |= verdict is Verdict.REPEAT
            self._free_tries += 1
            if self.fallbacks and self._queues.has_open(self.fallbacks):
                attempt.end()
                return
            delay_s: float | None = _REPEAT_S if verdict is Verdict.REPEAT else 0.0
        else:
            delay_s = next_try_s(
                error,
                self._advice,
                tries=attempt.tries - self._tries_before - self._free_tries,
                max_tries=self.policy.max_tries,
                random=random(),  # noqa: S311 - jitter
                left_s=self._timeouts.left_s,
            )
        if delay_s is None:
            attempt.end()
            return
        self._next_try_s = delay_s
        self._tools.observer.try_failed(self._job, self.policy.name, error, delay_s)
        attempt.retry()

    def _end_call(self, attempt: Attempt, slot: Slot, failure: JobError | None) -> None:
        """Settle the call's token usage; release the slot if another try follows."""
        ledger = attempt.ledger
        was_refused = failure is not None and (
            (failure.http_status or 200) >= 300 or failure.code is ErrorCode.TIMEOUT_CONNECT
        )
        tokens = 0 if was_refused else ledger.total_tokens
        self._queues.end_call(slot, tokens, ledger.completion_tokens)
        if not attempt.is_ended:
            self.release()

    def _on_first_delta(self) -> None:
        if self._slot is not None:
            self._queues.succeeded(self._slot)
        self._span.first_delta()

    # Interrupts

    def _wind_up(self, attempt: Attempt, publisher: DeltaPublisher) -> float:
        """Handle a cancel record inside a try; return the seconds for which the stream is read on for its usage."""
        if not self.policy.cancel_grace_s or attempt.state is not State.STREAMING:
            return 0.0
        publisher.flush_before_wind_up()
        attempt.wind_up(self._timeouts.cancel_reason or "")
        return self.policy.cancel_grace_s

    async def _interrupt(self, attempt: Attempt, publisher: DeltaPublisher, interrupt: Interrupt) -> None:
        """End the try or the attempt for an interrupt; the held text is published first."""
        publisher.flush()
        match interrupt:
            case Interrupt.DEADLINE:
                attempt.expire(self._waited_for if attempt.state is State.WAITING else None)
            case Interrupt.CANCEL:
                attempt.cancel(self._timeouts.cancel_reason or "")
            case Interrupt.FIRST_DELTA:
                message = f"no delta came within {self.policy.first_delta_timeout_s:g} s"
                error = JobError(ErrorCode.TIMEOUT_FIRST_DELTA, message, retriable=True)
                await self._break(attempt, publisher, error)
            case Interrupt.IDLE:
                message = f"the event stream was silent for {self.policy.idle_timeout_s:g} s after a delta"
                error = JobError(ErrorCode.TIMEOUT_IDLE, message, retriable=True)
                await self._break(attempt, publisher, error)

    @property
    def _waited_for(self) -> str | None:
        return self._queues.queues[self.policy.name].describe_hold()

    async def _break(self, attempt: Attempt, publisher: DeltaPublisher, error: JobError) -> None:
        """Fail the try; an open stream first publishes the rest of its parser."""
        if attempt.is_listening:
            publisher.stop_timer()
            await publisher.publish(attempt.close(self._tools.clock.now_ms(), broken=error))
        elif attempt.state is State.CALLING:
            attempt.fail(error)

    # Records

    def _ending(
        self, attempt: Attempt
    ) -> tuple[UsageEvent, Sequence[ProducerRecord], Sequence[ProducerRecord]]:
        """Return the terminal event, the records that end the job, and what replaces them where they are refused."""
        event, record = self._terminal(attempt)
        results = self._tools.results
        if results is None:
            return event, [record], ()
        result, bare = self._result(results, event)
        if bare.size > results.limit_bytes:
            event, record = self._reduced(attempt, too_large("the result", bare.size, results.limit_bytes))
            result, bare = self._result(results, event)
        return event, [record, result], [record, bare]

    def _result(self, results: Results, event: UsageEvent) -> tuple[ProducerRecord, ProducerRecord]:
        return results.write(
            event,
            self._job.source,
            model=self._job.model,
            upstream=self.policy.name,
            started=self._started_at,
            completion=self._completion,
            trace=self._job.trace,
        )

    def _terminal(self, attempt: Attempt) -> tuple[UsageEvent, ProducerRecord]:
        """Return the terminal event and its record, without what the upstream made too large for a record.

        The broker would refuse an oversized record every time, and with it the other entries of the commit.
        """
        limit = self._tools.max_record_bytes
        event = attempt.terminal(self._tools.clock.now_ms())
        record = self._record(event)
        if record.size <= limit:
            return event, record
        return self._reduced(attempt, too_large("the terminal event", record.size, limit))

    def _reduced(self, attempt: Attempt, error: JobError) -> tuple[UsageEvent, ProducerRecord]:
        """End the attempt with `error`; return its terminal event without the members that the upstream sent."""
        attempt.refuse(error)
        event = attempt.terminal(self._tools.clock.now_ms())
        event.finish_reasons = {}
        if event.usage_source is not UsageSource.ESTIMATED:
            event.usage, event.usage_source = None, UsageSource.NONE
        return event, self._record(event)

    def _record(self, event: Event) -> ProducerRecord:
        key = self._job.job_id.encode()
        return self._tools.writer.write(event, self._accepted.to, key, self._job.trace)
