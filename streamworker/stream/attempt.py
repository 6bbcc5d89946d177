"""The attempt: one `started` and what follows it, up to the terminal event.

Two pieces. The **life** is a table, state → input → next state; there is no other place where a state changes, and a
missing row is a thing that cannot happen. A try after the first published delta, for example, is impossible because
`STREAMING` has no row for `RETRY`. The **attempt** feeds the upstream's bytes through parser and reader, numbers the
events, keeps the account, and asks the table what each thing that happens means.
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
)
from streamworker.redaction import Redactor
from streamworker.stream.chunks import ChunkReader
from streamworker.stream.coalesce import Coalescer
from streamworker.stream.provider_errors import to_job_error
from streamworker.stream.sse import EventStreamParser
from streamworker.stream.usage import Ledger
from streamworker.text import RAW_TEXT_LIMIT, UPSTREAM_TEXT_LIMIT, truncate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from streamworker.model import StreamItem
    from streamworker.stream.usage import Tokenizer

__all__ = ["TRANSITIONS", "Attempt", "Input", "InvalidTransition", "State", "Transition"]


class State(Enum):
    """Where an attempt stands."""

    WAITING = "no call is open"
    CALLING = "called, no answer yet"
    LISTENING = "the event stream is open, no delta yet"
    STREAMING = "a delta was published"
    WINDING_UP = "cancelled; read on, without publishing, for the usage report"
    ENDED = "the terminal event is owed or out"


class Input(Enum):
    """What can happen to it."""

    CALL = "a try begins"
    ANSWER = "the upstream answered with an event stream"
    DELTA = "a choice delta came"
    DONE = "the stream ended as the protocol says"
    BREAK = "the try failed, for any reason"
    RETRY = "the try failed and another one follows"
    CANCEL = "a control record asked for the end"
    WIND_UP = "a control record asked for the end, and the upstream may still report its usage"
    EXPIRE = "the job's deadline passed"
    REFUSE = "the broker refused a delta that was published"


class Transition(NamedTuple):
    """Where a happening leads, and the job's status if it ends there."""

    to: State
    status: Status | None = None


_S, _H, _T = State, Input, Transition
_CANCELLED, _EXPIRED = _T(_S.ENDED, Status.CANCELLED), _T(_S.ENDED, Status.EXPIRED)

TRANSITIONS: Mapping[State, Mapping[Input, Transition]] = {
    _S.WAITING: {
        _H.CALL: _T(_S.CALLING),
        _H.BREAK: _T(_S.ENDED, Status.FAILED),
        _H.CANCEL: _CANCELLED,
        _H.EXPIRE: _EXPIRED,
    },
    _S.CALLING: {
        _H.ANSWER: _T(_S.LISTENING),
        _H.BREAK: _T(_S.ENDED, Status.FAILED),
        _H.RETRY: _T(_S.WAITING),
        _H.CANCEL: _CANCELLED,
        _H.EXPIRE: _EXPIRED,
    },
    _S.LISTENING: {
        _H.DELTA: _T(_S.STREAMING),
        _H.DONE: _T(_S.ENDED, Status.COMPLETED),
        _H.BREAK: _T(_S.ENDED, Status.FAILED),
        _H.RETRY: _T(_S.WAITING),
        _H.CANCEL: _CANCELLED,
        _H.EXPIRE: _EXPIRED,
    },
    _S.STREAMING: {
        _H.DELTA: _T(_S.STREAMING),
        _H.DONE: _T(_S.ENDED, Status.COMPLETED),
        _H.BREAK: _T(_S.ENDED, Status.INTERRUPTED),
        _H.WIND_UP: _T(_S.WINDING_UP),
        _H.CANCEL: _CANCELLED,
        _H.EXPIRE: _EXPIRED,
    },
    # However the upstream ends now, the job was cancelled.
    _S.WINDING_UP: {
        _H.DELTA: _T(_S.WINDING_UP),
        _H.DONE: _CANCELLED,
        _H.BREAK: _CANCELLED,
        _H.CANCEL: _CANCELLED,
        _H.EXPIRE: _CANCELLED,
    },
    # The broker's word on a delta may come after the stream's end, and changes what the end was.
    _S.ENDED: {_H.REFUSE: _T(_S.ENDED, Status.INTERRUPTED)},
}


