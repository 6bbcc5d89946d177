"""One job as its submitter sees it: events, result, cancellation."""

from __future__ import annotations

import asyncio
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from streamworker.client.events import Ended, event_of
from streamworker.client.result import ResultAssembler

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.client.client import Client
    from streamworker.client.events import Event
    from streamworker.client.result import Result
    from streamworker.client.results import AwaitedResult
    from streamworker.client.subscriptions import Subscription, TopicSubscriptions

__all__ = ["EventStream", "Job"]

ITERATOR_BYTES = 8 << 20
"""Size of the queued events at which an iterator is dropped with Lagged."""

GONE = "the client left before the job ended"


class Job:
    """A job that this client submitted, or that it knows by its id."""

    def __init__(self, client: Client, job_id: str, topic: str, since_ms: int) -> None:
        self.id = job_id
        self._client = client
        self._topic = topic
        self._since_ms = since_ms
        self._offset: int | None = None  # where the job's events begin, if that is known
        self._subscription: Subscription | None = None  # until an iterator takes it
        self._unsubscribe: Callable[[], None] = _nothing
        self._awaited: AwaitedResult | None = None
        self._has_ended = False

    def __repr__(self) -> str:
        return f"Job(id={self.id!r})"

    def events(self) -> EventStream:
        """Return an iterator over the events of the valid attempt, from its beginning; `Ended` is the last one.

        Each call returns an iterator of its own. The iterator raises Lagged if its events are not taken in time, and
        KafkaError if they cannot be read.
        """
        return EventStream(self)

    async def result(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109 - as concurrent.futures names it
        """Wait until the job has ended, whatever its status, and return its result.

        Raises:
            TimeoutError: the job has not ended within `timeout` seconds.
            KafkaError: the events or results cannot be read.
        """
        async with asyncio.timeout(timeout):
            result = await self._client._result(self)  # noqa: SLF001 - a part of the client
        self._has_ended = True
        return result

    async def cancel(self, reason: str | None = None) -> None:
        """Cancel the job, wherever it is; it ends with what it has so far.

        Returns when the broker has the cancellation. A job that has ended is left alone. Raises KafkaError.
        """
        await self._client._cancel(self.id, reason)  # noqa: SLF001

    def cancelled_on_exit(self) -> CancelledOnExit:
        """Return an async context manager that cancels the job if the block is left before the job's end was seen.

        Leaving the block does not wait for the broker: it works in a task that is cancelled, as web frameworks do with
        the handlers of clients that disconnect.
        """
        return CancelledOnExit(self)

    # For the client and the iterators

    def attach(self, subscriptions: TopicSubscriptions, subscription: Subscription, offset: int) -> None:
        """Take a subscription that began before the job was submitted; it ends when the job object is deleted."""
        self._subscription = subscription
        self._offset = offset
        self._unsubscribe = lambda: subscriptions.unsubscribe(subscription)
        _when_deleted(self, self._unsubscribe)

    def expect(self, awaited: AwaitedResult, forget: Callable[[AwaitedResult], None]) -> None:
        """Take the place of the job's result."""
        self._awaited = awaited
        _when_deleted(self, lambda: forget(awaited))

    async def subscribe(self, stream: EventStream) -> Subscription:
        """Return a subscription from the job's beginning, which ends when the iterator is deleted."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not subscription.is_dropped:
            subscription.limit_bytes = ITERATOR_BYTES
            stream.unsubscribe = self._unsubscribe
            return subscription
        subscriptions = await self._client._subscriptions(self._topic)  # noqa: SLF001
        late = await subscriptions.subscribe_late(
            self.id, ITERATOR_BYTES, offset=self._offset, since_ms=self._since_ms
        )
        stream.unsubscribe = lambda: subscriptions.unsubscribe(late)
        _when_deleted(stream, stream.unsubscribe)
        return late

    @property
    def awaited(self) -> AwaitedResult | None:
        """The place of the job's result, if it is known."""
        return self._awaited

    @property
    def since_ms(self) -> int:
        """From when on the job's records are looked for, in ms since the epoch."""
        return self._since_ms

    @property
    def has_ended(self) -> bool:
        """Whether an iterator or `result` saw the job's end."""
        return self._has_ended

    def note_end(self) -> None:
        """Note that the job's end was seen."""
        self._has_ended = True

    def cancel_in_background(self) -> None:
        """Cancel the job in a task of the client."""
        self._client._spawn(self.cancel(GONE))  # noqa: SLF001


class EventStream:
    """An iterator over the events of one job."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._subscription: Subscription | None = None
        self._is_over = False
        self.unsubscribe: Callable[[], None] = _nothing

    async def open(self) -> Self:
        """Subscribe now instead of at the first event. Raises KafkaError."""
        if self._subscription is None:
            self._subscription = await self._job.subscribe(self)
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        if self._subscription is None:
            await self.open()
        assert self._subscription is not None
        delivery = await self._subscription.next()
        if delivery is None:
            raise StopAsyncIteration
        event = event_of(delivery)
        if isinstance(event, Ended):
            self._job.note_end()
            await self.aclose()
        return event

    def ready(self) -> list[Event]:
        """Return the events that can be taken without waiting."""
        events: list[Event] = []
        while self._subscription is not None and (delivery := self._subscription.take()) is not None:
            events.append(event_of(delivery))
            if isinstance(events[-1], Ended):
                self._job.note_end()
        return events

    async def aclose(self) -> None:
        """End the iteration. Repeated calls do nothing."""
        self._is_over = True
        self.unsubscribe()


class CancelledOnExit:
    """See `Job.cancelled_on_exit`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    async def __aenter__(self) -> Job:
        return self._job

    async def __aexit__(self, *_: object) -> None:
        if not self._job.has_ended:
            self._job.cancel_in_background()


async def assembled(job: Job) -> Result:
    """Read a job's events to its end and return the result that they make. Raises KafkaError."""
    assembler = ResultAssembler()
    async for event in job.events():
        if (result := assembler.add(event)) is not None:
            return result
    raise AssertionError("an iterator ends with a terminal event")


def _nothing() -> None:
    pass


def _when_deleted(owner: object, action: Callable[[], None]) -> None:
    """Call `action` in the loop after `owner` was deleted, in whichever thread that happens."""
    loop = asyncio.get_running_loop()

    def schedule() -> None:
        with suppress(RuntimeError):  # the loop is closed, and everything with it
            loop.call_soon_threadsafe(action)

    weakref.finalize(owner, schedule).atexit = False
