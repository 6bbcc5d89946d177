"""Assembles a gateway process from the settings, and runs it."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from streamworker.app import SystemClock, open_tracing
from streamworker.descriptors import raise_nofile_limit
from streamworker.errors import KafkaUnavailable
from streamworker.gateway import (
    chat,
    event_stream,
    job_routes,
    middleware,
    models,
    openapi,
    page_files,
    websocket,
)
from streamworker.gateway.auth import Authenticator
from streamworker.gateway.batches import routes as batch_routes
from streamworker.gateway.batches.service import Batches
from streamworker.gateway.drain import Drain
from streamworker.gateway.event_log import KafkaEventLog
from streamworker.gateway.gateway import Gateway
from streamworker.gateway.jobs import Jobs
from streamworker.gateway.limits import FACES, MAX_CONNECTIONS, Limits
from streamworker.gateway.log_metrics import LogMetrics
from streamworker.gateway.log_options import LogOptions
from streamworker.gateway.search import SearchLimits
from streamworker.gateway.server import Server
from streamworker.gateway.writer import KafkaWriter
from streamworker.kafka.acls import RequiredAcls
from streamworker.kafka.connection import silence_abandoned_futures
from streamworker.observe import UNTRACED_REQUESTS
from streamworker.redaction import Redactor
from streamworker.telemetry import gateway_metrics as table
from streamworker.telemetry.logging import configure_logging
from streamworker.telemetry.loop_lag import LoopLag
from streamworker.telemetry.metrics import Metrics
from streamworker.telemetry.probes import Probes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from streamworker.config import Settings
    from streamworker.gateway.feeds import EventLog
    from streamworker.observe import RequestTracer

__all__ = ["GatewayApp", "application"]

_CONNECT_BACKOFF_S = (0.5, 1, 2, 5)
_SERVICE = "streamworker-gateway"
"""The name of the service in traces, unless the environment gives one."""

_HINT_S = 2.5
"""Seconds after which a connection that is still being made is logged."""

_ROOMS = (job_routes, event_stream, websocket, chat, models, batch_routes, openapi, page_files)
"""The modules with handlers."""

log = structlog.get_logger()


def application(gateway: Gateway, is_full: Callable[[], bool] = lambda: False) -> web.Application:
    """Return the application with the handlers of all modules."""
    app = web.Application(client_max_size=gateway.settings.worker.max_job_bytes)
    app.on_shutdown.append(gateway.drain.finish)
    middleware.install(app, gateway, is_full)
    _count_streams(gateway)
    for room in _ROOMS:
        app.add_routes(room.routes(gateway))
    return app


def _count_streams(gateway: Gateway) -> None:
    """Have the metrics of streams read at each scrape."""
    metrics, limits = gateway.metrics, gateway.limits
    for face in FACES:
        metrics.track(table.STREAMS_OPEN, partial(limits.open.__getitem__, face), face)

    def count_delivered() -> None:
        for face, delivered in limits.delivered.items():
            metrics.add(table.EVENTS_DELIVERED, delivered.events, face)
            delivered.events = 0

    metrics.before_scrape(count_delivered)


class GatewayApp:
    """One gateway process. `run` it inside a loop; `drain` it from a signal."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = SystemClock()
        self._drain: Drain | None = None
        self._event_log: EventLog | None = None
        self._batches: Batches | None = None
        self._writer: KafkaWriter | None = None
        self._server: Server | None = None
        self._serving = asyncio.Event()
        self._has_started = False
        self.metrics = Metrics(table=table.GATEWAY_TABLE)

    def configure_logging(self) -> None:
        """Send log lines to standard output in the configured format, without the configured secrets."""
        telemetry, kafka = self._settings.telemetry, self._settings.kafka
        redact = Redactor([kafka.password() or "", kafka.token() or ""])
        configure_logging(telemetry.log_format, telemetry.log_level, redact=redact)

    @property
    def is_working(self) -> bool:
        """Whether requests are served: only then may there be streams to drain."""
        return self._is_ready

    @property
    def port(self) -> int:
        """The port that is served, once `serving` has returned."""
        return 0 if self._server is None else self._server.port

    async def serving(self) -> None:
        """Wait until the port is open. Kafka may not be connected yet."""
        await self._serving.wait()

    def drain(self) -> None:
        """Take no more requests, have streams reconnect elsewhere, then stop."""
        if self._drain is not None:
            self._drain.begin()

    async def run(self) -> None:
        """Serve until drained.

        Raises:
            KafkaRefused: a topic or a permission is missing: an operator must change the cluster.
            ConfigurationError: the settings cannot be used.
        """
        silence_abandoned_futures(asyncio.get_running_loop())
        raise_nofile_limit(MAX_CONNECTIONS)
        async with AsyncExitStack() as stack:
            self._drain = Drain(self._settings.gateway.drain_s)
            gateway = self._compose(self._open_tracing(stack))
            stack.push_async_callback(gateway.event_log.stop)
            stack.push_async_callback(self._writer_of().stop)
            if gateway.batches is not None:
                stack.push_async_callback(gateway.batches.stop)
            await self._start_telemetry(stack)
            await self._serve(stack, gateway)
            await self._work(gateway)
        log.info("gateway.stopped")

    async def _work(self, gateway: Gateway) -> None:
        connecting = asyncio.create_task(self._connect(gateway))
        draining = asyncio.create_task(gateway.drain.wait())
        try:
            await asyncio.wait([connecting, draining], return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                connecting.result()
            await draining
        finally:
            for task in (connecting, draining):
                task.cancel()
            await asyncio.wait([connecting, draining])

    def _open_tracing(self, stack: AsyncExitStack) -> RequestTracer:
        tracing = open_tracing(self._settings, _SERVICE)
        if tracing is None:
            return UNTRACED_REQUESTS
        stack.push_async_callback(tracing.close)
        return tracing.requests

    def _compose(self, tracer: RequestTracer) -> Gateway:
        settings = self._settings
        limits = Limits()
        authenticator = Authenticator(settings, admit=limits.admit, refused=self._auth_refused)
        self._event_log = event_log = _open_log(settings, self.metrics)
        topics = (settings.gateway.topic or settings.topics.jobs[0], settings.topics.control)
        self._writer = writer = KafkaWriter(settings, topics, RequiredAcls.of_gateway(settings))
        if settings.topics.results and settings.topics.batches:
            self._batches = Batches(settings, self.metrics)
        assert self._drain is not None
        return Gateway(
            settings=settings,
            event_log=event_log,
            jobs=Jobs(settings, event_log, writer, self.metrics),
            authenticator=authenticator,
            limits=limits,
            metrics=self.metrics,
            clock=self._clock,
            drain=self._drain,
            tracer=tracer,
            batches=self._batches,
        )

    def _auth_refused(self, code: str) -> None:
        self.metrics.add(table.AUTH_FAILURES, 1, code)

    async def _serve(self, stack: AsyncExitStack, gateway: Gateway) -> None:
        settings = self._settings.gateway
        app = application(gateway, lambda: self._server is not None and self._server.is_full)
        self._server = server = Server(app, settings.host, settings.port, stall_s=settings.stall_s)
        await server.start()
        stack.push_async_callback(server.stop)
        self.metrics.track(table.CONNECTIONS, lambda: server.connections)
        self._serving.set()
        log.info("gateway.listening", host=server.host, port=server.port, auth=settings.auth)

    async def _connect(self, gateway: Gateway) -> None:
        await self._retry_connecting(self._writer_of().start)
        await self._retry_connecting(gateway.event_log.start)
        if gateway.batches is not None:
            await self._retry_connecting(gateway.batches.start)
        self._has_started = True
        log.info("gateway.started", brokers=self._settings.kafka.bootstrap_servers)

    async def _retry_connecting(self, connect: Callable[[], Awaitable[None]]) -> None:
        """Call `connect` until the broker is available; the wait is logged."""
        tries = 0
        brokers = self._settings.kafka.bootstrap_servers
        loop = asyncio.get_running_loop()
        while True:
            hint = loop.call_later(_HINT_S, lambda: log.warning("gateway.connecting", brokers=brokers))
            try:
                return await connect()
            except KafkaUnavailable as error:
                wait_s = _CONNECT_BACKOFF_S[min(tries, len(_CONNECT_BACKOFF_S) - 1)]
                log.warning("kafka.unavailable", reason=str(error), next_try_s=wait_s)
                self.metrics.add(table.KAFKA_FAILURES, 1, "start")
            finally:
                hint.cancel()
            await asyncio.sleep(wait_s)
            tries += 1

    async def _start_telemetry(self, stack: AsyncExitStack) -> None:
        lag = LoopLag()
        lag.start()
        stack.callback(lag.stop)
        track = self.metrics.track
        track(table.LOOP_LAG, lambda: lag.lag_s)
        track(table.READY, lambda: self._is_ready)
        track(table.DRAINING, lambda: 0.0 if self._drain is None else self._drain.seconds)
        track(table.UNACKNOWLEDGED, lambda: self._writer_of().unacknowledged_bytes)
        telemetry = self._settings.telemetry
        probes = Probes(
            host=telemetry.http_host,
            port=telemetry.http_port,
            registry=self.metrics.registry,
            heartbeat_age=self._heartbeat_age,
            readiness=self._readiness,
        )
        await probes.start()
        stack.push_async_callback(probes.stop)
        log.info("probes.listening", host=probes.host, port=probes.port)

    def _heartbeat_age(self) -> float:
        """Return 0: the loop answers. Infinite if the readers of the events topic have crashed: only a restart helps."""
        has_crashed = self._has_started and self._event_log is not None and not self._event_log.is_ready
        return inf if has_crashed else 0.0

    @property
    def _is_ready(self) -> bool:
        return (
            self._event_log is not None
            and self._event_log.is_ready
            and self._writer_of().is_ready
            and (self._batches is None or self._batches.is_ready)
            and self._drain is not None
            and not self._drain.is_draining
        )

    def _readiness(self) -> tuple[bool, dict[str, Any]]:
        if self._drain is not None and self._drain.is_draining:
            return False, {"draining_s": round(self._drain.seconds, 1), "requests": self._drain.busy}
        connections = 0 if self._server is None else self._server.connections
        if self._is_ready:
            return True, {"connected": True, "connections": connections}
        return False, {"connecting": True, "connections": connections}

    def _writer_of(self) -> KafkaWriter:
        assert self._writer is not None
        return self._writer


def _open_log(settings: Settings, metrics: Metrics) -> KafkaEventLog:
    gateway = settings.gateway
    options = LogOptions(
        reads_all=gateway.read == "all",
        home_name=f"{socket.gethostname()}:{gateway.port}",
        home_count=gateway.home_partitions,
        former_partitions=gateway.former_partitions,
        limits=SearchLimits(
            lookback_s=gateway.lookback_s,
            max_records=gateway.search_max_records,
            max_s=gateway.search_max_s,
        ),
    )
    return KafkaEventLog(
        settings.kafka,
        settings.topics.events,
        options,
        observer=LogMetrics(metrics),
        acls=RequiredAcls.of_gateway(settings),
    )
