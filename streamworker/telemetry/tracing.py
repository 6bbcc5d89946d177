"""Spans: one per delivery of a job, with one child per upstream call; and one per request that submits a job to a gateway.

Contexts are passed as arguments and never stored in the task: thousands of jobs share an event loop. Attributes hold no
free text: names are truncated, and neither an upstream's messages nor content are recorded.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from streamworker import __version__
from streamworker.model import ErrorCode
from streamworker.model import Status as JobStatus
from streamworker.observe import trace_headers
from streamworker.stream.attempt import State
from streamworker.telemetry import conventions as names
from streamworker.text import truncate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider
    from opentelemetry.util.types import AttributeValue

    from streamworker.model import Headers, Job, JobError, Rejection, UsageEvent
    from streamworker.stream.attempt import Attempt

__all__ = [
    "OtelJobSpan",
    "OtelRequestSpan",
    "OtelRequestTracer",
    "OtelTracer",
    "OtelTrySpan",
    "Server",
    "server_of",
]

_NAME_BYTES = 200
_REASON_BYTES = 64
_MAX_REASONS = 16
_CRASHED = "crashed"
_DISCONNECTED = "disconnected"
_HTTP = "http"
_MAX_TOKENS = 1 << 53  # exact in JSON; a value above 63 bits would make the encoding of the whole batch fail

_W3C = TraceContextTextMapPropagator()

Server = tuple[str, int]
"""Host and port of an upstream."""


class OtelTracer:
    """Implement `streamworker.observe.Tracer`. `servers` are the configured upstreams; `now_ns` is since the epoch."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        group: str,
        servers: Mapping[str, Server],
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tracer = provider.get_tracer("streamworker", __version__)
        self._group = group
        self._servers = servers
        self._now_ns = now_ns

    def open_job(self, job: Job | Rejection, deliveries: int) -> OtelJobSpan:
        """Start the span of one delivery, as a child of the span in the record's headers. `deliveries` counts from 1."""
        at = job.source
        span = self._tracer.start_span(
            f"{names.PROCESS} {at.topic}",
            _W3C.extract(trace_headers(job.trace)),
            SpanKind.CONSUMER,
            {
                names.MESSAGING_SYSTEM: names.KAFKA,
                names.MESSAGING_OPERATION_NAME: names.PROCESS,
                names.MESSAGING_OPERATION_TYPE: names.PROCESS,
                names.MESSAGING_DESTINATION: at.topic,
                names.MESSAGING_PARTITION: str(at.partition),
                names.MESSAGING_OFFSET: at.offset,
                names.MESSAGING_GROUP: self._group,
                names.JOB_ID: job.job_id,
                names.JOB_DELIVERIES: deliveries,
            },
            start_time=self._now_ns(),
        )
        return OtelJobSpan(span, self._tracer, self._servers, self._now_ns)


class OtelJobSpan:
    """Implement `streamworker.observe.JobSpan`."""

    def __init__(
        self, span: Span, tracer: Tracer, servers: Mapping[str, Server], now_ns: Callable[[], int]
    ) -> None:
        self._span = span
        self._tracer = tracer
        self._servers = servers
        self._now_ns = now_ns
        self._context = set_span_in_context(span)
        self._attempt_id = ""
        self._attempts = 0
        self.trace = _headers(self._context)

    def open_try(self, attempt: Attempt, upstream: str) -> OtelTrySpan:
        """Start the span of the next call to `upstream`."""
        if attempt.id != self._attempt_id:
            self._attempt_id = attempt.id
            self._attempts += 1
        job, model = attempt.job, truncate(attempt.job.model, _NAME_BYTES)
        attributes: dict[str, AttributeValue] = {
            names.GEN_AI_OPERATION: names.CHAT,
            names.GEN_AI_PROVIDER: names.OPENAI,
            names.GEN_AI_REQUEST_MODEL: model,
            names.GEN_AI_REQUEST_STREAM: True,
            names.JOB_ID: job.job_id,
            names.UPSTREAM: upstream,
            names.ATTEMPT_ID: attempt.id,
            names.ATTEMPT_NUMBER: self._attempts,
            names.TRY_NUMBER: attempt.tries + 1,
        }
        if upstream in self._servers:
            attributes[names.SERVER_ADDRESS], attributes[names.SERVER_PORT] = self._servers[upstream]
        began_ns = self._now_ns()
        span = self._tracer.start_span(
            f"{names.CHAT} {model}", self._context, SpanKind.CLIENT, attributes, start_time=began_ns
        )
        return OtelTrySpan(span, began_ns, self._now_ns)

    def ended(self, event: UsageEvent, upstream: str) -> None:
        """End the span of a job whose terminal event is durable."""
        usage = event.usage or {}
        attributes: dict[str, AttributeValue | None] = {
            names.JOB_STATUS: event.status.value,
            names.JOB_TRIES: event.tries,
            names.UPSTREAM: upstream,
            names.ATTEMPT_ID: event.attempt,
            names.USAGE_SOURCE: event.usage_source.value,
            names.USAGE_INPUT_TOKENS: _count(usage.get("prompt_tokens")),
            names.USAGE_OUTPUT_TOKENS: _count(usage.get("completion_tokens")),
        }
        self._end(attributes, None if event.error is None else event.error.code)

    def refused(self, code: ErrorCode) -> None:
        """End the span of a record that cannot be run; its dead letter and its terminal event are durable."""
        status = JobStatus.FAILED if code is ErrorCode.MAX_DELIVERIES else JobStatus.REJECTED
        self._end({names.JOB_STATUS: status.value, names.JOB_TRIES: 0}, code)

    def abandoned(self, reason: str) -> None:
        """End the span of a job that was returned without a terminal event."""
        self._end({names.JOB_ABANDONED: reason})

    def crashed(self) -> None:
        """End the span of a delivery that ended with an unexpected exception."""
        self._end({names.JOB_ABANDONED: _CRASHED}, _CRASHED)

    def _end(self, attributes: Mapping[str, AttributeValue | None], error: str | None = None) -> None:
        if self._span.is_recording():  # the first end counts
            _end(self._span, attributes, error, self._now_ns())


