"""The table of the gateway's metrics. Names, labels and bounds follow the rules of `metrics`."""

from __future__ import annotations

from streamworker.telemetry.metrics import (
    BUILD_INFO,
    COMMIT_BUCKETS,
    DRAINING,
    JOB_BUCKETS,
    KAFKA_FAILURES,
    LOOP_LAG,
    READY,
    START_TIME,
    UNACKNOWLEDGED,
    Definition,
)

__all__ = [
    "DRAINING",
    "GATEWAY_TABLE",
    "KAFKA_FAILURES",
    "LOOP_LAG",
    "READY",
    "UNACKNOWLEDGED",
]


def _counter(name: str, help_: str, *labels: str) -> Definition:
    return Definition("counter", f"gateway_{name}", help_, labels)


def _gauge(name: str, help_: str, *labels: str) -> Definition:
    return Definition("gauge", f"gateway_{name}", help_, labels)


def _histogram(name: str, help_: str, *labels: str, buckets: tuple[float, ...]) -> Definition:
    return Definition("histogram", f"gateway_{name}", help_, labels, buckets)


# Requests
REQUESTS = _counter(
    "requests_total", "Requests answered, streams and websockets included.", "route", "method", "status"
)
REQUEST_DURATION = _histogram(
    "request_duration_seconds",
    "Time from a request's headers to the end of its response, but for event streams and websockets.",
    "route",
    buckets=JOB_BUCKETS,
)
ERRORS = _counter("errors_total", "Errors that clients were told, by code.", "code")
AUTH_FAILURES = _counter(
    "auth_failures_total", "Requests and websockets without a valid credential, or without the scope.", "code"
)
CONNECTIONS = _gauge("connections", "Open TCP connections.")

# Jobs
JOBS_SUBMITTED = _counter("jobs_submitted_total", "Jobs that Kafka acknowledged.", "face")
SUBMIT_DURATION = _histogram(
    "submit_duration_seconds",
    "Time from writing a job to its acknowledgement by all in-sync replicas.",
    buckets=COMMIT_BUCKETS,
)
JOBS_JOINED = _counter(
    "jobs_joined_total",
    "Requests that were answered with an earlier job: idempotency for an Idempotency-Key, retry for an SDK's retry.",
    "cause",
)
CANCELS_WRITTEN = _counter("cancels_written_total", "Cancel records that Kafka acknowledged.", "face")

# Streams
STREAMS_OPEN = _gauge("streams_open", "Open event streams, chat completions and websockets.", "face")
STREAMS_CLOSED = _counter(
    "streams_closed_total",
    "Event streams, websockets and subscriptions that ended, by reason.",
    "face",
    "reason",
)
SUBSCRIPTIONS = _gauge("subscriptions", "Jobs that clients follow now, each client counted.")
EVENTS_DELIVERED = _counter("events_delivered_total", "Events written to clients.", "face")

GATEWAY_TABLE = (
    REQUESTS,
    REQUEST_DURATION,
    ERRORS,
    AUTH_FAILURES,
    CONNECTIONS,
    JOBS_SUBMITTED,
    SUBMIT_DURATION,
    JOBS_JOINED,
    CANCELS_WRITTEN,
    STREAMS_OPEN,
    STREAMS_CLOSED,
    SUBSCRIPTIONS,
    EVENTS_DELIVERED,
    UNACKNOWLEDGED,
    KAFKA_FAILURES,
    READY,
    DRAINING,
    LOOP_LAG,
    START_TIME,
    BUILD_INFO,
)
"""Every metric of the gateway, in the order of docs/metrics.md."""
