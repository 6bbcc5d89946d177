"""Reads one answer: each piece goes from the transport's read callback through the attempt to the sink, in one call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamworker.ports import Answer, Clock
    from streamworker.stream.attempt import Attempt
    from streamworker.worker.publisher import DeltaPublisher
    from streamworker.worker.usual import UsualDeltas

__all__ = ["AnswerReader"]


class AnswerReader:
    """Reads the body of one answer into an attempt, from the transport's read callback.

    The job's task waits meanwhile. It is woken at the end, and where deltas must not go on yet: it then publishes the
    rest of them, while the socket is not read.
    """

    def __init__(self, answer: Answer, attempt: Attempt, publisher: DeltaPublisher, clock: Clock) -> None:
        self._answer = answer
        self._usual: UsualDeltas | None = None
        self._attempt = attempt
        self._publisher = publisher
        self._now_ms = clock.now_ms
        self._waiter: asyncio.Future[None] | None = None
        self._is_blocked = False  # deltas wait: the task publishes them, and resumes reading
        self._is_over = False  # nothing that arrives is read any more
        self._break: Exception | None = None
        self._crash: Exception | None = None

    async def read(self) -> None:
        """Return when the attempt reads no more, or the body has ended.

        Raises UpstreamError if the connection breaks, after every delta before the break was published.
        """
        self._publisher.on_crash = self._fail
        self._answer.subscribe(self._receive, self._end)
        try:
            while self._crash is None and self._attempt.is_listening:
                if self._is_blocked:
                    await self._publisher.publish_rest()
                    self._is_blocked = False
                    self._answer.resume_reading()
                elif self._is_over:
                    break
                else:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        finally:
            self._is_over = True
        if self._crash is not None:
            raise self._crash
        if self._break is not None and self._attempt.is_listening:
            raise self._break

    def _receive(self, data: bytes) -> None:
        if self._is_over:
            return
        attempt, publisher = self._attempt, self._publisher
        try:
            usual = self._usual or publisher.usual_deltas()
            if usual is not None and usual.publish(data):
                self._usual = usual
                return
            self._usual = None
            is_published = publisher.publish_read(attempt.receive(data, self._now_ms()))
        except Exception as error:  # noqa: BLE001 - `read` raises it; the loop would only log it
            self._fail(error)
            return
        if not is_published:
            self._is_blocked = True
            self._answer.pause_reading()
            self._wake()
        elif not attempt.is_listening:
            self._is_over = True
            self._wake()

    def _end(self, error: Exception | None) -> None:
        if not self._is_over:
            self._is_over = True
            self._break = error
            self._wake()

    def _fail(self, error: Exception) -> None:
        self._is_over = True
        self._crash = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
