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


BATCH_BUCKETS = tuple(float(4**n) for n in range(10))
"""Up to three days."""


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

# The reader of the events topic
PARTITIONS_FOLLOWED = _gauge(
    "partitions_followed", "Partitions of the events topic that are read as they grow."
)
REPLAYS = _counter(
    "replays_total",
    "Reads of past events for a client, by where they begin: cursor, place, known (an id seen before), search, or slow (a client that fell behind).",
    "kind",
)
RECORDS_SCANNED = _counter("records_scanned_total", "Records that replays have read from Kafka, of all jobs.")
SEARCHED_RECORDS = _counter(
    "searched_records_total",
    "Records that searches for a job's first event have passed, by outcome: found, empty or not_found.",
    "outcome",
)
SEARCH_DURATION = _histogram(
    "search_duration_seconds",
    "Duration of the search for a job's first event, by outcome: found, empty (no event yet) or not_found.",
    "outcome",
    buckets=COMMIT_BUCKETS,
)
MAILBOX_OVERFLOWS = _counter(
    "mailbox_overflows_total",
    "Streams whose client was slower than the job, and which continued with a replay.",
)
HISTORY_BYTES = _gauge(
    "history_bytes", "Bytes of recent event records in memory, for clients that reconnect."
)

# Batches
BATCHES = _gauge(
    "batches",
    "Batches that the gateway keeps, by status. Every gateway knows all of them and reports the same number.",
    "status",
)
BATCHES_RUNNING = _gauge("batches_running", "Batches that this gateway runs now.")
BATCHES_ENDED = _counter("batches_ended_total", "Batches that this gateway has ended, by status.", "status")
BATCH_DURATION = _histogram(
    "batch_duration_seconds",
    "Time from the creation of a batch to its end, by status.",
    "status",
    buckets=BATCH_BUCKETS,
)
BATCH_LINES = _counter(
    "batch_lines_total", "Lines of batches that have ended, by outcome: completed or failed.", "outcome"
)
BATCH_RUN_FAILURES = _counter(
    "batch_run_failures_total",
    "Runs of batches that failed and start again, by cause: unavailable (Kafka or the store), or crashed, which is a bug.",
    "cause",
)

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
    PARTITIONS_FOLLOWED,
    REPLAYS,
    RECORDS_SCANNED,
    SEARCHED_RECORDS,
    SEARCH_DURATION,
    MAILBOX_OVERFLOWS,
    HISTORY_BYTES,
    BATCHES,
    BATCHES_RUNNING,
    BATCHES_ENDED,
    BATCH_DURATION,
    BATCH_LINES,
    BATCH_RUN_FAILURES,
    UNACKNOWLEDGED,
    KAFKA_FAILURES,
    READY,
    DRAINING,
    LOOP_LAG,
    START_TIME,
    BUILD_INFO,
)
"""Every metric of the gateway, in the order of docs/metrics.md."""
