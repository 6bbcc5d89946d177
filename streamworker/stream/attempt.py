"""The attempt: one `started` event and the events that follow it, up to the job's terminal event.

The module has two parts. `TRANSITIONS` is a table, state → input → next state: no state changes anywhere else, and a
missing row is an input that cannot occur. A retry after the first published delta, for example, is impossible because
`STREAMING` has no row that leads to `TRY_FAILED`. `Attempt` feeds the upstream's bytes to parser and reader, numbers
the events, keeps the usage ledger, and looks every input up in the table.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.model import (
    Cause,
    ChunkDelta,
    DeltaEvent,
    Done,
    ErrorCode,
    Job,
    JobError,
    Source,
    Started,
    Status,
    StreamError,
    Timing,
    UsageEvent,
    Voided,
)
from streamworker.redaction import Redactor
from streamworker.stream.body import BodyForm, is_json, looks_like_event_stream
from streamworker.stream.chunks import ChunkReader
from streamworker.stream.provider_errors import body_error, to_job_error
from streamworker.stream.sse import EventStreamParser
from streamworker.stream.template import UsualReads, learn_template
from streamworker.stream.usage import Ledger, VoidedUsage
from streamworker.text import RAW_TEXT_LIMIT, UPSTREAM_TEXT_LIMIT, truncate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from streamworker.model import StreamItem
    from streamworker.stream.coalesce import Coalescer
    from streamworker.stream.usage import Tokenizer

__all__ = ["TRANSITIONS", "Attempt", "Input", "InvalidTransition", "State", "Transition", "queued_ms"]


class State(Enum):
    """The state of an attempt."""

    WAITING = "no call is open"
    CALLING = "a call was made and has no answer yet"
    LISTENING = "the event stream is open and has given no delta yet"
    STREAMING = "a delta was published"
    TRY_FAILED = "the call failed before its first delta; the caller retries or ends the attempt"
    WINDING_UP = "cancelled; the stream is read on for its usage report, nothing is published"
    ENDED = "only the terminal event remains"


class Input(Enum):
    """An input to the state machine."""

    CALL = "a try begins"
    ANSWER = "the upstream answered with an event stream"
    DELTA = "a choice delta was published, or was read while winding up"
    DONE = "the stream ended as the protocol says"
    BREAK = "the try failed, for any reason"
    RETRY = "the caller makes another try"
    END = "the caller makes no other try"
    CANCEL = "a control record cancelled the job"
    WIND_UP = "a control record cancelled the job, and the upstream may still report its usage"
    EXPIRE = "the job's deadline passed"
    REFUSE = "the broker refused a published delta"


class Transition(NamedTuple):
    """The next state, and the job's status if the attempt ends there."""

    to: State
    status: Status | None = None


_MAX_MISSES = 4
"""Templates that are learnt in a row without one being of use: some upstreams send other members in every chunk."""

_EXTRA_FIELDS = frozenset({b"error"})
"""Older llama.cpp sends its errors in an SSE field of this name."""

_S, _I, _T = State, Input, Transition
_FAILED, _TRY_FAILED = _T(_S.ENDED, Status.FAILED), _T(_S.TRY_FAILED)
_CANCELLED, _EXPIRED = _T(_S.ENDED, Status.CANCELLED), _T(_S.ENDED, Status.EXPIRED)

TRANSITIONS: Mapping[State, Mapping[Input, Transition]] = {
    _S.WAITING: {
        _I.CALL: _T(_S.CALLING),
        _I.BREAK: _FAILED,
        _I.CANCEL: _CANCELLED,
        _I.EXPIRE: _EXPIRED,
    },
    _S.CALLING: {
        _I.ANSWER: _T(_S.LISTENING),
        _I.BREAK: _TRY_FAILED,
        _I.CANCEL: _CANCELLED,
        _I.EXPIRE: _EXPIRED,
    },
    _S.LISTENING: {
        _I.DELTA: _T(_S.STREAMING),
        _I.DONE: _T(_S.ENDED, Status.COMPLETED),
        _I.BREAK: _TRY_FAILED,
        _I.CANCEL: _CANCELLED,
        _I.EXPIRE: _EXPIRED,
    },
    _S.STREAMING: {
        _I.DELTA: _T(_S.STREAMING),
        _I.DONE: _T(_S.ENDED, Status.COMPLETED),
        _I.BREAK: _T(_S.ENDED, Status.INTERRUPTED),
        _I.WIND_UP: _T(_S.WINDING_UP),
        _I.CANCEL: _CANCELLED,
        _I.EXPIRE: _EXPIRED,
    },
    _S.TRY_FAILED: {
        _I.RETRY: _T(_S.WAITING),
        _I.END: _FAILED,
        _I.CANCEL: _CANCELLED,
        _I.EXPIRE: _EXPIRED,
    },
    # The job was cancelled, however its stream ends.
    _S.WINDING_UP: {
        _I.DELTA: _T(_S.WINDING_UP),
        _I.DONE: _CANCELLED,
        _I.BREAK: _CANCELLED,
        _I.CANCEL: _CANCELLED,
        _I.EXPIRE: _CANCELLED,
    },
    # The broker may refuse a delta after the stream has ended; a reader misses it, so the job is not complete.
    _S.ENDED: {_I.REFUSE: _T(_S.ENDED, Status.INTERRUPTED)},
}


