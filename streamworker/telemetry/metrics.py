"""Metrics: one table, and what keeps it. Names follow Prometheus' conventions: base units, counters end in `_total`.

Labels are bounded: statuses, codes, configured upstreams, reasons. Never a job's id, never free text.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from streamworker import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DURATION_BUCKETS", "MAX_SERIES", "OTHER", "PREFIX", "TABLE", "Definition", "Metrics"]

PREFIX = "streamworker_"

OTHER = "other"
"""The label value for what is not one of the known ones."""

MAX_SERIES = 1000
"""Series per metric. A label that turns out to be unbounded costs this much memory and no more."""

DURATION_BUCKETS = tuple(0.01 * 2**n for n in range(14))
"""0.01 s to 81.92 s, as OpenTelemetry's GenAI client metrics have them."""


@dataclass(frozen=True, eq=False)
class Definition:
    """One metric, without the prefix. Compared by identity: it is a key."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = DURATION_BUCKETS


JOBS_STARTED = Definition("counter", "jobs_started_total", "Jobs taken up.", ("upstream",))
JOBS_ENDED = Definition(
    "counter", "jobs_ended_total", "Terminal events, all durable.", ("upstream", "status")
)
JOB_ERRORS = Definition("counter", "job_errors_total", "Terminal events that carry an error.", ("code",))
DELTAS = Definition("counter", "deltas_total", "Delta events handed to the sink.")
TOKENS = Definition(
    "counter",
    "tokens_total",
    "Tokens in terminal events, by who counted them.",
    ("upstream", "kind", "source"),
)
RETRIES = Definition(
    "counter", "retries_total", "Tries that failed and were followed by another.", ("upstream", "code")
)
FALLBACKS = Definition(
    "counter",
    "fallbacks_total",
    "Jobs that this upstream failed and the next of its list was called for.",
    ("upstream",),
)
CIRCUITS_OPENED = Definition(
    "counter", "circuits_opened_total", "Times that an upstream was found dead.", ("upstream",)
)
CIRCUIT_STATE = Definition(
    "gauge",
    "upstream_circuit_state",
    "0 closed, 1 half-open (probing), 2 open (thought dead).",
    ("upstream",),
)
STREAMS_OPEN = Definition("gauge", "upstream_streams_open", "Calls that are open.", ("upstream",))
STREAMS_LIMIT = Definition(
    "gauge",
    "upstream_streams_limit",
    "Calls that may be open; less than configured after 429s.",
    ("upstream",),
)
JOBS_WAITING = Definition(
    "gauge",
    "upstream_jobs_waiting",
    "Jobs that wait for this upstream's limits or its recovery.",
    ("upstream",),
)
DEAD_LETTERS = Definition(
    "counter", "dead_letters_total", "Records written to the dead-letter topic.", ("code",)
)
TOMBSTONES = Definition("counter", "tombstones_total", "Records without a value, passed over.")
RECORDS_SKIPPED = Definition(
    "counter", "records_skipped_total", "Records delivered again whose job had ended or was running."
)
JOBS_ABANDONED = Definition(
    "counter",
    "jobs_abandoned_total",
    "Jobs let go without a terminal event, for their next owner.",
    ("reason",),
)
JOBS_OPEN = Definition("gauge", "jobs_open", "Jobs taken up and not ended.")
TIME_TO_FIRST_DELTA = Definition(
    "histogram", "time_to_first_delta_seconds", "From the attempt's start to its first delta.", ("upstream",)
)
JOB_DURATION = Definition(
    "histogram",
    "job_duration_seconds",
    "From the attempt's start to its terminal event.",
    ("upstream", "status"),
)
QUEUE = Definition("histogram", "queue_seconds", "From the job record's timestamp to the attempt's start.")
REBALANCES = Definition("counter", "rebalances_total", "Rebalances that ended.")
PARTITIONS_OWNED = Definition("gauge", "partitions_owned", "Job partitions assigned to this worker.")
UNACKNOWLEDGED = Definition(
    "gauge", "sink_unacknowledged_bytes", "Bytes handed to the sink that the broker has not acknowledged."
)
LOOP_LAG = Definition(
    "gauge", "event_loop_lag_seconds", "The latest that the event loop lately came to what was due."
)
BUILD_INFO = Definition("gauge", "build_info", "Always 1; the labels say what runs.", ("version", "python"))

TABLE = (
    JOBS_STARTED,
    JOBS_ENDED,
    JOB_ERRORS,
    DELTAS,
    TOKENS,
    RETRIES,
    FALLBACKS,
    CIRCUITS_OPENED,
    CIRCUIT_STATE,
    STREAMS_OPEN,
    STREAMS_LIMIT,
    JOBS_WAITING,
    DEAD_LETTERS,
    TOMBSTONES,
    RECORDS_SKIPPED,
    JOBS_ABANDONED,
    JOBS_OPEN,
    TIME_TO_FIRST_DELTA,
    JOB_DURATION,
    QUEUE,
    REBALANCES,
    PARTITIONS_OWNED,
    UNACKNOWLEDGED,
    LOOP_LAG,
    BUILD_INFO,
)
"""Every metric there is. Documentation and tests read it."""


class Metrics:
    """The table's metrics on one registry. Labels are given in the order of their definition."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        # `_created` would double the series; a process start time is on record elsewhere.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._metrics = {definition: _create(definition, self.registry) for definition in TABLE}
        # `labels()` takes a lock and builds a key at each call.
        self._children: dict[tuple[Definition, tuple[str, ...]], Counter | Gauge | Histogram] = {}
        self._series = dict.fromkeys(TABLE, 0)
        self.set(BUILD_INFO, 1, __version__, platform.python_version())

    def add(self, definition: Definition, amount: float = 1, *labels: str) -> None:
        """Count. A series that is added 0 to exists from then on."""
        child = self._child(definition, labels)
        assert isinstance(child, Counter)
        child.inc(amount)

    def set(self, definition: Definition, value: float, *labels: str) -> None:
        """Set a gauge."""
        child = self._child(definition, labels)
        assert isinstance(child, Gauge)
        child.set(value)

    def observe(self, definition: Definition, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        child = self._child(definition, labels)
        assert isinstance(child, Histogram)
        child.observe(value)

    def track(self, definition: Definition, read: Callable[[], float], *labels: str) -> None:
        """Let a gauge read its value when it is scraped. If `read` raises, the value is NaN."""
        gauge = self._child(definition, labels)
        assert isinstance(gauge, Gauge)
        gauge.set_function(lambda: _value(read))

    def _child(self, definition: Definition, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        child = self._children.get((definition, labels))
        return child or self._new_child(definition, labels)

    def _new_child(self, definition: Definition, labels: tuple[str, ...]) -> Counter | Gauge | Histogram:
        metric = self._metrics[definition]
        if self._series[definition] >= MAX_SERIES:
            return metric.labels(*(OTHER,) * len(labels))
        self._series[definition] += 1
        child = metric.labels(*labels) if labels else metric
        self._children[definition, labels] = child
        return child


def _create(definition: Definition, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    name, help_, labels = PREFIX + definition.name, definition.help, definition.labels
    match definition.kind:
        case "counter":
            return Counter(name, help_, labels, registry=registry)
        case "gauge":
            return Gauge(name, help_, labels, registry=registry)
        case "histogram":
            return Histogram(name, help_, labels, registry=registry, buckets=definition.buckets)


def _value(read: Callable[[], float]) -> float:
    try:
        return read()
    except Exception:  # noqa: BLE001 - one gauge must not take the whole page down
        return math.nan
