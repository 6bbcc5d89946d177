"""Traces on their way to a collector: OTLP over HTTP, from a thread of the SDK's own.

All that can be chosen is chosen where every other program's is: in the environment variables of OpenTelemetry's
specification (endpoint, headers, sampler, service name, batch sizes). The queue is bounded and drops the oldest spans.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
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
from streamworker.redaction import Redactor
from streamworker.telemetry.tracing import OtelTracer, server_of
from streamworker.text import truncate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from streamworker.config import Settings

__all__ = ["FLUSH_S", "Tracing", "open_tracing"]

FLUSH_S = 3.0
"""How long the end of the process waits for the collector. It comes after the drain, within the grace period."""

_REASON_BYTES = 500
_LIBRARY = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_PROTOCOL = "http/protobuf"

log = structlog.get_logger()


class Tracing:
    """A tracer, and the way out for its spans."""

    def __init__(self, provider: TracerProvider, exporter: CalmExporter, tracer: OtelTracer) -> None:
        self.tracer = tracer
        self._provider = provider
        self._exporter = exporter

    async def fault(self) -> str | None:
        """Ask the collector to take nothing at all; return why it does not. Lasts as long as an export may."""
        return await asyncio.to_thread(self._exporter.fault)

    async def close(self, within_s: float = FLUSH_S) -> None:
        """Send what is left; what the collector has not taken in time is lost, and it is said."""
        loop = asyncio.get_running_loop()
        flushed = asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # nobody waited that long: the loop is closed
                loop.call_soon_threadsafe(flushed.set)

        # Not the loop's executor: the end of the loop would wait for its threads, however long they take.
        threading.Thread(target=flush, name="traces-flush", daemon=True).start()
        try:
            async with asyncio.timeout(within_s):
                await flushed.wait()
        except TimeoutError:
            log.warning("traces.not_flushed", waited_s=within_s)


class CalmExporter(SpanExporter):
    """An exporter that says once that its collector is away, and once that it is back; `redact` cleans the reason."""

    def __init__(self, exporter: SpanExporter, redact: Callable[[str], str]) -> None:
        self._exporter = exporter
        self._redact = redact
        self._failures = 0
        logging.getLogger(_LIBRARY).addFilter(_LAST_WORDS)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; called in the SDK's thread."""
        fault = self.fault(spans)
        if fault is None:
            if self._failures:
                log.info("traces.export_recovered", batches_lost=self._failures)
            self._failures = 0
            return SpanExportResult.SUCCESS
        self._failures += 1
        if self._failures == 1:
            log.warning("traces.export_failing", reason=fault, meaning="spans are dropped")
        return SpanExportResult.FAILURE

    def fault(self, spans: Sequence[ReadableSpan] = ()) -> str | None:
        """Send a batch, an empty one if none is given; return why it was not taken."""
        _LAST_WORDS.text = ""
        is_taken = self._exporter.export(spans) is SpanExportResult.SUCCESS
        return None if is_taken else truncate(self._redact(_LAST_WORDS.text), _REASON_BYTES)

    def shutdown(self) -> None:
        """Give up what is on its way."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept here."""
        return self._exporter.force_flush(timeout_millis)


class _LastWords(logging.Filter):
    """Keeps why a batch was not taken. The library would log it at every try of every batch."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        # The last line says only that it gave up on the kind of things that it sends; the ones before say why.
        if not self.text or len(record.args or ()) > 1:
            self.text = record.getMessage().partition(", retrying in")[0]
        return False


_LAST_WORDS = _LastWords()


def open_tracing(settings: Settings, environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """Make ready to send traces; None if the environment turns them off. Use it inside the loop, and close it.

    Raises:
        ConfigurationError: the environment asks for what we cannot do.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or _exporters(environ) == "none":
        return None
    if faults := _faults(environ):
        raise ConfigurationError(faults)
    exporter = CalmExporter(OTLPSpanExporter(), Redactor(_secrets(environ)))
    # No handler at exit: it would wait for a dead collector after everything else has ended well.
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    servers = {name: server_of(upstream.base_url) for name, upstream in settings.upstreams.items()}
    return Tracing(provider, exporter, OtelTracer(provider, group=settings.worker.group_id, servers=servers))


def _exporters(environ: Mapping[str, str]) -> str:
    return environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()


def _faults(environ: Mapping[str, str]) -> list[str]:
    faults = []
    if (exporters := _exporters(environ)) not in {"", "otlp"}:
        faults.append(
            f"OTEL_TRACES_EXPORTER: {exporters!r} is not there; use otlp, or none to send no traces"
        )
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environ.get(name, "").strip():
            if protocol != _PROTOCOL:
                advice = f"use {_PROTOCOL} and the collector's port for HTTP, usually 4318"
                faults.append(f"{name}: {protocol!r} is not spoken; {advice}")
            break  # the one for traces wins
    return faults


def _resource() -> Resource:
    """Say who we are; the environment knows better."""
    own = {"service.name": "streamworker", "service.version": __version__}
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def _secrets(environ: Mapping[str, str]) -> list[str]:
    """Return what may be secret in the headers that the collector is sent: a bad one is quoted in an error's text."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
    headers = [header for name in names for header in environ.get(name, "").split(",")]
    return [word for header in headers for word in unquote(header.partition("=")[2]).split()]
