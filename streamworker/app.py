"""Assembles a worker process from the settings, and runs it."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from streamworker.descriptors import raise_nofile_limit
from streamworker.errors import ConfigurationError, KafkaRefused, KafkaUnavailable, StreamworkerError
from streamworker.kafka.acls import RequiredAcls
from streamworker.kafka.committed_offsets import CommittedOffsets
from streamworker.kafka.connection import silence_abandoned_futures
from streamworker.kafka.consumer import GroupConsumer
from streamworker.kafka.control import ControlReader
from streamworker.kafka.group_commits import GroupCommitStores
from streamworker.kafka.sink import KafkaSink
from streamworker.kafka.topics import faults_of, open_admin
from streamworker.kafka.transactions import TransactionalCommitStores
from streamworker.observe import UNTRACED
from streamworker.redaction import Redactor, without_message
from streamworker.telemetry import metrics as table
from streamworker.telemetry.logging import configure_logging
from streamworker.telemetry.loop_lag import LoopLag
from streamworker.telemetry.metrics import Metrics
from streamworker.telemetry.observer import Telemetry
from streamworker.telemetry.probes import Probes
from streamworker.upstream.client import HttpUpstream
from streamworker.upstream.tokenizer import find_tokenizer
from streamworker.wire.event import EventWriter
from streamworker.wire.result import ResultWriter
from streamworker.worker.intake import Intake, IntakeRules
from streamworker.worker.policy import UpstreamPolicy
from streamworker.worker.queues import UpstreamQueues
from streamworker.worker.results import Results
from streamworker.worker.runner import Tools
from streamworker.worker.stats import WorkerStats
from streamworker.worker.worker import Worker, WorkerLimits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from streamworker.config import Settings, UpstreamSettings
    from streamworker.model import TopicPartition
    from streamworker.observe import Tracer
    from streamworker.ports import CommitStores
    from streamworker.stream.usage import Tokenizer
    from streamworker.telemetry.metrics import Definition
    from streamworker.telemetry.otlp import Tracing

__all__ = ["App", "SystemClock", "run_until_signalled"]

_CONNECT_BACKOFF_S = (0.5, 1, 2, 5)
_TOPICS_BACKOFF_S = (0.2, 0.3, 0.5, 1, 0)

_DRAIN = "drain; a second signal stops at once"
SILENT_S = 15.0
"""How long the group's coordinator may leave heartbeats, one a second, unanswered until the worker is not ready."""

_STATS: Mapping[Definition, Callable[[WorkerStats], float]] = {
    table.POLL_AGE: lambda stats: stats.poll_age_s,
    table.DRAINING: lambda stats: stats.draining_s,
    table.PARTITIONS_OPENING: lambda stats: stats.partitions_opening,
    table.MOVES_WAITING: lambda stats: stats.moves_waiting,
    table.OFFSET_MAP_FILL: lambda stats: stats.offset_map_fill,
    table.COMMIT_IN_PROGRESS: lambda stats: stats.commit_in_progress_s,
    table.COMMIT_PENDING: lambda stats: stats.commit_pending_entries,
}

log = structlog.get_logger()


class SystemClock:
    """The system's clocks."""

    def now_ms(self) -> int:
        """Return milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Return seconds of a clock that never jumps."""
        return time.monotonic()


