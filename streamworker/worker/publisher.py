"""Publishes the delta events of one attempt, and stops where they must not go on yet.

Deltas wait until the attempt's `started` event is written and while the broker does not keep up; the upstream's socket
is not read meanwhile.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING

from streamworker.errors import RecordTooLarge
from streamworker.model import ErrorCode, JobError
from streamworker.worker.usual import DELTAS_PER_TURN, UsualDeltas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.model import DeltaEvent, ProducerRecord, TopicPartition
    from streamworker.stream.attempt import Attempt
    from streamworker.stream.completion import CompletionAssembler
    from streamworker.worker.runner import Tools
    from streamworker.worker.timeouts import StreamTimeouts

__all__ = ["DeltaPublisher", "too_large"]

_MAX_EVENT_OVERHEAD = 4096
"""More than the members of a delta event besides those of the chunk, and the record's key and headers."""


class DeltaPublisher:
    """Publishes one attempt's delta events in order. `started` is done when the attempt's `started` event is written.

    Published events are added to `completion`, if there is one.
    """

    def __init__(
        self,
        tools: Tools,
        attempt: Attempt,
        timeouts: StreamTimeouts,
        *,
        to: TopicPartition,
        upstream: str,
        started: asyncio.Future[int | None],
        on_first_delta: Callable[[], None],
        completion: CompletionAssembler | None = None,
    ) -> None:
        self._tools = tools
        self._attempt = attempt
        self._timeouts = timeouts
        self._to = to
        self._key = attempt.job.job_id.encode()
        self._upstream = upstream
        self._started = started
        self._on_first_delta = on_first_delta
        self._completion = completion
        self._receipt = tools.sink.receipt()
        self._flush_timer: asyncio.TimerHandle | None = None
        """Publishes the held text in time; None while other deltas are being published, and for merged deltas."""
        self._events: Iterator[DeltaEvent] = iter(())
        self._waiting: ProducerRecord | None = None
        """The record that must not go on yet; `_events` are those after it."""
        self._before_read: tuple[int, int, float] | None = None
        """Deltas published and held before a read, and when text that it holds is due; None if nothing may be held."""
        self._left_s = 0.0
        self._hold_s = inf if attempt.job.deltas == "merged" else tools.coalesce_s
        """How long text may be held to be merged; without a timer if there is no limit."""
        self._usual_headers = None if self._hold_s else tools.writer.delta_headers
        """The headers of all deltas; None if these have headers of their own, or may be held."""
        self.on_crash: Callable[[Exception], None] = _raise
        """Is called with an exception of the timer that publishes held text."""

    def usual_deltas(self) -> UsualDeltas | None:
        """Return what publishes the reads that differ from the last one in their text alone; None if there are none."""
        headers = self._usual_headers
        if headers is None or not self._started.done():
            return None
        attempt, tools = self._attempt, self._tools
        reads = attempt.usual_reads()
        if reads is None:
            return None
        template = reads.template
        return UsualDeltas(
            tools,
            reads,
            self._timeouts,
            tools.sink.series(self._to, self._key, headers, self._receipt),
            pattern=tools.writer.text_pattern(
                attempt.job.job_id, attempt.id, template.choice, template.delta
            ),
            max_bytes=tools.max_record_bytes - _MAX_EVENT_OVERHEAD,
            upstream=self._upstream,
            completion=self._completion,
        )

    def publish_read(self, events: Iterator[DeltaEvent]) -> bool:
        """Publish the events of one socket read, as far as they may go on now; return whether these are all.

        If not, the caller stops reading and awaits `publish_rest`. The timer of held text is stopped meanwhile: a flush
        between two events would give both the same number.
        """
        self._before_read = None
        if self._hold_s:
            attempt, loop = self._attempt, asyncio.get_running_loop()
            timer = self._flush_timer
            due = loop.time() + self._hold_s if timer is None else timer.when()
            self._before_read = (attempt.ledger.deltas, attempt.held_deltas, due)
            self.stop_timer()
        self._events = self._gathered(events)
        return self._publish()

    async def publish_rest(self) -> None:
        """Publish the events that could not go on: as soon as they may, and a bounded number per turn of the loop."""
        sink = self._tools.sink
        while True:
            # The task has just been woken, so other tasks have run since the last event.
            if not (sink.has_room and self._started.done()):
                await asyncio.shield(self._started)
                await sink.room()
            self._timeouts.resume(self._left_s)
            if self._publish():
                return
            await asyncio.sleep(0)

    async def publish(self, events: Iterator[DeltaEvent]) -> None:
        """Publish events, waiting where they must not go on yet."""
        self._before_read = None
        self._events = self._gathered(events)
        if not self._publish():
            await self.publish_rest()

    def _publish(self) -> bool:
        """Publish the waiting record, then events as they are parsed. One that is too large fails the attempt instead."""
        tools, attempt, ledger = self._tools, self._attempt, self._attempt.ledger
        sink, limit, trace = tools.sink, tools.max_record_bytes, attempt.job.trace
        deltas_before = ledger.deltas
        count = total = 0
        if self._waiting is not None:
            record, self._waiting = self._waiting, None
            sink.publish(record, self._receipt)
            count, total = 1, record.size
        for event in self._events:
            record = tools.writer.write(event, self._to, self._key, trace)
            if (size := record.size) > limit:
                attempt.fail(too_large("a delta", size, limit))
                continue  # the try has failed, so the events have ended
            if count == DELTAS_PER_TURN or not (sink.has_room and self._started.done()):
                self._waiting = record  # it counts as published when the next event is asked for
                break
            sink.publish(record, self._receipt)
            count += 1
            total += size
        gap_s = None
        if ledger.deltas != deltas_before:
            gap_s = self._timeouts.delta_came()
            if deltas_before == 0:
                self._report_first_delta()
        if count:
            tools.observer.deltas_published(self._upstream, count, total, gap_s)
        if self._waiting is not None:
            self._left_s = self._timeouts.pause()
            return False
        if self._before_read is not None:
            self._set_timer(*self._before_read)
        return True

    def flush(self) -> None:
        """Publish the held text, also where the sink has no room: it is small, and was read when there was room."""
        self.stop_timer()
        tools = self._tools
        for event in self._gathered(self._attempt.flush()):
            record = tools.writer.write(event, self._to, self._key, self._attempt.job.trace)
            tools.sink.publish(record, self._receipt)
            tools.observer.deltas_published(self._upstream, 1, record.size, None)

    def flush_before_wind_up(self) -> None:
        """Publish the held text, unless other deltas are being published: the held text is before them then."""
        if self._waiting is None:
            self.flush()

    def stop_timer(self) -> None:
        """Do not publish the held text by itself any more."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    async def settle(self) -> None:
        """Wait until every published delta is acknowledged; an attempt whose delta was refused ends `interrupted`."""
        try:
            await self._receipt.settled()
        except RecordTooLarge as refusal:
            self._attempt.refuse(JobError(ErrorCode.TOO_LARGE, str(refusal)))

    def _gathered(self, events: Iterator[DeltaEvent]) -> Iterator[DeltaEvent]:
        """Return the events; with a completion, each one is added to it once it counts as published."""
        return events if self._completion is None else _gather(events, self._attempt, self._completion)

    def _set_timer(self, published: int, held: int, due: float) -> None:
        """Set the timer of the text that is held after a read."""
        attempt = self._attempt
        if attempt.ledger.deltas == published and attempt.held_deltas > held:
            # Held text shows that the upstream generates, as published text does.
            self._tools.observer.deltas_published(self._upstream, 0, 0, self._timeouts.delta_came())
        if attempt.held_deltas and due < inf:
            self._flush_timer = asyncio.get_running_loop().call_at(due, self._flush_in_time)

    def _flush_in_time(self) -> None:
        try:
            self.flush()
        except Exception as error:  # noqa: BLE001 - the loop would only log it
            self.on_crash(error)

    def _report_first_delta(self) -> None:
        self._on_first_delta()
        attempt = self._attempt
        if attempt.first_delta_ms is not None:
            seconds = (attempt.first_delta_ms - attempt.opened_ms) / 1000
            self._tools.observer.first_delta(self._upstream, seconds)


def _gather(
    events: Iterator[DeltaEvent], attempt: Attempt, completion: CompletionAssembler
) -> Iterator[DeltaEvent]:
    """Yield the events. An event counts as published when the next one is asked for, unless the attempt dropped it."""
    event = next(events, None)
    while event is not None:
        yield event
        following = next(events, None)
        if attempt.seq > event.seq:
            completion.add(
                event.choice, event.delta, event.finish_reason, event.logprobs, event.chunk, event.extra
            )
        event = following


def _raise(error: Exception) -> None:
    raise error


def too_large(what: str, size: int, limit: int) -> JobError:
    """Return the error of a record that is over the limit; sizes in bytes."""
    return JobError(ErrorCode.TOO_LARGE, f"{what} makes a record of {size} bytes, the limit is {limit}", 200)
