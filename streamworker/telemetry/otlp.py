"""Export of traces to a collector: OTLP over HTTP, in a thread of the OpenTelemetry SDK.

Endpoint, headers, sampler, service name and batch sizes are set by the environment variables of OpenTelemetry's
specification. The queue of spans is bounded; when it is full, the oldest spans are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import unquote

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from streamworker import __version__
from streamworker.errors import ConfigurationError
from streamworker.log_throttle import OutageLog
from streamworker.redaction import Redactor
from streamworker.telemetry.tracing import OtelRequestTracer, OtelTracer, server_of
from streamworker.text import truncate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from streamworker.config import Settings

__all__ = ["FLUSH_S", "Tracing", "open_tracing"]

FLUSH_S = 3.0
"""Seconds that the end of the process waits for the collector, after the drain and within the grace period."""

_REMIND_S = 300.0
_REASON_BYTES = 500
_LIBRARY = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PROTOCOL = "http/protobuf"

log = structlog.get_logger()


class Tracing:
    """The tracers of a process with the exporter of their spans."""

    def __init__(self, provider: TracerProvider, exporter: LoggedExporter, tracer: OtelTracer) -> None:
        self.tracer = tracer
        self.requests = OtelRequestTracer(provider)
        self._provider = provider
        self._exporter = exporter

    async def fault(self) -> str | None:
        """Send an empty batch to the collector; return the reason if it was refused. May last as long as an export."""
        return await asyncio.to_thread(self._exporter.fault)

    async def close(self, within_s: float = FLUSH_S) -> None:
        """Send the spans that are left. After `within_s` seconds the rest is dropped, and a warning is logged."""
        loop = asyncio.get_running_loop()
        flushed = asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the timeout has passed, and the loop is closed
                loop.call_soon_threadsafe(flushed.set)

        # Not the loop's executor: closing the loop would wait for its threads without a time limit.
        threading.Thread(target=flush, name="traces-flush", daemon=True).start()
        try:
            async with asyncio.timeout(within_s):
                await flushed.wait()
        except TimeoutError:
            log.warning("traces.not_flushed", waited_s=within_s)


class LoggedExporter(SpanExporter):
    """An exporter that logs the outages of its collector; `redact` removes secrets from the reason."""

    def __init__(self, exporter: SpanExporter, redact: Callable[[str], str]) -> None:
        self._exporter = exporter
        self._redact = redact
        self.outage_log = OutageLog("traces.export_recovered", interval_s=_REMIND_S)
        logging.getLogger(_LIBRARY).addFilter(_LAST_ERROR)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. The SDK calls this in its own thread."""
        fault = self.fault(spans)
        if fault is None:
            self.outage_log.worked()
            return SpanExportResult.SUCCESS
        self.outage_log.failed(
            "traces.export_failing", time.monotonic(), reason=fault, meaning="spans are dropped"
        )
        return SpanExportResult.FAILURE

    def fault(self, spans: Sequence[ReadableSpan] = ()) -> str | None:
        """Send a batch of spans, by default an empty one; return the reason if it was refused."""
        _LAST_ERROR.text = ""
        is_accepted = self._exporter.export(spans) is SpanExportResult.SUCCESS
        return None if is_accepted else truncate(self._redact(_LAST_ERROR.text), _REASON_BYTES)

    def shutdown(self) -> None:
        """Abort the export in progress."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flush the wrapped exporter; this class has no buffer."""
        return self._exporter.force_flush(timeout_millis)


class _LastError(logging.Filter):
    """Keep the reason why a batch was refused, and drop the line: the library logs it at every try of every batch."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        # The library's last line has only the kind of data as its argument; the lines before it have the reason.
        if not self.text or len(record.args or ()) > 1:
            self.text = record.getMessage().partition(", retrying in")[0]
        return False


_LAST_ERROR = _LastError()


def open_tracing(
    settings: Settings, environ: Mapping[str, str] = os.environ, *, service: str = "streamworker"
) -> Tracing | None:
    """Open the export of traces; return None if the environment turns it off. The caller closes it inside the loop.

    `service` is the name of the service if the environment gives none.

    Raises:
        ConfigurationError: the environment selects an exporter or a protocol that is not supported.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or _exporters(environ) == "none":
        return None
    if faults := _faults(environ):
        raise ConfigurationError(faults)
    exporter = LoggedExporter(OTLPSpanExporter(), Redactor(_secrets(environ)))
    # No handler at exit: it would wait for a collector that is down after everything else has ended.
    provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    servers = {name: server_of(upstream.base_url) for name, upstream in settings.upstreams.items()}
    return Tracing(provider, exporter, OtelTracer(provider, group=settings.worker.group_id, servers=servers))


def _exporters(environ: Mapping[str, str]) -> str:
    return environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()


def _faults(environ: Mapping[str, str]) -> list[str]:
    faults = []
    if (exporters := _exporters(environ)) not in {"", "otlp"}:
        faults.append(
            f"OTEL_TRACES_EXPORTER: {exporters!r} is not supported; use otlp, or none to send no traces"
        )
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environ.get(name, "").strip():
            if protocol != _PROTOCOL:
                advice = f"use {_PROTOCOL} and the collector's port for HTTP, usually 4318"
                faults.append(f"{name}: {protocol!r} is not supported; {advice}")
            break  # the variable for traces has precedence
    return faults


def _resource(service: str) -> Resource:
    """Describe this service; the environment overrides it."""
    own = {"service.name": service, "service.version": __version__}
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """Return the words of the collector's headers that may be secret: the library quotes an invalid one in its error."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
    headers = [header for name in names for header in environ.get(name, "").split(",")]
    return [word for header in headers for word in unquote(header.partition("=")[2]).split()]
