"""One job, from its `started` to its terminal event.

The order that the reader's rules rest on: the upstream is called at once; deltas wait for `started` to be written;
the terminal event waits for every delta to be acknowledged; the offset is committed with the terminal event.
"""

from __future__ import annotations

import asyncio
from math import inf
from random import random
from typing import TYPE_CHECKING, NamedTuple

from streamworker.errors import RecordTooLarge, UpstreamError
from streamworker.model import Advice, ErrorCode, JobError, Status, UsageSource
from streamworker.observe import UNTRACED, trace_headers
from streamworker.stream.attempt import Attempt, State
from streamworker.stream.retry import next_try_s
from streamworker.wire.job import request_body
from streamworker.worker.timeouts import Interrupt, StreamTimeouts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.model import Cause, DeltaEvent, Event, Job, ProducerRecord, TopicPartition, UsageEvent
    from streamworker.observe import JobSpan, Observer, TrySpan
    from streamworker.ports import Answer, Clock, Sink, Upstream
    from streamworker.stream.usage import Tokenizer
    from streamworker.wire.event import EventWriter
    from streamworker.worker.committer import PartitionCommitter
    from streamworker.worker.queues import Slot, UpstreamQueues

__all__ = ["DELTAS_PER_TURN", "AttemptRunner", "Tools", "UpstreamPolicy"]

DELTAS_PER_TURN = 64
"""Deltas of one stream that are published before others have their turn: about a millisecond of work. One read may
bring thousands, and the heartbeats wait as well."""


class UpstreamPolicy(NamedTuple):
    """A configured upstream: how to call it, and how patient to be with it. Times in seconds."""

    name: str
    upstream: Upstream
    first_delta_timeout_s: float
    idle_timeout_s: float
    include_usage: bool
    scrub: Callable[[str], str]
    max_tries: int = 1
    max_restarts: int = 0
    cancel_grace_s: float = 0
    continuous_usage: bool = False


class Tools(NamedTuple):
    """What all executions share. Limits in bytes: an event record we write, a server-sent event we read.

    `coalesce_s` is how long text deltas may be held to be merged; 0 holds none.
    """

    sink: Sink
    writer: EventWriter
    clock: Clock
    observer: Observer
    max_record_bytes: int
    max_event_bytes: int
    tokenizer: Tokenizer | None = None
    coalesce_s: float = 0