class App:
    """One worker process. `run` it inside a loop; `drain` it from a signal."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = SystemClock()
        self.metrics = Metrics()
        models = {name: upstream.models for name, upstream in settings.upstreams.items()}
        self._telemetry = Telemetry(
            self.metrics, models, self._clock, label_metadata=settings.telemetry.label_metadata
        )
        self._tokenizer = find_tokenizer()
        self._tracer: Tracer = UNTRACED
        self._worker: Worker | None = None
        self._consumer: GroupConsumer | None = None
        self._is_joined = False
        self._is_drained = False

    def configure_logging(self) -> None:
        """Send log lines to standard output in the configured format, without the configured secrets."""
        telemetry = self._settings.telemetry
        secrets = [secret for upstream in self._settings.upstreams.values() for secret in upstream.secrets()]
        kafka = self._settings.kafka
        redact = Redactor([*secrets, kafka.password() or "", kafka.token() or ""])
        configure_logging(telemetry.log_format, telemetry.log_level, redact=redact)

    async def run(self) -> None:
        """Work until drained.

        Raises:
            KafkaRefused: a topic or a permission is missing: an operator must change the cluster.
            ConfigurationError: the settings cannot be used.
        """
        silence_abandoned_futures(asyncio.get_running_loop())
        raise_nofile_limit(self._settings.worker.max_in_flight)
        async with AsyncExitStack() as stack:
            await self._start_telemetry(stack)
            worker = await self._start_worker(stack)
            self._is_joined = True
            if self._is_drained:
                worker.drain()
            if self._tokenizer is not None:
                stack.callback(asyncio.create_task(_load(self._tokenizer)).cancel)
            log.info(
                "worker.started", delivery=self._settings.worker.delivery, topics=self._settings.topics.jobs
            )
            await worker.run()
        log.info("worker.stopped")

    @property
    def is_working(self) -> bool:
        """Whether the worker has joined the group: only then may there be jobs to drain."""
        return self._is_joined

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """The job partitions that this worker owns and whose state it has read."""
        return frozenset() if self._worker is None else self._worker.partitions

    def drain(self) -> None:
        """Accept no more jobs, wait for the open ones, then stop. A worker that is still joining drains when it has joined."""
        self._is_drained = True
        if self._worker is not None and self._is_joined:
            self._worker.drain()

    async def _start_telemetry(self, stack: AsyncExitStack) -> None:
        if (tracing := open_tracing(self._settings)) is not None:
            self._tracer = tracing.tracer
            stack.push_async_callback(tracing.close)
        lag = LoopLag()
        lag.start()
        stack.callback(lag.stop)
        self.metrics.track(table.LOOP_LAG, lambda: lag.lag_s)
        for definition, read in _STATS.items():
            self.metrics.track(definition, partial(self._stat, read))
        self.metrics.track(table.READY, self._ready)
        settings = self._settings
        probes = Probes(
            host=settings.telemetry.http_host,
            port=settings.telemetry.http_port,
            registry=self.metrics.registry,
            heartbeat_age=self._heartbeat_age,
            readiness=self._readiness,
            # A rebalance may block the poll loop for one session and one request.
            max_heartbeat_age_s=2 * settings.worker.session_timeout_s + settings.kafka.request_timeout_s,
        )
        await probes.start()
        stack.push_async_callback(probes.stop)
        log.info("probes.listening", host=probes.host, port=probes.port)

    async def _start_worker(self, stack: AsyncExitStack) -> Worker:
        settings = self._settings
        topics = settings.topics
        await self._retry_connecting(self._check_topics)
        written = [topics.events, topics.dlq, *topics.allowed_reply_to]
        written += [topics.results] if topics.results else []
        linger_s = settings.events.linger_ms / 1000
        acls = RequiredAcls.of_worker(settings)
        sink = KafkaSink(
            settings.kafka,
            written,
            self._telemetry,
            linger_s=linger_s,
            keeps_offsets=bool(topics.results),  # of `started`: without transactions the sink writes it
            acls=acls,
        )
        await self._retry_connecting(sink.start)
        stack.push_async_callback(sink.stop)
        self.metrics.track(table.UNACKNOWLEDGED, lambda: sink.unacknowledged_bytes)
        consumer = self._consumer = GroupConsumer(settings, self._telemetry)
        self.metrics.track(table.RECORDS_BEHIND, lambda: consumer.records_behind)
        self.metrics.track(table.HEARTBEAT_AGE, lambda: consumer.heartbeat_age_s)
        stack.push_async_callback(consumer.stop)
        commit_stores = await self._start_commit_stores(stack, consumer, sink)
        worker = self._worker = self._compose(sink, consumer, commit_stores, self._open_upstreams(stack))
        stack.push_async_callback(worker.stop)
        control = ControlReader(settings, worker.cancel)
        await control.start()
        stack.push_async_callback(control.stop)
        await self._retry_connecting(lambda: consumer.start(worker))
        return worker

    async def _start_commit_stores(
        self, stack: AsyncExitStack, consumer: GroupConsumer, sink: KafkaSink
    ) -> CommitStores:
        committed = CommittedOffsets(self._settings, consumer)
        await self._retry_connecting(committed.start)
        stack.push_async_callback(committed.stop)
        await self._retry_connecting(committed.check_start)
        if self._settings.worker.delivery == "exactly_once":
            return TransactionalCommitStores(self._settings, committed, consumer, self._telemetry)
        commit_stores = GroupCommitStores(self._settings, committed, consumer, sink, self._telemetry)
        await commit_stores.start()
        stack.push_async_callback(commit_stores.stop)
        return commit_stores

    def _open_upstreams(self, stack: AsyncExitStack) -> dict[str, UpstreamPolicy]:
        """Open the upstreams' clients; return what the worker needs to know of each upstream."""
        max_in_flight = self._settings.worker.max_in_flight
        policies = {}
        for name, settings in self._settings.upstreams.items():
            upstream = HttpUpstream(settings)
            stack.push_async_callback(upstream.close)
            policies[name] = UpstreamPolicy(
                name=name,
                upstream=upstream,
                scrub=upstream.scrub,
                models=settings.models,
                fallback=settings.fallback,
                first_delta_timeout_s=settings.first_delta_timeout_s,
                idle_timeout_s=settings.idle_timeout_s,
                include_usage=settings.include_usage,
                continuous_usage=settings.continuous_usage,
                cancel_grace_s=settings.cancel_grace_s,
                max_tries=settings.max_tries,
                max_restarts=settings.max_restarts,
                max_streams=min(settings.max_streams or max_in_flight, max_in_flight),
                requests_per_minute=settings.requests_per_minute,
                tokens_per_minute=settings.tokens_per_minute,
                keeps_reserved_tokens=settings.tokens_counted == "reserved",
                circuit_failure_threshold=settings.circuit_failure_threshold,
                circuit_open_s=settings.circuit_open_s,
                max_wait_s=settings.max_wait_s,
                key_version=partial(_key_version, settings),
            )
        return policies

    def _compose(
        self,
        sink: KafkaSink,
        consumer: GroupConsumer,
        commit_stores: CommitStores,
        policies: dict[str, UpstreamPolicy],
    ) -> Worker:
        settings = self._settings
        cloud_source = settings.events.source if settings.events.format == "cloudevents" else None
        writer = EventWriter(cloud_source=cloud_source)
        rules = IntakeRules(
            events_topic=settings.topics.events,
            dlq_topic=settings.topics.dlq,
            allowed_reply_to=frozenset(settings.topics.allowed_reply_to),
            group=settings.worker.group_id,
            max_job_bytes=settings.worker.max_job_bytes,
            max_record_bytes=settings.kafka.max_record_bytes,
            max_deliveries=settings.worker.max_deliveries,
            fair_by=settings.worker.fair_by,
        )
        results = self._open_results(sink, cloud_source)
        tools = Tools(
            sink=sink,
            writer=writer,
            clock=self._clock,
            observer=self._telemetry,
            queues=self._open_queues(policies),
            max_record_bytes=settings.kafka.max_record_bytes,
            max_event_bytes=settings.worker.max_event_bytes,
            tokenizer=self._tokenizer,
            coalesce_s=settings.events.coalesce_ms / 1000,
            results=results,
        )
        intake = Intake(
            rules,
            policies,
            sink=sink,
            writer=writer,
            clock=self._clock,
            tracer=self._tracer,
            results=results,
        )
        limits = WorkerLimits(
            max_in_flight=settings.worker.max_in_flight,
            drain_timeout_s=settings.worker.drain_timeout_s,
            session_timeout_s=settings.worker.session_timeout_s,
            in_key_order=settings.worker.ordering == "key",
            max_waiting=settings.worker.max_waiting,
            max_held_bytes=settings.worker.max_held_bytes,
            topics=settings.topics.jobs,
            weights=settings.topics.weights,
            is_fair=bool(settings.worker.fair_by),
            dedup_records=settings.worker.dedup_records,
        )
        return Worker(
            source=consumer,
            commit_stores=commit_stores,
            intake=intake,
            tools=tools,
            limits=limits,
            failure=sink.crashed,
        )

    def _open_results(self, sink: KafkaSink, cloud_source: str | None) -> Results | None:
        topic, limit_bytes = self._settings.topics.results, self._settings.kafka.max_result_bytes
        if not topic:
            return None
        writer = ResultWriter(cloud_source=cloud_source)
        return Results(sink, writer, self._telemetry, topic=topic, limit_bytes=limit_bytes)

    def _open_queues(self, policies: dict[str, UpstreamPolicy]) -> UpstreamQueues:
        queues = UpstreamQueues(
            policies,
            max_in_flight=self._settings.worker.max_in_flight,
            observer=self._telemetry,
            clock=self._clock,
            weights=self._settings.topics.weights,
            max_in_flight_per=self._settings.worker.max_in_flight_per,
        )
        for name, queue in queues.queues.items():
            for definition, attribute in (
                (table.CIRCUIT_STATE, "circuit_state"),
                (table.STREAMS_OPEN, "streams_open"),
                (table.STREAMS_LIMIT, "streams_limit"),
                (table.UPSTREAM_WAITING, "jobs_waiting"),
                (table.UPSTREAM_HELD, "jobs_held"),
                (table.UPSTREAM_HELD_DURATION, "held_s"),
            ):
                self.metrics.track(definition, partial(getattr, queue, attribute), name)
        return queues

    async def _check_topics(self) -> None:
        async with open_admin(self._settings) as admin:
            for wait_s in _TOPICS_BACKOFF_S:
                topics = await admin.describe()
                if None not in topics.values():
                    break
                # A broker that has just started, or a topic that was just created, may not know it yet.
                await asyncio.sleep(wait_s)
            if faults := faults_of(self._settings, topics):
                raise KafkaRefused("; ".join(faults))

    async def _retry_connecting(self, connect: Callable[[], Awaitable[None]]) -> None:
        """Call `connect` until the broker is available; the wait between two calls is logged."""
        tries = 0
        while True:
            try:
                return await connect()
            except KafkaUnavailable as error:
                wait_s = _CONNECT_BACKOFF_S[min(tries, len(_CONNECT_BACKOFF_S) - 1)]
                log.warning("kafka.unavailable", reason=str(error), next_try_s=wait_s)
                self._telemetry.kafka_failed("start")
            await asyncio.sleep(wait_s)
            tries += 1

    def _stat(self, read: Callable[[WorkerStats], float]) -> float:
        return read(self._worker.stats() if self._worker is not None and self._is_joined else WorkerStats())

    def _heartbeat_age(self) -> float:
        if (
            self._worker is None or not self._is_joined
        ):  # there is no poll loop yet, and Kafka may be away for long
            return 0.0
        return self._clock.monotonic() - self._worker.last_poll

    def _readiness(self) -> tuple[bool, dict[str, object]]:
        """Return whether the worker can accept jobs, and the details: also whether the group's coordinator answers."""
        if self._worker is None:
            return False, {"connecting": True}
        is_ready, details = self._worker.readiness()
        return is_ready and self._silent_s <= SILENT_S, details | {
            "coordinator_silent_s": round(self._silent_s, 1)
        }

    def _ready(self) -> bool:
        return self._stat(lambda stats: stats.is_ready) > 0 and self._silent_s <= SILENT_S

    @property
    def _silent_s(self) -> float:
        return 0.0 if self._consumer is None else self._consumer.heartbeat_age_s