class InvalidTransition(Exception):
    """Something happened that the table has no row for: a bug in the caller, never the upstream's doing."""


class Attempt:
    """One attempt at a job. Times are ms since the epoch, given by the caller.

    After `is_ended` nothing but `terminal` may be asked of it.
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
        may_retry: Callable[[JobError], bool] = lambda _: False,
        tokenizer: Tokenizer | None = None,
        coalesces: bool = False,
    ) -> None:
        """Open an attempt after so many `tries` of earlier ones.

        `may_retry` is asked when a try fails before its first delta; if it says yes, `call` follows. `tokenizer` counts
        what an upstream generated and did not report. With `coalesces`, text deltas after the first are held, to be
        merged with those that follow, until something else comes, the stream ends, or `flush` is called.
        """
        self.job = job
        self.id = attempt_id
        self.state = State.WAITING
        self.ledger = Ledger(tokenizer)
        self.tries = tries
        self.error: JobError | None = None
        self.status: Status | None = None
        self.first_delta_ms: int | None = None
        self._upstream = upstream
        self._cause: Cause = cause
        self.opened_ms = now_ms
        self._seq = 0
        self._max_event_bytes = max_event_bytes
        self._scrub = scrub or Redactor()
        self._may_retry = may_retry
        self._cancelled: JobError | None = None
        self._is_whole = False  # the stream ended as the protocol says
        self._coalescer = Coalescer() if coalesces else None
        self._opening = b""  # the stream's first bytes, read before the first delta
        self._reader = ChunkReader(self.ledger)
        self._parser = self._new_parser()

    # What comes out

    @property
    def is_ended(self) -> bool:
        """Whether the terminal event is all that is left."""
        return self.state is State.ENDED

    @property
    def is_listening(self) -> bool:
        """Whether bytes of an event stream may come."""
        # By identity: an Enum's hash is written in Python, and this is asked at each read.
        state = self.state
        return state is _S.STREAMING or state is _S.LISTENING or state is _S.WINDING_UP

    @property
    def held_deltas(self) -> int:
        """How many choice deltas came and are held."""
        held = None if self._coalescer is None else self._coalescer.held
        return 0 if held is None else held.parts

    @property
    def finish_reasons(self) -> dict[int, str]:
        """Choice index → finish reason, of the choices that have one."""
        reasons = sorted(self._reader.finish_reasons.items())
        return {index: reason for index, reason in reasons if reason is not None}

    @property
    def chunk(self) -> dict[str, Any]:
        """What the upstream says of its answer: the latest chunk's own members."""
        return self._reader.chunk

    @property
    def reported_usage(self) -> dict[str, Any] | None:
        """The upstream's own usage report, if it is of the whole latest try. Never an estimate."""
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
        """Return the job's last event."""
        assert self.status is not None, "the terminal event of an attempt that has not ended"
        usage, source, method = self.ledger.settle(completed=self._is_whole)
        event = UsageEvent(
            job_id=self.job.job_id,
            attempt=self.id,
            seq=self._seq,
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
        return event

    # What happens

    def call(self) -> None:
        """A try begins."""
        self._move(Input.CALL)
        self.tries += 1
        self.ledger.begin_try()

    def answer(self) -> None:
        """The upstream answered with an event stream; bytes follow."""
        self._move(Input.ANSWER)
        self._opening = b""
        self._reader = ChunkReader(self.ledger)
        self._parser = self._new_parser()

    def receive(self, data: bytes, now_ms: int) -> Iterator[DeltaEvent]:
        """Take bytes of the event stream; hand out the delta events they give, one by one. May end the attempt.

        An event counts as published when the next one is asked for. Who cannot publish one calls `fail` instead, and
        it is as if the event had never been: its `seq` is the terminal event's.
        """
        self.ledger.bytes += len(data)
        if self.state is _S.LISTENING:
            self._opening += data[: RAW_TEXT_LIMIT - len(self._opening)]
        chunks = map(self._reader.read, self._parser.feed(data))
        read = self._read if self._coalescer is None else self._read_merging
        return read(chunks, now_ms, is_cut=self._parser.overflowed)

    def flush(self) -> Iterator[DeltaEvent]:
        """Hand out what is held, as `receive` does, and not while it does. Ask before `cancel`, `wind_up`, `expire`."""
        if self._coalescer is None or self._coalescer.held is None or self.state is not _S.STREAMING:
            return
        held = self._coalescer.held
        news = held.news
        yield self._numbered(news, held.since_ms)
        if self._was_published(_S.STREAMING):
            # Only now: who is interrupted before it is published finds it here again, and no text is left out.
            self._coalescer.drop()
            self._published(news, held.since_ms)
            self.ledger.deltas += held.parts - 1

    def close(self, now_ms: int, *, broken: JobError | None = None) -> Iterator[DeltaEvent]:
        """Take the end of the response body; `broken` says how the connection broke, if it did.

        The rest may still hold the `[DONE]` that had no line end. Where every choice has its finish reason nothing is
        missing, however the body ended: some gateways send no `[DONE]`.
        """
        chunks = map(self._reader.read, self._parser.close())
        read = self._read if self._coalescer is None else self._read_merging
        yield from read(chunks, now_ms, is_cut=False)
        yield from self.flush()
        if not self.is_listening:
            return
        if self._reader.is_finished:
            self._move(Input.DONE)
        else:
            self._break(broken or self._truncated())

    def fail(self, error: JobError) -> None:
        """The try failed outside of what the stream said: a status, a broken connection, a timeout."""
        self._break(error)

    def retry(self) -> None:
        """The try failed before its first delta, and another one follows."""
        self._move(Input.RETRY)

    def cancel(self, reason: str) -> None:
        """A control record asked for the end."""
        self._move(Input.CANCEL, _cancelled(reason))

    def wind_up(self, reason: str) -> None:
        """A control record asked for the end: publish nothing more, but go on to `receive` for the usage report."""
        self._move(Input.WIND_UP)
        self._cancelled = _cancelled(reason)

    def expire(self) -> None:
        """The job's deadline passed."""
        self._move(Input.EXPIRE, JobError(ErrorCode.DEADLINE, "the job's deadline passed"))

    def refuse(self, error: JobError) -> None:
        """The broker refused a delta; readers miss it, and the terminal event has to say so."""
        self._move(Input.REFUSE, error)

    # How

    def _move(self, input_: Input, error: JobError | None = None) -> None:
        try:
            to, status = TRANSITIONS[self.state][input_]
        except KeyError:
            raise InvalidTransition(f"{input_.name} in {self.state.name}") from None
        self.state = to
        self._is_whole = input_ is Input.DONE
        if status is not None:
            self.status = status
            is_wound_up = status is Status.CANCELLED and self._cancelled is not None
            self.error = self._clean(self._cancelled if is_wound_up else error)

    def _read(
        self, chunks: Iterable[Sequence[StreamItem]], now_ms: int, *, is_cut: bool
    ) -> Iterator[DeltaEvent]:
        """Go through it all in one generator: another one inside it would cost as much as all else here."""
        for chunk in chunks:
            for news in chunk:
                if type(news) is ChunkDelta:
                    state = self.state
                    if state is _S.WINDING_UP:
                        self._move(Input.DELTA)
                        continue
                    yield self._numbered(news, now_ms)
                    if self.state is not state and not self._was_published(state):
                        return
                    self._published(news, now_ms)
                elif type(news) is Done:
                    self._move(Input.DONE)
                    return
                elif type(news) is StreamError:
                    self._break(to_job_error(news))
                    return
        if is_cut:
            self._break(_protocol(f"the upstream sent an event of more than {self._max_event_bytes} bytes"))

    def _read_merging(
        self, chunks: Iterable[Sequence[StreamItem]], now_ms: int, *, is_cut: bool
    ) -> Iterator[DeltaEvent]:
        """Read one by one what cannot be held, each after what is held; nothing is numbered before it leaves."""
        for chunk in chunks:
            for news in chunk:
                if self._holds(news, now_ms):
                    continue
                yield from self.flush()
                # What ended a hold may begin the next one.
                if not self.is_ended and not self._holds(news, now_ms):
                    yield from self._read([[news]], now_ms, is_cut=False)
                if not self.is_listening:
                    return
        if is_cut:
            yield from self.flush()
            if self.is_listening:
                yield from self._read((), now_ms, is_cut=True)

    def _holds(self, news: StreamItem, now_ms: int) -> bool:
        if type(news) is not ChunkDelta or self.state is not _S.STREAMING or self._coalescer is None:
            return False
        return self._coalescer.take(news, now_ms)

    def _was_published(self, before: State) -> bool:
        """Tell what became of an event that was handed out; a `wind_up` meanwhile does not take it back."""
        return self.state is before or self.state is _S.WINDING_UP

    def _numbered(self, news: ChunkDelta, now_ms: int) -> DeltaEvent:
        return DeltaEvent(
            self.job.job_id,
            self.id,
            self._seq,
            now_ms,
            news.choice,
            news.delta,
            news.finish_reason,
            news.logprobs,
            news.chunk,
            news.extra,
        )

    def _published(self, news: ChunkDelta, now_ms: int) -> None:
        # Unknown members of a chunk without choices are told, but they are no delta.
        if news.choice is not None:
            if self.first_delta_ms is None:
                self._move(Input.DELTA)
                self.first_delta_ms = now_ms
                self._opening = b""
            self.ledger.count_delta(news.delta)
        self._seq += 1

    def _break(self, error: JobError) -> None:
        if Input.RETRY in TRANSITIONS[self.state] and self._may_retry(error):
            self.retry()
        else:
            self._move(Input.BREAK, error)

    def _truncated(self) -> JobError:
        unfinished = sum(reason is None for reason in self._reader.finish_reasons.values())
        if unfinished:
            message = f"the event stream ended without [DONE] and with {unfinished} unfinished choice(s)"
            return JobError(ErrorCode.TRUNCATED, message, 200, retriable=True)
        # It may be HTML, or JSON without `data:`, and no event stream at all: its first bytes say so (wire facts §7).
        opening = truncate(self._opening.decode("utf-8", "replace"))
        message = "the event stream ended without [DONE] and without any choice"
        return JobError(ErrorCode.TRUNCATED, message, 200, opening or None, retriable=True)

    def _timing(self, now_ms: int) -> Timing:
        first = None if self.first_delta_ms is None else max(0, self.first_delta_ms - self.opened_ms)
        queued = max(0, self.opened_ms - self.job.timestamp)
        return Timing(queued=queued, first_delta=first, total=max(0, now_ms - self.opened_ms))

    def _clean(self, error: JobError | None) -> JobError | None:
        if error is None:
            return None
        message = truncate(self._scrub(error.message), UPSTREAM_TEXT_LIMIT)
        upstream = error.upstream and truncate(self._scrub(error.upstream), UPSTREAM_TEXT_LIMIT)
        return msgspec.structs.replace(error, message=message, upstream=upstream)

    def _new_parser(self) -> EventStreamParser:
        return EventStreamParser(max_event_bytes=self._max_event_bytes, extra_fields=frozenset({b"error"}))


def _cancelled(reason: str) -> JobError:
    return JobError(ErrorCode.CANCELLED, truncate(reason, UPSTREAM_TEXT_LIMIT) or "cancelled")


def _protocol(message: str) -> JobError:
    return JobError(ErrorCode.UPSTREAM_PROTOCOL, message, 200, retriable=False)