class AttemptRunner:
    """One attempt at one job, at one upstream."""

    def __init__(
        self,
        tools: Tools,
        job: Job,
        policy: UpstreamPolicy,
        committer: PartitionCommitter,
        queues: UpstreamQueues,
        *,
        to: TopicPartition,
        cause: Cause,
        attempt_id: str,
        tries: int = 0,
        slot: Slot | None = None,
        has_fallback: bool = False,
        span: JobSpan = UNTRACED,
    ) -> None:
        """Prepare an attempt, after so many `tries` of the same delivery, with the `permit` for its first call.

        With a fallback, another attempt elsewhere is better than waiting for an upstream that is thought dead.
        """
        self._tools = tools
        self.job = job
        self._policy = policy
        self._committer = committer
        self._queues = queues
        self._to = to
        self._key = job.job_id.encode()
        self._receipt = tools.sink.receipt()
        self._started: asyncio.Future[None] | None = None
        self._timeouts: StreamTimeouts | None = None
        self._release: asyncio.TimerHandle | None = None
        """Lets go of held deltas; None while others are being published."""
        self._cancel_reason: str | None = None
        self._slot = slot
        self._has_fallback = has_fallback
        self._span = span
        self._try_span: TrySpan = UNTRACED
        self._tries_before = tries
        self._advice = Advice()
        self._next_try_s = 0.0
        self._error: JobError | None = None
        self.attempt = Attempt(
            job,
            attempt_id=attempt_id,
            upstream=policy.name,
            cause=cause,
            now_ms=tools.clock.now_ms(),
            max_event_bytes=tools.max_event_bytes,
            scrub=policy.scrub,
            tries=tries,
            may_retry=self._may_retry,
            tokenizer=tools.tokenizer,
            coalesces=tools.coalesce_s > 0,
        )

    async def stream(self, *, instead: Interrupt | JobError | None = None) -> None:
        """Call the upstream until the attempt has ended and everything of it is acknowledged, but its end.

        `instead` says why no call is made at all. A cancellation of the task leaves at once: the upstream's connection
        is closed, nothing more is written.
        """
        self._started = self._committer.start(self._record(self.attempt.started()))
        self._tools.observer.job_started(self.job, self._policy.name)
        if isinstance(instead, JobError):
            self.attempt.fail(instead)
        elif instead is not None:
            await self._end_interrupted(instead)
        await self._call()
        await self._started
        await self._settle()

    async def finish(self) -> UsageEvent:
        """Write the job's terminal event and commit its offset; return it once that is durable."""
        event, record = self._terminal()
        await self._committer.finish(self.job.source.offset, [record])
        self._tools.observer.job_ended(event, self.job, self._policy.name)
        self._span.ended(event, self._policy.name)
        return event

    def cancel(self, reason: str) -> None:
        """End the attempt because a control record asked for it. A record may be heard twice: the first one counts."""
        if self._cancel_reason is not None:
            return
        self._cancel_reason = reason
        if self._timeouts is None:
            return
        if self._policy.cancel_grace_s and self.attempt.state is State.STREAMING:
            if self._release is not None:
                self._let_go()
            self.attempt.wind_up(reason)
            self._timeouts.hurry(self._policy.cancel_grace_s, Interrupt.CANCEL)
        else:
            self._timeouts.interrupt(Interrupt.CANCEL)

    async def _call(self) -> None:
        """Call the upstream, and again as long as tries fail before the first delta and another one is due."""
        while not self.attempt.is_ended:
            if self._cancel_reason is not None:
                self.attempt.cancel(self._cancel_reason)
            elif self._left_s() <= 0:
                self.attempt.expire()
            elif self._slot is None:
                await self._wait_for_slot()
            else:
                await self._try_watched()
                self._hang_up(self._slot)

    def release(self) -> None:
        """Give the permit back: the job is out of flight."""
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()

    async def _wait_for_slot(self) -> None:
        """Wait until the next try is due and its upstream lets it through."""
        timeouts = self._patient(first_delta_s=inf)
        async with timeouts:
            await self._queues.rest(self._next_try_s)
            try:
                self._slot = await self._queues.enter(
                    [self._policy.name], self.job, is_retry=True, is_patient=not self._has_fallback
                )
            except UpstreamError as refusal:
                self.attempt.fail(self._error or refusal.error)
        if timeouts.interrupted_by is not None and not self.attempt.is_ended:
            await self._end_interrupted(timeouts.interrupted_by)

    async def _try_watched(self) -> None:
        self._error = None
        self._try_span = self._span.open_try(self.attempt, self._policy.name)
        try:
            await self._try_patiently()
        finally:
            self._try_span.ended(self.attempt, self._error)

    async def _try_patiently(self) -> None:
        timeouts = self._patient(first_delta_s=self._policy.first_delta_timeout_s)
        async with timeouts:
            await self._try()
        if timeouts.interrupted_by is not None and not self.attempt.is_ended:
            await self._end_interrupted(timeouts.interrupted_by)
        if self.attempt.status is Status.COMPLETED and self._slot is not None:
            self._slot.succeeded()

    def _patient(self, *, first_delta_s: float) -> StreamTimeouts:
        deadline = asyncio.get_running_loop().time() + self._left_s()
        self._timeouts = StreamTimeouts(
            first_delta_s=first_delta_s, idle_s=self._policy.idle_timeout_s, deadline=deadline
        )
        return self._timeouts

    def _hang_up(self, slot: Slot) -> None:
        """The call is over, and came to what is known of it. Before the next one others may go."""
        ledger = self.attempt.ledger
        error = self._error
        was_refused = error is not None and (
            error.http_status not in {None, 200} or error.code is ErrorCode.TIMEOUT_CONNECT
        )
        slot.hang_up(0 if was_refused else ledger.total_tokens, ledger.completion_tokens)
        if not self.attempt.is_ended:
            self.release()

    def _left_s(self) -> float:
        return inf if self.job.deadline is None else self.job.deadline - self._tools.clock.now_ms() / 1000

    def _may_retry(self, error: JobError) -> bool:
        """Decide, when a try has failed before its first delta; note how long to wait."""
        self._error = error
        if self._slot is not None:
            self._slot.failed(error)
        delay_s = next_try_s(
            error,
            self._advice,
            tries=self.attempt.tries - self._tries_before,
            max_tries=self._policy.max_tries,
            random=random(),  # noqa: S311 - jitter
            left_s=self._left_s(),
        )
        if delay_s is None:
            return False
        self._next_try_s = delay_s
        self._tools.observer.try_failed(self.job, self._policy.name, error, delay_s)
        return True

    async def _try(self) -> None:
        self.attempt.call()
        self._advice = Advice()
        body = request_body(
            self.job, include_usage=self._policy.include_usage, continuous_usage=self._policy.continuous_usage
        )
        try:
            async with self._policy.upstream.call(body, trace_headers(self._try_span.trace)) as answer:
                self.attempt.answer()
                await self._read(answer)
                if self.attempt.status is Status.COMPLETED:
                    await answer.drain()
        except UpstreamError as error:
            self._advice = error.advice or self._advice
            if error.usage is not None:
                self.attempt.ledger.report(error.usage, final=True)
            await self._end_broken(error.error)
        finally:
            self._stop_release()

    async def _read(self, answer: Answer) -> None:
        publish = self._publish_merging if self._tools.coalesce_s else self._publish
        async for data in answer:
            await publish(self.attempt.receive(data, self._tools.clock.now_ms()))
            if not self.attempt.is_listening:
                return
        self._stop_release()
        await self._publish(self.attempt.close(self._tools.clock.now_ms()))

    async def _publish(self, events: Iterator[DeltaEvent]) -> None:
        tools = self._tools
        before = self.attempt.ledger.deltas
        count = total = 0
        for event in events:
            record = self._record(event)
            if (size := record.size) > tools.max_record_bytes:
                self.attempt.fail(_too_large("a delta", size, tools.max_record_bytes))
                continue  # the attempt has ended, and so have its events
            if not (tools.sink.has_room and self._started is not None and self._started.done()):
                await self._wait_for_room()
            elif count and count % DELTAS_PER_TURN == 0:  # before it is published: a cancellation may come
                await self._let_others_go()
            tools.sink.publish(record, self._receipt)
            count += 1
            total += size
        gap_s = self._note_delta(is_first=before == 0) if self.attempt.ledger.deltas != before else None
        if count:
            tools.observer.deltas_published(self._policy.name, count, total, gap_s)

    async def _publish_merging(self, events: Iterator[DeltaEvent]) -> None:
        """Publish, and have what is held then leave in time. Never both at once: that would number two events alike."""
        attempt, loop = self.attempt, asyncio.get_running_loop()
        published, held = attempt.ledger.deltas, attempt.held_deltas
        due = loop.time() + self._tools.coalesce_s if self._release is None else self._release.when()
        self._stop_release()
        await self._publish(events)
        if attempt.ledger.deltas == published and attempt.held_deltas > held:  # a sign of life all the same
            self._tools.observer.deltas_published(self._policy.name, 0, 0, self._note_delta(is_first=False))
        if attempt.held_deltas:
            self._release = loop.call_at(due, self._let_go)

    def _let_go(self) -> None:
        """Publish what is held, room or not: it is small, and it was read before there was none."""
        self._stop_release()
        for event in self.attempt.flush():
            record = self._record(event)
            self._tools.sink.publish(record, self._receipt)
            self._tools.observer.deltas_published(self._policy.name, 1, record.size, None)

    def _stop_release(self) -> None:
        if self._release is not None:
            self._release.cancel()
            self._release = None

    def _note_delta(self, *, is_first: bool) -> float | None:
        gap_s = self._timeouts.delta_came() if self._timeouts is not None else None
        if is_first and self._slot is not None:
            self._slot.succeeded()
        if is_first:
            self._try_span.first_delta()
        if is_first and self.attempt.first_delta_ms is not None:
            seconds = (self.attempt.first_delta_ms - self.attempt.opened_ms) / 1000
            self._tools.observer.first_delta(self._policy.name, seconds)
        return gap_s

    async def _let_others_go(self) -> None:
        """Give up a turn of the loop. What the others take is not the upstream's silence."""
        left = self._timeouts.pause() if self._timeouts is not None else 0.0
        await asyncio.sleep(0)
        if self._timeouts is not None:
            self._timeouts.resume(left)

    async def _wait_for_room(self) -> None:
        """Wait for our own side: `started` to be written, the broker to keep up. The socket is not read meanwhile."""
        assert self._started is not None
        left = self._timeouts.pause() if self._timeouts is not None else 0.0
        await asyncio.shield(self._started)
        await self._tools.sink.room()
        if self._timeouts is not None:
            self._timeouts.resume(left)

    async def _end_broken(self, error: JobError) -> None:
        if self.attempt.is_listening:
            self._stop_release()
            await self._publish(self.attempt.close(self._tools.clock.now_ms(), broken=error))
        elif not self.attempt.is_ended and self.attempt.state is not State.WAITING:
            self.attempt.fail(error)

    async def _end_interrupted(self, interrupt: Interrupt) -> None:
        self._let_go()
        match interrupt:
            case Interrupt.DEADLINE:
                self.attempt.expire()
            case Interrupt.CANCEL:
                self.attempt.cancel(self._cancel_reason or "")
            case Interrupt.FIRST_DELTA:
                limit = self._policy.first_delta_timeout_s
                await self._end_broken(
                    _timeout(ErrorCode.TIMEOUT_FIRST_DELTA, f"no delta came within {limit:g} s")
                )
            case Interrupt.IDLE:
                limit = self._policy.idle_timeout_s
                message = f"the event stream was silent for {limit:g} s after a delta"
                await self._end_broken(_timeout(ErrorCode.TIMEOUT_IDLE, message))

    async def _settle(self) -> None:
        try:
            await self._receipt.settled()
        except RecordTooLarge as refusal:
            self.attempt.refuse(JobError(ErrorCode.TOO_LARGE, str(refusal)))

    def _terminal(self) -> tuple[UsageEvent, ProducerRecord]:
        """Return the terminal event and its record; what the upstream made too large for one is left out.

        The broker would refuse it every time, and each time the lane would take the partition's other jobs with it.
        """
        now_ms = self._tools.clock.now_ms()
        event = self.attempt.terminal(now_ms)
        record = self._record(event)
        if record.size <= self._tools.max_record_bytes:
            return event, record
        self.attempt.refuse(_too_large("the terminal event", record.size, self._tools.max_record_bytes))
        event = self.attempt.terminal(now_ms)
        event.finish_reasons = {}
        if event.usage_source is not UsageSource.ESTIMATED:
            event.usage, event.usage_source = None, UsageSource.NONE
        return event, self._record(event)

    def _record(self, event: Event) -> ProducerRecord:
        return self._tools.writer.write(event, self._to, self._key, self.job.trace)


def _timeout(code: ErrorCode, message: str) -> JobError:
    return JobError(code, message, retriable=True)


def _too_large(what: str, size: int, limit: int) -> JobError:
    return JobError(ErrorCode.TOO_LARGE, f"{what} makes a record of {size} bytes, the limit is {limit}", 200)