class OtelTrySpan:
    """Implement `streamworker.observe.TrySpan`."""

    def __init__(self, span: Span, began_ns: int, now_ns: Callable[[], int]) -> None:
        self._span = span
        self._began_ns = began_ns
        self._now_ns = now_ns
        self.trace = _headers(set_span_in_context(span))

    def first_delta(self) -> None:
        """Record the time of the call's first delta."""
        now_ns = self._now_ns()
        self._span.set_attribute(names.GEN_AI_TIME_TO_FIRST_CHUNK, max(0, now_ns - self._began_ns) / 1e9)
        self._span.add_event(names.FIRST_DELTA, timestamp=now_ns)

    def ended(self, attempt: Attempt, error: JobError | None) -> None:
        """End the span of the call. `error` is the reason if another try follows."""
        if not self._span.is_recording():
            return
        outcome, cause = _outcome(attempt, error)
        attributes = {
            names.TRY_OUTCOME: outcome,
            names.HTTP_STATUS: None if cause is None else _count(cause.http_status),
            **_answer(attempt),
        }
        _end(self._span, attributes, None if cause is None else cause.code, self._now_ns())


class OtelRequestTracer:
    """Implement `streamworker.observe.RequestTracer`. `now_ns` is since the epoch."""

    def __init__(self, provider: TracerProvider, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._tracer = provider.get_tracer("streamworker", __version__)
        self._now_ns = now_ns

    def open_request(self, method: str, route: str, trace: Headers) -> OtelRequestSpan:
        """Start the span of a request, as a child of the span in its headers. `route` has no parameters."""
        span = self._tracer.start_span(
            f"{method} {route}",
            _W3C.extract(trace_headers(trace)),
            SpanKind.SERVER,
            {
                names.HTTP_METHOD: method,
                names.HTTP_ROUTE: route,
                names.URL_PATH: route,
                names.URL_SCHEME: _HTTP,
            },
            start_time=self._now_ns(),
        )
        return OtelRequestSpan(span, self._now_ns)


class OtelRequestSpan:
    """Implement `streamworker.observe.RequestSpan`."""

    def __init__(self, span: Span, now_ns: Callable[[], int]) -> None:
        self._span = span
        self._now_ns = now_ns
        self.trace = _headers(set_span_in_context(span))

    def ended(self, status: int | None, *, job_id: str | None, error: str | None) -> None:
        """End the span. Its status is an error where the response's is one of the server, as the conventions say."""
        attributes: dict[str, AttributeValue | None] = {
            names.HTTP_STATUS: status,
            names.JOB_ID: job_id,
            names.ERROR_TYPE: _DISCONNECTED if status is None else error,
        }
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if status is not None and status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(self._now_ns())


def server_of(base_url: str) -> Server:
    """Return the host and the port of a base URL."""
    parts = urlsplit(base_url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _outcome(attempt: Attempt, error: JobError | None) -> tuple[str, JobError | None]:
    if attempt.status is not None:
        return attempt.status.value, attempt.error
    return ("retried", error) if attempt.state is State.WAITING else ("abandoned", None)


def _answer(attempt: Attempt) -> dict[str, AttributeValue | None]:
    """Return the attributes of the upstream's answer."""
    reasons = [truncate(reason, _REASON_BYTES) for reason in attempt.finish_reasons.values()]
    usage = attempt.reported_usage or {}
    return {
        names.GEN_AI_RESPONSE_ID: _name(attempt.chunk.get("id")),
        names.GEN_AI_RESPONSE_MODEL: _name(attempt.chunk.get("model")),
        names.GEN_AI_FINISH_REASONS: reasons[:_MAX_REASONS] or None,
        names.GEN_AI_INPUT_TOKENS: _count(usage.get("prompt_tokens")),
        names.GEN_AI_OUTPUT_TOKENS: _count(usage.get("completion_tokens")),
        names.GEN_AI_CACHED_TOKENS: _detail(usage, "prompt_tokens_details", "cached_tokens"),
        names.GEN_AI_REASONING_TOKENS: _detail(usage, "completion_tokens_details", "reasoning_tokens"),
    }


def _end(span: Span, attributes: Mapping[str, AttributeValue | None], error: str | None, now_ns: int) -> None:
    final = {**attributes, names.ERROR_TYPE: None if error is None else str(error)}
    span.set_attributes({name: value for name, value in final.items() if value is not None})
    if error not in {None, ErrorCode.CANCELLED}:  # a cancellation is not an error
        span.set_status(Status(StatusCode.ERROR))
    span.end(now_ns)


def _headers(context: Context) -> Headers:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context)
    return tuple((name, value.encode()) for name, value in carrier.items())


def _name(value: Any) -> str | None:
    return truncate(value, _NAME_BYTES) if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _MAX_TOKENS else None


def _detail(usage: Mapping[str, Any], group: str, name: str) -> int | None:
    details = usage.get(group)
    return _count(details.get(name)) if isinstance(details, dict) else None
