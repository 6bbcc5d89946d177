"""The blocking client: the asynchronous one in a thread of its own, with methods of the same names."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from streamworker.client.client import Client
from streamworker.client.mapping import arguments_of
from streamworker.kafka.connection import silence_abandoned_futures

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Mapping
    from concurrent.futures import Future
    from datetime import datetime, timedelta

    from streamworker.client.events import Event
    from streamworker.client.job import EventStream, Job
    from streamworker.client.result import Result

__all__ = ["BlockingClient", "BlockingJob", "connect"]

T = TypeVar("T")


class _Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        silence_abandoned_futures(self._loop)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="streamworker client", daemon=True
        )
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine. An interrupt in the waiting thread cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingJob:
    """A job, as `Job` is; its methods block."""

    def __init__(self, loop: _Loop, job: Job) -> None:
        self._loop = loop
        self._job = job
        self.id = job.id

    def __repr__(self) -> str:
        return f"BlockingJob(id={self.id!r})"

    def events(self) -> Iterator[Event]:
        """Yield the events of the valid attempt, as `Job.events` does."""
        stream = self._job.events()
        try:
            while events := self._loop.run(_some(stream)):
                yield from events
        finally:
            self._loop.run(stream.aclose())

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, as `Job.result` does."""
        return self._loop.run(self._job.result(timeout))

    def cancel(self, reason: str | None = None) -> None:
        """Cancel the job, as `Job.cancel` does."""
        self._loop.run(self._job.cancel(reason))

    @contextmanager
    def cancelled_on_exit(self) -> Iterator[BlockingJob]:
        """Cancel the job if the block is left before the job's end was seen."""
        try:
            yield self
        finally:
            if not self._job.has_ended:
                self.cancel("the client left before the job ended")


class BlockingClient:
    """A client, as `Client` is; its methods block. They may be called from several threads. See `connect`."""

    def __init__(self, loop: _Loop, client: Client) -> None:
        self._loop = loop
        self._client = client

    def submit(self, **arguments: Any) -> BlockingJob:
        """Submit a job, as `Client.submit` does."""
        return BlockingJob(self._loop, self._loop.run(self._client.submit(**arguments)))

    def job(
        self, job_id: str, *, since: datetime | timedelta | None = None, reply_to: str | None = None
    ) -> BlockingJob:
        """Return a job that was submitted before, as `Client.job` does."""
        return BlockingJob(self._loop, self._client.job(job_id, since=since, reply_to=reply_to))

    def complete(self, **arguments: Any) -> Result:
        """Submit a job and return its result, as `Client.complete` does."""
        return self._loop.run(self._client.complete(**arguments))

    def map(
        self, requests: Iterable[Mapping[str, Any]], *, window: int = 100, **common: Any
    ) -> Iterator[Result]:
        """Submit many jobs and yield their results as they end, as `Client.map` does.

        The items are taken in the calling thread, so that they may come from a file or a database.
        """
        if window < 1:
            raise ValueError("window must be at least 1")
        ended: queue.SimpleQueue[Future[Result]] = queue.SimpleQueue()
        running: set[Future[Result]] = set()

        def next_result() -> Result:
            future = ended.get()
            running.discard(future)
            return future.result()

        try:
            for item in requests:
                while len(running) >= window or not ended.empty():
                    yield next_result()
                future = self._loop.start(self._client.complete(**arguments_of(item, common)))
                running.add(future)
                future.add_done_callback(ended.put)
            while running:
                yield next_result()
        finally:
            for future in running:
                future.cancel()


@contextmanager
def connect(client: Client | None = None, **arguments: Any) -> Iterator[BlockingClient]:
    """Connect a blocking client: `with connect() as client:`.

    Without arguments it has the settings of `Client.from_settings`; `arguments` are those of `Client`. Raises
    KafkaError, ConfigurationError.
    """
    if client is None:
        client = Client(**arguments) if arguments else Client.from_settings()
    loop = _Loop()
    try:
        loop.run(client.__aenter__())
        try:
            yield BlockingClient(loop, client)
        finally:
            loop.run(client.__aexit__(None, None, None))
    finally:
        loop.stop()


async def _some(stream: EventStream) -> deque[Event]:
    """Wait for an event; return it and those that are there already, or nothing at the end."""
    async for event in stream:
        return deque([event, *stream.ready()])
    return deque()