class InvalidTransition(Exception):
    """The table has no row for this input in this state: a bug in the caller, never caused by the upstream."""


class Attempt:
    """One attempt at a job. Times are ms since the epoch, given by the caller.

    Methods that change the state raise InvalidTransition where the table has no row. Call nothing but `terminal` and
    `refuse` once `is_ended` is true.
    """

    def __init__(
        self,
        job: Job,
        *,
        attempt_id: str,
        upstream: str,
        cause: Cause,
        now_ms: int,
        max_event_bytes: int = 1 << 20,
        scrub: Callable[[str], str] | None = None,
        tries: int = 0,
        voided: VoidedUsage | None = None,
        tokenizer: Tokenizer | None = None,
        coalescer: Coalescer | None = None,
    ) -> None:
        """Open an attempt; `tries` is the number of calls that earlier attempts of the delivery made, `voided` has their reports.

        `scrub` removes secrets from error texts. `tokenizer` counts generated text whose usage the upstream does not
        report. With a `coalescer`, deltas after the first are held and merged with those that follow, until another
        kind of delta arrives, the stream ends, or `flush` is called.
        """
        self.job = job
        self.id = attempt_id
        self.state = State.WAITING
        self._ledger = Ledger(tokenizer)
        self.tries = tries
        self.voided = voided or VoidedUsage()
        """What the delivery's other calls reported."""
        self.error: JobError | None = None
        self.status: Status | None = None
        self.first_delta_ms: int | None = None
        self._upstream = upstream
        self._cause: Cause = cause
        self.opened_ms = now_ms
        self._seq = 0
        self._usual: UsualReads | None = None
        self._candidate = b""  # the last read, from which a template can be learnt
        self._misses = 0  # templates that were learnt since one was of use
        self._max_event_bytes = max_event_bytes
        self._scrub = scrub or Redactor()
        self._cancelled: JobError | None = None
        self._is_whole = False  # the stream ended as the protocol says
        self._coalescer = coalescer
        self._http_status = 200
        self._content_type = ""
        self._opening = b""  # the stream's first bytes, kept until the first delta
        self._body = BodyForm(max_event_bytes)
        self._reader = ChunkReader(self._ledger)
        self._parser = self._new_parser()

    # State and results

    @property
    def is_ended(self) -> bool:
        """Whether only the terminal event remains."""
        return self.state is State.ENDED

    @property
    def is_listening(self) -> bool:
        """Whether the event stream is open."""
        # Compared by identity: an Enum's hash runs in Python, and this property is read once per socket read.
        state = self.state
        return state is _S.STREAMING or state is _S.LISTENING or state is _S.WINDING_UP

    @property
    def ledger(self) -> Ledger:
        """What the attempt received, and what the upstream reported."""
        if self._usual is not None:
            self._usual.settle()
        return self._ledger

    @property
    def seq(self) -> int:
        """The `seq` of the next event."""
        return self._seq if self._usual is None else self._usual.seq

    @property
    def held_deltas(self) -> int:
        """The number of choice deltas that are held to be merged."""
        held = None if self._coalescer is None else self._coalescer.held
        return 0 if held is None else held.parts

    @property
    def finish_reasons(self) -> dict[int, str]:
        """Choice index → finish reason, for the choices that have one."""
        reasons = sorted(self._reader.finish_reasons.items())
        return {index: reason for index, reason in reasons if reason is not None}

    @property
    def chunk(self) -> dict[str, Any]:
        """The latest chunk's own members, such as `id` and `model`."""
        return self._reader.chunk

    @property
    def reported_usage(self) -> dict[str, Any] | None:
        """The upstream's usage report of the whole latest try; None if it sent none. Never an estimate."""
        return self.ledger.reported(completed=self._is_whole)

    def started(self) -> Started:
        """Return the attempt's first event."""
        self._seq = 1
        return Started(
            job_id=self.job.job_id,
            attempt=self.id,
            ts=self.opened_ms,
            model=self.job.model,
            upstream=self._upstream,
            cause=self._cause,
            source=Source(*self.job.source),
            metadata=self.job.metadata,
        )

    def terminal(self, now_ms: int) -> UsageEvent:
        """Return the job's terminal event. Raises InvalidTransition before the attempt has ended."""
        if self.status is None:
            raise InvalidTransition(f"the attempt has no terminal event in {self.state.name}")
        usage, source, method = self.ledger.settle(completed=self._is_whole)
        event = UsageEvent(
            job_id=self.job.job_id,
            attempt=self.id,
            seq=self.seq,
            ts=now_ms,
            status=self.status,
            finish_reasons={str(index): reason for index, reason in self.finish_reasons.items()},
            usage=usage,
            usage_source=source,
            observed=self.ledger.observed,
            error=self.error,
            timing=self._timing(now_ms),
            tries=self.tries,
            metadata=self.job.metadata,
        )
        if method is not None:
            event.estimate_method = method
        if self.voided.calls:
            event.voided = Voided(self.voided.calls, self.voided.usage)
        return event

    # Inputs

    def call(self) -> None:
        """Begin a try."""
        self._move(Input.CALL)
        self.error = None
        self.tries += 1
        self._ledger.begin_try()

    def answer(self, status: int = 200, content_type: str = "text/event-stream") -> None:
        """Begin to read a body: the upstream answered with a success status. The body's first bytes decide its form."""
        self._move(Input.ANSWER)
        self._http_status, self._content_type = status, content_type
        self._opening = b""
        self._body = BodyForm(self._max_event_bytes)
        self._candidate, self._misses = b"", 0
        self._reader = ChunkReader(self._ledger)
        self._parser = self._new_parser()

    def receive(self, data: bytes, now_ms: int) -> Iterator[DeltaEvent]:
        """Parse bytes of the event stream; yield the delta events in them one by one. May end the try or the attempt.

        An event counts as published when the caller asks for the next one. A caller that cannot publish an event calls
        `fail` instead: the event is dropped, and the next event takes its `seq`.
        """
        self._end_usual()
        self._candidate = data
        self._ledger.bytes += len(data)
        if self.state is _S.LISTENING:
            self._opening += data[: RAW_TEXT_LIMIT - len(self._opening)]
            if not self._body.is_stream:
                data = self._body.feed(data)
        chunks = map(self._reader.read, self._parser.feed(data))
        read = self._read if self._coalescer is None else self._read_merging
        return read(chunks, now_ms, is_cut=self._parser.overflowed or self._body.overflowed)

    def usual_reads(self) -> UsualReads | None:
        """Return what takes the reads that differ from the last one in one text alone; None if there cannot be such reads.

        It takes reads instead of `receive` until something else happens to the attempt: another read, or a change of
        its state.
        """
        read, self._candidate = self._candidate, b""
        if not read or self.state is not _S.STREAMING or self._coalescer is not None:
            return None
        if self._misses >= _MAX_MISSES or not self._parser.is_between_events or self._reader.has_loose_ends:
            return None
        self._misses += 1
        template = learn_template(read)
        if template is not None:
            self._usual = UsualReads(template, self._ledger, self._seq)
        return self._usual

    def flush(self) -> Iterator[DeltaEvent]:
        """Yield the held text as one event. Call it before `cancel`, `wind_up` and `expire`, and never inside `receive`."""
        if self._coalescer is None or self._coalescer.held is None or self.state is not _S.STREAMING:
            return
        held = self._coalescer.held
        delta = held.delta
        yield self._numbered(delta, held.since_ms)
        if self._was_published(_S.STREAMING):
            # Dropped only now: a caller that is interrupted before it publishes finds the text here again.
            self._coalescer.drop()
            self._published(delta, held.since_ms)
            self._ledger.deltas += held.parts - 1

    def close(self, now_ms: int, *, broken: JobError | None = None) -> Iterator[DeltaEvent]:
        """End the event stream; yield the delta events that were left in the parser.

        `broken` is the error of a connection that broke; None after a regular end of the body. The parser may still
        hold a `[DONE]` without its line end. If every choice has a finish reason the stream is complete, however the
        body ended: some gateways send no `[DONE]`.
        """
        chunks: Iterable[Sequence[StreamItem]] = map(self._reader.read, self._parser.close())
        document = self._body.document
        if document is not None:
            chunks = [self._reader.read_document(document) or ()]
        read = self._read if self._coalescer is None else self._read_merging
        yield from read(chunks, now_ms, is_cut=False)
        yield from self.flush()
        if not self.is_listening:
            return
        if self._reader.is_finished:
            self._finish()
        elif document is not None and (broken is None or is_json(document)):
            self._break(body_error(self._http_status, self._content_type, document))
        else:
            self._break(self._unexplained() or broken or self._truncated())

    def fail(self, error: JobError) -> None:
        """Fail the try for a reason outside of the stream: a status, a broken connection, a timeout.

        Before the first delta the attempt is then in `TRY_FAILED`: call `retry` or `end`. After it the attempt ends.
        """
        self._break(error)

    def retry(self) -> None:
        """Continue after a failed try; `call` follows."""
        self._move(Input.RETRY)
        self.voided.add(self.ledger.report_of_call)

    def end(self) -> None:
        """End the attempt with the error of its failed try."""
        self._move(Input.END, self.error)

    def cancel(self, reason: str) -> None:
        """End the attempt because a control record cancelled the job."""
        self._move(Input.CANCEL, _cancelled(reason))

    def wind_up(self, reason: str) -> None:
        """Publish nothing more, because a control record cancelled the job; `receive` goes on for the usage report."""
        self._move(Input.WIND_UP)
        self._cancelled = _cancelled(reason)

    def expire(self, waited_for: str | None = None) -> None:
        """End the attempt because the job's deadline passed; `waited_for` names what the job waited for."""
        message = "the job's deadline passed" + (f" while it waited for {waited_for}" if waited_for else "")
        self._move(Input.EXPIRE, JobError(ErrorCode.DEADLINE, message))

    def refuse(self, error: JobError) -> None:
        """Record that the broker refused a published delta: readers miss it, so the job ends `interrupted`."""
        self._move(Input.REFUSE, error)

    # Internals

    def _move(self, input_: Input, error: JobError | None = None) -> None:
        try:
            to, status = TRANSITIONS[self.state][input_]
        except KeyError:
            raise InvalidTransition(f"{input_.name} in {self.state.name}") from None
        self._end_usual()
        self.state = to
        self._is_whole = input_ is Input.DONE
        if status is not None:
            self.status = status
            is_wound_up = status is Status.CANCELLED and self._cancelled is not None
            self.error = self._clean(self._cancelled if is_wound_up else error)
        elif to is _S.TRY_FAILED:
            self.error = self._clean(error)

    def _read(
        self, chunks: Iterable[Sequence[StreamItem]], now_ms: int, *, is_cut: bool
    ) -> Iterator[DeltaEvent]:
        """Yield the events of the chunks; one flat generator, because a nested one would double the cost per delta."""
        for chunk in chunks:
            for item in chunk:
                if type(item) is ChunkDelta:
                    state = self.state
                    if state is _S.WINDING_UP:
                        self._move(Input.DELTA)
                        continue
                    yield self._numbered(item, now_ms)
                    if self.state is not state and not self._was_published(state):
                        return
                    self._published(item, now_ms)
                elif type(item) is Done:
                    self._finish()
                    return
                elif type(item) is StreamError:
                    self._break(to_job_error(item, self._http_status))
                    return
        if is_cut and self._reader.is_complete:
            self._move(Input.DONE)
        elif is_cut:
            message = f"the upstream sent an event of more than {self._max_event_bytes} bytes"
            self._break(JobError(ErrorCode.UPSTREAM_PROTOCOL, message, self._http_status))

    def _read_merging(
        self, chunks: Iterable[Sequence[StreamItem]], now_ms: int, *, is_cut: bool
    ) -> Iterator[DeltaEvent]:
        """Yield the events of the chunks, merging text; an event is numbered only when it is yielded."""
        for chunk in chunks:
            for item in chunk:
                if self._holds(item, now_ms):
                    continue
                yield from self.flush()
                # A delta that ended a hold may begin the next one.
                if not self.is_ended and not self._holds(item, now_ms):
                    yield from self._read([[item]], now_ms, is_cut=False)
                if not self.is_listening:
                    return
        if is_cut:
            yield from self.flush()
            if self.is_listening:
                yield from self._read((), now_ms, is_cut=True)

    def _holds(self, item: StreamItem, now_ms: int) -> bool:
        if type(item) is not ChunkDelta or self.state is not _S.STREAMING or self._coalescer is None:
            return False
        return self._coalescer.take(item, now_ms)

    def _was_published(self, before: State) -> bool:
        """Return whether a yielded event was published; a `wind_up` in between does not undo it."""
        return self.state is before or self.state is _S.WINDING_UP

    def _end_usual(self) -> None:
        """Let `usual_reads` take no more reads, and count what it took."""
        usual, self._usual = self._usual, None
        if usual is None:
            return
        usual.is_over = True
        usual.settle()
        if usual.seq != self._seq:
            self._seq, self._misses = usual.seq, 0

    def _numbered(self, delta: ChunkDelta, now_ms: int) -> DeltaEvent:
        return DeltaEvent(
            self.job.job_id,
            self.id,
            self._seq,
            now_ms,
            delta.choice,
            delta.delta,
            delta.finish_reason,
            delta.logprobs,
            delta.chunk,
            delta.extra,
        )

    def _published(self, delta: ChunkDelta, now_ms: int) -> None:
        # A chunk without choices that has unknown members gives an event, but is not a delta.
        if delta.choice is not None:
            if self.first_delta_ms is None:
                self._move(Input.DELTA)
                self.first_delta_ms = now_ms
                self._opening = b""
            self._ledger.count_delta(delta.delta)
        self._seq += 1

    def _break(self, error: JobError) -> None:
        self._move(Input.BREAK, error)

    def _finish(self) -> None:
        """End a stream that ended as the protocol says, unless one of its finish reasons says that it failed."""
        failure = self._reader.failure
        if failure is None:
            self._move(Input.DONE)
        else:
            self._break(to_job_error(failure, self._http_status))

    def _unexplained(self) -> JobError | None:
        failure = self._reader.failure
        return None if failure is None else to_job_error(failure, self._http_status)

    def _truncated(self) -> JobError:
        unfinished = sum(reason is None for reason in self._reader.finish_reasons.values())
        if unfinished:
            message = f"the event stream ended without [DONE] and with {unfinished} unfinished choice(s)"
            return JobError(ErrorCode.TRUNCATED, message, self._http_status, retriable=True)
        is_declared = self._http_status == 200 and "text/event-stream" in self._content_type.lower()
        if not is_declared and not looks_like_event_stream(self._opening):
            return body_error(self._http_status, self._content_type, self._opening)
        # The body may be HTML, or JSON without `data:`, rather than an event stream: its first bytes show which.
        opening = truncate(self._opening.decode("utf-8", "replace"))
        message = "the event stream ended without [DONE] and without any choice"
        return JobError(ErrorCode.TRUNCATED, message, self._http_status, opening or None, retriable=True)

    def _timing(self, now_ms: int) -> Timing:
        first = None if self.first_delta_ms is None else max(0, self.first_delta_ms - self.opened_ms)
        queued = queued_ms(self.job.timestamp, self.opened_ms)
        return Timing(queued=queued, first_delta=first, total=max(0, now_ms - self.opened_ms))

    def _clean(self, error: JobError | None) -> JobError | None:
        if error is None:
            return None
        message = truncate(self._scrub(error.message), UPSTREAM_TEXT_LIMIT)
        upstream = error.upstream and truncate(self._scrub(error.upstream), UPSTREAM_TEXT_LIMIT)
        return msgspec.structs.replace(error, message=message, upstream=upstream)

    def _new_parser(self) -> EventStreamParser:
        return EventStreamParser(
            max_event_bytes=self._max_event_bytes, extra_fields=_EXTRA_FIELDS, bare_json=True
        )


def queued_ms(timestamp: int, now_ms: int) -> int | None:
    """Return how long a record was queued; None where it has no usable timestamp. All times in ms."""
    return max(0, now_ms - timestamp) if timestamp > 0 else None


def _cancelled(reason: str) -> JobError:
    return JobError(ErrorCode.CANCELLED, truncate(reason, UPSTREAM_TEXT_LIMIT) or "cancelled")