def _key_version(settings: UpstreamSettings) -> int | None:
    """Return a value that changes when the upstream's API key is replaced; None while it cannot be read."""
    try:
        return hash(settings.api_key())
    except ConfigurationError:
        return None


async def _load(tokenizer: Tokenizer) -> None:
    """Load the tokenizer in a thread, before the first estimate: that would stop the event loop for half a second."""
    await asyncio.to_thread(tokenizer.count, "")


def open_tracing(settings: Settings, service: str = "streamworker") -> Tracing | None:
    """Open the trace exporter; return None if traces are off. Call it inside the loop, and close the result.

    `service` is the name of the service if the environment gives none.

    Raises:
        ConfigurationError: traces are on and the exporter is not installed, or its settings cannot be used.
    """
    if settings.telemetry.traces == "off":
        return None
    try:
        from streamworker.telemetry import otlp  # noqa: PLC0415 - an extra of 20 MB, imported only where it is used
    except ImportError as error:
        fault = f"telemetry.traces: {error.name} is not installed: pip install 'streamworker[otel]', or set it to off"
        raise ConfigurationError([fault]) from None
    return otlp.open_tracing(settings, service=service)


class Drainable(Protocol):
    """A process that ends when what it does is done."""

    @property
    def is_working(self) -> bool:
        """Whether there may be something to drain."""
        ...

    async def run(self) -> None:
        """Work until drained."""
        ...

    def drain(self) -> None:
        """Begin nothing new, end what is going on, then stop."""
        ...


async def run_until_signalled(app: Drainable, name: str = "worker") -> int:
    """Run a process until it is drained by SIGTERM or SIGINT; a second signal stops it. Return the exit code.

    `name` is the first part of the names of its log events.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(app.run())
    signals: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        signals.append(number)
        at_once = len(signals) > 1 or not app.is_working
        log.info("signal.received", signal=number.name, meaning="stop at once" if at_once else _DRAIN)
        task.cancel() if at_once else app.drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await task
    except asyncio.CancelledError:
        # A signal before the worker has joined the group interrupts no job.
        return 0 if len(signals) == 1 else 1
    except StreamworkerError:
        raise
    except Exception as error:
        # The last line of the log: the exception's own text may repeat a prompt, so it is left out.
        event = f"{name}.crashed"
        log.critical(event, exc_info=without_message(error))
        return 1
    return 0
