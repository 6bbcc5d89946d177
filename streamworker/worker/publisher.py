"""Publishes the delta events of one attempt, and waits where they must not go on yet.

Deltas wait until the attempt's `started` event is written and while the broker does not keep up; the upstream's socket
is not read meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.errors import RecordTooLarge
from streamworker.model import ErrorCode, JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.model import DeltaEvent, TopicPartition
    from streamworker.stream.attempt import Attempt
    from streamworker.worker.runner import Tools
    from streamworker.worker.timeouts import StreamTimeouts

__all__ = ["DELTAS_PER_TURN", "DeltaPublisher", "too_large"]

DELTAS_PER_TURN = 64
"""Deltas of one stream that are published before other tasks run: about a millisecond of work. One read may hold
thousands, and the group's heartbeats run on the same loop."""


class DeltaPublisher:
    """Publishes one attempt's delta events in order. `started` is done when the attempt's `started` event is written."""

    def __init__(
        self,
        tools: Tools,
        attempt: Attempt,
        timeouts: StreamTimeouts,
        *,
        to: TopicPartition,
        upstream: str,
        started: asyncio.Future[None],
        on_first_delta: Callable[[], None],
    ) -> None:
        self._tools = tools
        self._attempt = attempt
        self._timeouts = timeouts
        self._to = to
        self._key = attempt.job.job_id.encode()
        self._upstream = upstream
        self._started = started
        self._on_first_delta = on_first_delta
        self._receipt = tools.sink.receipt()
        self._flush_timer: asyncio.TimerHandle | None = None
        """Publishes the held text in time; None while other deltas are being published."""
        self.publish_read = self._publish_merging if tools.coalesce_s else self.publish
        """Publish the events of one socket read."""

    async def publish(self, events: Iterator[DeltaEvent]) -> None:
        """Publish events as they are parsed. One that is too large for a record fails the attempt instead."""
        tools, attempt = self._tools, self._attempt
        sink, limit, trace = tools.sink, tools.max_record_bytes, attempt.job.trace
        deltas_before = attempt.ledger.deltas
        count = total = 0
        for event in events:
            record = tools.writer.write(event, self._to, self._key, trace)
            if (size := record.size) > limit:
                attempt.fail(too_large("a delta", size, limit))
                continue  # the try has failed, so `events` has ended
            if not (sink.has_room and self._started.done()):
                await self._wait_for_room()
            elif (
                count and count % DELTAS_PER_TURN == 0
            ):  # before the event counts as published: an interrupt may come
                await self._let_other_tasks_run()
            sink.publish(record, self._receipt)
            count += 1
            total += size
        gap_s = None
        if attempt.ledger.deltas != deltas_before:
            gap_s = self._timeouts.delta_came()
            if deltas_before == 0:
                self._report_first_delta()
        if count:
            tools.observer.deltas_published(self._upstream, count, total, gap_s)

    def flush(self) -> None:
        """Publish the held text, also where the sink has no room: it is small, and was read when there was room."""
        self.stop_timer()
        tools = self._tools
        for event in self._attempt.flush():
            record = tools.writer.write(event, self._to, self._key, self._attempt.job.trace)
            tools.sink.publish(record, self._receipt)
            tools.observer.deltas_published(self._upstream, 1, record.size, None)

    def flush_before_wind_up(self) -> None:
        """Publish the held text, unless other deltas are being published: the held text is before them then."""
        if self._flush_timer is not None:
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

    async def _publish_merging(self, events: Iterator[DeltaEvent]) -> None:
        """Publish events, and set the timer of what is held afterwards.

        The timer is stopped meanwhile: a flush between two events would give both the same number.
        """
        attempt, loop = self._attempt, asyncio.get_running_loop()
        published, held = attempt.ledger.deltas, attempt.held_deltas
        due = loop.time() + self._tools.coalesce_s if self._flush_timer is None else self._flush_timer.when()
        self.stop_timer()
        await self.publish(events)
        if attempt.ledger.deltas == published and attempt.held_deltas > held:
            # Held text shows that the upstream generates, as published text does.
            self._tools.observer.deltas_published(self._upstream, 0, 0, self._timeouts.delta_came())
        if attempt.held_deltas:
            self._flush_timer = loop.call_at(due, self.flush)

    def _report_first_delta(self) -> None:
        self._on_first_delta()
        attempt = self._attempt
        if attempt.first_delta_ms is not None:
            seconds = (attempt.first_delta_ms - attempt.opened_ms) / 1000
            self._tools.observer.first_delta(self._upstream, seconds)

    async def _let_other_tasks_run(self) -> None:
        """Give up one turn of the loop; the time that other tasks take does not count as the upstream's silence."""
        left = self._timeouts.pause()
        await asyncio.sleep(0)
        self._timeouts.resume(left)

    async def _wait_for_room(self) -> None:
        """Wait until `started` is written and the sink has room."""
        left = self._timeouts.pause()
        await asyncio.shield(self._started)
        await self._tools.sink.room()
        self._timeouts.resume(left)


def too_large(what: str, size: int, limit: int) -> JobError:
    """Return the error of a record that is over the limit; sizes in bytes."""
    return JobError(ErrorCode.TOO_LARGE, f"{what} makes a record of {size} bytes, the limit is {limit}", 200)
