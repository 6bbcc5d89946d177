"""The asynchronous client."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog

from streamworker.client.errors import InvalidJob, SubmitUnknown
from streamworker.client.ids import submitted_ms
from streamworker.client.job import Job, assembled
from streamworker.client.mapping import results_of
from streamworker.client.requests import check_job, new_job
from streamworker.client.results import TopicResults
from streamworker.client.subscriptions import TopicSubscriptions
from streamworker.config import KafkaSettings, Settings, TopicSettings, load
from streamworker.kafka.scan import LogScanner
from streamworker.kafka.sink import KafkaSink
from streamworker.model import ProducerRecord
from streamworker.wire.control import write_cancel
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Mapping

    from streamworker.client.result import Result

__all__ = ["Client"]

UNREAD_BYTES = 256 << 10
"""Size of the events that are kept for a job before its first iterator. Above it they are read from the log later."""

LOOKUP_S = 3600.0
"""How far back a job is looked for whose id has no time in it, in seconds."""

_CLOCK_SKEW_MS = 60_000
_STOP_TIMEOUT_S = 5.0


class Client:
    """Submits jobs, and reads their events and results. Use it as an async context manager.

    One client per process is enough: it has one producer, and one pair of readers for all jobs. It needs Kafka only: no
    upstream, no key, no HTTP.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        bootstrap_servers: str | None = None,
        kafka: KafkaSettings | None = None,
        topics: TopicSettings | None = None,
        is_lazy: bool = False,
    ) -> None:
        """Without `settings`, the defaults hold, and `kafka` or `bootstrap_servers`, and `topics`, override them.

        With `is_lazy`, producer and readers are connected when they are first needed. A program that only submits or
        only cancels then needs no right to read. The events of its jobs are read from the log if they are wanted.
        """
        base = settings or Settings()
        self._kafka = kafka or base.kafka
        if bootstrap_servers is not None:
            self._kafka = KafkaSettings(
                **{**self._kafka.model_dump(), "bootstrap_servers": bootstrap_servers}
            )
        self._topics = topics or base.topics
        self._is_lazy = is_lazy
        self._sinks: dict[str, KafkaSink] = {}
        self._results: TopicResults | None = None
        self._stack: AsyncExitStack | None = None
        self._events: dict[str, TopicSubscriptions] = {}
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def from_settings(cls, path: Path | str | None = None) -> Self:
        """Return a client with the settings of a TOML file and of the environment, as the commands read them.

        The file is `path`, else the one that STREAMWORKER_CONFIG names. Raises ConfigurationError.
        """
        file = path or os.environ.get("STREAMWORKER_CONFIG")
        return cls(load(Path(file) if file else None, needs_keys=False))

    async def __aenter__(self) -> Self:
        """Connect. Raises KafkaError, ConfigurationError."""
        _prepare_logging()
        self._stack = AsyncExitStack()
        self._scanner = LogScanner(self._kafka)
        self._stack.push_async_callback(self._scanner.stop)
        try:
            if not self._is_lazy:
                await self._open_sink([*self._topics.jobs, self._topics.control])
                if await self._open_results() is None:
                    await self._subscriptions(self._topics.events)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Send the cancellations that are still to be sent, and close the connections. Bounded in time."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_TIMEOUT_S)
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()
        self._events, self._sinks, self._results = {}, {}, None

    # Jobs

    async def submit(
        self,
        *,
        request: Mapping[str, Any] | None = None,
        key: str | None = None,
        job_id: str | None = None,
        deadline: timedelta | datetime | str | None = None,
        metadata: Mapping[str, str] | None = None,
        upstream: str | None = None,
        on_break: str | None = None,
        deltas: str | None = None,
        max_wait_s: float | None = None,
        reply_to: str | None = None,
        topic: str | None = None,
        **members: Any,
    ) -> Job:
        """Submit a job; return when the broker has it.

        The request is given as `request`, or member by member: `model`, `messages` and every other member of a
        chat-completions body. `key` is the record's key, such as a conversation id (default: the job's id); `topic` is
        one of `topics.jobs`. The other arguments are members of the job.

        Raises:
            InvalidJob: every worker would reject the job; nothing was written.
            SubmitUnknown: the broker did not acknowledge the job in time; it may have it.
            KafkaError: the record is too large, or a topic does not exist.
        """
        job = new_job(
            request=request,
            members=members,
            job_id=job_id,
            deadline=deadline,
            metadata=dict(metadata) if metadata is not None else None,
            upstream=upstream,
            on_break=on_break,
            deltas=deltas,
            max_wait_s=max_wait_s,
            reply_to=reply_to,
        )
        return await self.submit_job(job, key=key, topic=topic)

    async def submit_job(
        self, job: Mapping[str, Any], *, key: str | None = None, topic: str | None = None
    ) -> Job:
        """Submit a job that is given as the object of its record, with its `job_id`. Raises as `submit` does."""
        check_job(job)
        jobs_topic = topic or self._topics.jobs[0]
        if jobs_topic not in self._topics.jobs:
            raise InvalidJob(
                [f"topic {jobs_topic} is not one of topics.jobs: {', '.join(self._topics.jobs)}"]
            )
        submitted = await self._expect(str(job["job_id"]), job.get("reply_to"))
        await self._write(jobs_topic, key or submitted.id, encode(job), submitted.id)
        return submitted

    def job(
        self, job_id: str, *, since: datetime | timedelta | None = None, reply_to: str | None = None
    ) -> Job:
        """Return a job that another client, or this one, submitted.

        Its records are looked for in its partition from `since` on, a time or a duration before now. Without it, they
        are looked for from the time in the id on (UUIDs of version 7 have one), else for the last hour.
        """
        return Job(self, job_id, reply_to or self._topics.events, _since_ms(job_id, since))

    async def complete(self, *, timeout: float | None = None, **arguments: Any) -> Result:  # noqa: ASYNC109
        """Submit a job and return its result. Takes the arguments of `submit`, and raises as `Job.result` does."""
        job = await self.submit(**arguments)
        return await job.result(timeout)

    def map(
        self,
        requests: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
        *,
        window: int = 100,
        **common: Any,
    ) -> AsyncIterator[Result]:
        """Submit many jobs and yield their results as they end.

        Each item is a chat-completions body, or a mapping of arguments of `submit` with `request` among them; `common`
        are arguments for all jobs. Items are taken one by one: at most `window` jobs are submitted and not ended.
        Jobs that have not ended when the iterator is closed go on.
        """
        return results_of(self, requests, window, common)

    # For jobs

    async def _expect(self, job_id: str, reply_to: str | None) -> Job:
        """Return a job whose events or result are awaited from now on, unless the readers are not connected."""
        topic = reply_to or self._topics.events
        job = Job(self, job_id, topic, time.time_ns() // 1_000_000 - _CLOCK_SKEW_MS)
        if self._results is not None:
            job.expect(self._results.expect(job_id), self._results.forget)
        if topic in self._events or not (self._is_lazy or self._results is not None):
            subscriptions = await self._subscriptions(topic)
            offset = subscriptions.position(job_id)
            job.attach(subscriptions, subscriptions.subscribe(job_id, UNREAD_BYTES), offset)
        return job

    async def _subscriptions(self, topic: str) -> TopicSubscriptions:
        """Return the subscriptions to an events topic. Its readers are started when the topic is first needed."""
        async with self._opening:
            if topic not in self._events:
                stack = self._open_stack
                subscriptions = TopicSubscriptions(self._kafka, topic, self._scanner)
                stack.push_async_callback(subscriptions.stop)
                await subscriptions.start()
                self._events[topic] = subscriptions
            return self._events[topic]

    async def _open_results(self) -> TopicResults | None:
        """Return the results topic, if one is configured."""
        async with self._opening:
            if self._results is None and (topic := _results_topic(self._topics)) is not None:
                stack = self._open_stack
                results = TopicResults(self._kafka, topic, self._scanner)
                stack.push_async_callback(results.stop)
                await results.start()
                self._results = results
            return self._results

    async def _open_sink(self, topics: list[str]) -> KafkaSink:
        """Return the producer for these topics."""
        async with self._opening:
            if topics[0] not in self._sinks:
                stack = self._open_stack
                sink = KafkaSink(self._kafka, [])
                stack.push_async_callback(sink.stop)
                await sink.start()
                for topic in topics:
                    await sink.require(topic)  # a missing topic is reported at once, not after a timeout
                self._sinks |= dict.fromkeys(topics, sink)
            return self._sinks[topics[0]]

    @property
    def _open_stack(self) -> AsyncExitStack:
        if self._stack is None:
            raise RuntimeError("the client is not open: use `async with client:`")
        return self._stack

    async def _result(self, job: Job) -> Result:
        results = await self._open_results()
        if results is None:
            return await assembled(job)
        if job.awaited is None:
            job.expect(await results.find(job.id, job.since_ms), results.forget)
        assert job.awaited is not None
        return await results.read(job.awaited)

    async def _cancel(self, job_id: str, reason: str | None) -> None:
        await self._write(self._topics.control, job_id, write_cancel(job_id, reason), job_id)

    async def _write(self, topic: str, key: str, value: bytes, job_id: str) -> None:
        sink = self._sinks.get(topic) or await self._open_sink([topic])
        timeout_s = self._kafka.request_timeout_s
        record_key = key.encode()
        receipt = sink.receipt()
        try:
            async with asyncio.timeout(timeout_s):
                if not sink.has_room:
                    await sink.room()
                sink.publish(
                    ProducerRecord(sink.partition_for(topic, record_key), record_key, value), receipt
                )
                await receipt.settled()
        except TimeoutError:
            raise SubmitUnknown(job_id, timeout_s) from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that its caller cannot wait for. `__aexit__` waits for it."""
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:  # noqa: BLE001 - there is no caller that it could be raised in
        structlog.get_logger().warning("client.cancel_failed", reason=str(error))


def _results_topic(topics: TopicSettings) -> str | None:
    return topics.results or None


def _since_ms(job_id: str, since: datetime | timedelta | None) -> int:
    if isinstance(since, timedelta):
        since = datetime.now(UTC) - since
    if since is not None:
        if since.tzinfo is None:
            raise ValueError(
                "since: the time has no zone; use datetime.now(UTC) - timedelta(...), or a timedelta"
            )
        return round(since.timestamp() * 1000)
    submitted = submitted_ms(job_id)
    if submitted is not None:
        return submitted - _CLOCK_SKEW_MS
    return round((time.time() - LOOKUP_S) * 1000)


def _prepare_logging() -> None:
    """Send this package's log to the standard library's logging, if the program has not configured structlog.

    structlog's default prints to standard output, which belongs to the program. aiokafka's debug log would print keys
    and values, which are prompts.
    """
    if not structlog.is_configured():
        structlog.configure(
            processors=[structlog.stdlib.render_to_log_kwargs],
            wrapper_class=structlog.stdlib.BoundLogger,
            logger_factory=lambda *_: logging.getLogger("streamworker"),
        )
    library = logging.getLogger("aiokafka")
    if library.getEffectiveLevel() < logging.INFO:
        library.setLevel(logging.INFO)
