"""Metrics: one table, and what keeps it. Names follow Prometheus' conventions: base units, counters end in `_total`.

Labels are bounded: statuses, codes, configured upstreams, reasons. Never a job's id, never free text.
"""

from __future__ import annotations

import math
import platform
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from streamworker import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

__all__ = ["DURATION_BUCKETS", "MAX_SERIES", "OTHER", "PREFIX", "TABLE", "Definition", "Metrics", "Tally"]

PREFIX = "streamworker_"

OTHER = "other"
"""The label value for what is not one of the known ones."""

MAX_SERIES = 1000
"""Series per metric. A label that turns out to be unbounded costs this much memory and no more."""

DURATION_BUCKETS = tuple(0.01 * 2**n for n in range(14))
"""0.01 s to 81.92 s, as OpenTelemetry's GenAI client metrics have them."""

JOB_BUCKETS = (*DURATION_BUCKETS, *(81.92 * 2**n for n in range(1, 6)))
"""The same and on to 44 minutes: reasoning takes its time."""

QUEUE_BUCKETS = tuple(0.01 * 4**n for n in range(12))
"""0.01 s to half a day: a queue may be a night's work."""

COMMIT_BUCKETS = tuple(0.001 * 2**n for n in range(15))
"""1 ms to 16 s: what a broker takes to write."""

SIZE_BUCKETS = tuple(float(4**n) for n in range(6))
"""1 to 1024 records."""


@dataclass(frozen=True, eq=False)
class Definition:
    """One metric, without the prefix. Compared by identity: it is a key."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = DURATION_BUCKETS
    is_tallied: bool = False
    """A histogram that is filled with every delta: kept as `Tally`, for the library's lock costs more than the rest."""


def _counter(name: str, help_: str, *labels: str) -> Definition:
    return Definition("counter", name, help_, labels)


def _gauge(name: str, help_: str, *labels: str) -> Definition:
    return Definition("gauge", name, help_, labels)


def _histogram(
    name: str, help_: str, *labels: str, buckets: tuple[float, ...], is_tallied: bool = False
) -> Definition:
    return Definition("histogram", name, help_, labels, buckets, is_tallied)


# Jobs
JOBS_STARTED = _counter("jobs_started_total", "Jobs taken up.", "upstream")
ATTEMPTS = _counter(
    "attempts_total", "Attempts begun: more than jobs where streams broke or we crashed.", "upstream"
)
JOBS_ENDED = _counter("jobs_ended_total", "Terminal events, all durable.", "upstream", "status")
JOB_ERRORS = _counter("job_errors_total", "Terminal events that carry an error.", "code")
JOB_CRASHES = _counter("job_crashes_total", "Attempts that ended by a bug of ours and were begun anew.")
JOBS_ABANDONED = _counter(
    "jobs_abandoned_total", "Jobs let go without a terminal event, for their next owner.", "reason"
)
JOBS_OPEN = _gauge("jobs_open", "Jobs taken up and not ended.")
OLDEST_JOB = _gauge(
    "oldest_job_age_seconds", "How long the oldest open job has been open here; 0 without one."
)
QUEUE = _histogram(
    "queue_seconds", "From the job record's timestamp to the job being taken up.", buckets=QUEUE_BUCKETS
)
JOB_DURATION = _histogram(
    "job_duration_seconds",
    "From the attempt's start to its terminal event.",
    "upstream",
    "status",
    buckets=JOB_BUCKETS,
)
TOKENS = _counter(
    "tokens_total", "Tokens in terminal events, by who counted them.", "upstream", "kind", "source"
)

# Records that are no jobs, or none any more
DEAD_LETTERS = _counter("dead_letters_total", "Records written to the dead-letter topic.", "code")
TOMBSTONES = _counter("tombstones_total", "Records without a value, passed over.")
RECORDS_SKIPPED = _counter(
    "records_skipped_total",
    "Records delivered again whose job had ended or was running: duplicates that were avoided.",
)

# Upstreams
TIME_TO_FIRST_DELTA = _histogram(
    "time_to_first_delta_seconds",
    "From the attempt's start to its first delta.",
    "upstream",
    buckets=DURATION_BUCKETS,
)
DELTA_GAP = _histogram(
    "delta_gap_seconds",
    "From one read of a stream that brought deltas to the next one.",
    "upstream",
    buckets=DURATION_BUCKETS,
    is_tallied=True,
)
RETRIES = _counter("retries_total", "Tries that failed and were followed by another.", "upstream", "code")
FALLBACKS = _counter("fallbacks_total", "Jobs that went to their upstream's stand-in.", "upstream")
CIRCUIT_STATE = _gauge("upstream_circuit_state", "0 closed, 1 half-open, 2 open: no calls.", "upstream")
CIRCUITS_OPENED = _counter("circuits_opened_total", "Times that an upstream's circuit opened.", "upstream")
STREAMS_OPEN = _gauge("upstream_streams_open", "Calls to the upstream that are open.", "upstream")
STREAMS_LIMIT = _gauge(
    "upstream_streams_limit", "Calls that may be open to the upstream at once.", "upstream"
)
UPSTREAM_WAITING = _gauge(
    "upstream_jobs_waiting", "Jobs that wait for their turn at the upstream.", "upstream"
)

# What is written
EVENTS = _counter("events_total", "Events handed to Kafka, by type.", "type")
EVENT_BYTES = _counter("event_bytes_total", "Payload of those events, before compression.", "type")
BATCH_SECONDS = _histogram(
    "sink_batch_seconds", "From a batch of deltas being sent to its acknowledgement.", buckets=COMMIT_BUCKETS
)
BATCH_RECORDS = _histogram("sink_batch_records", "Records of a batch.", buckets=SIZE_BUCKETS)
UNACKNOWLEDGED = _gauge(
    "sink_unacknowledged_bytes", "Bytes handed to the sink that the broker has not acknowledged."
)
COMMIT_SECONDS = _histogram(
    "commit_seconds",
    "From a commit's begin until it is durable, tries included.",
    buckets=COMMIT_BUCKETS,
)
COMMIT_RECORDS = _histogram("commit_records", "Records of a commit.", buckets=SIZE_BUCKETS)
COMMIT_BUSY = _gauge("commit_busy_seconds", "How long the slowest commit under way has been under way.")
COMMIT_WAITING = _gauge("commit_waiting", "Beginnings and ends of jobs that wait to be committed.")
KAFKA_FAILURES = _counter("kafka_failures_total", "Requests to Kafka that failed and are made again.", "part")

# The group
PARTITIONS_OWNED = _gauge("partitions_owned", "Job partitions assigned to this worker.")
PARTITIONS_OPENING = _gauge("partitions_opening", "Job partitions assigned and not taken over yet.")
PARTITIONS_FENCED = _counter(
    "partitions_fenced_total", "Times that another worker shut us out of a partition."
)
REBALANCES = _counter("rebalances_total", "Rebalances that ended.")
REBALANCE_SECONDS = _histogram(
    "rebalance_seconds",
    "From the group calling its members together to the new assignment: nothing is taken up meanwhile.",
    buckets=JOB_BUCKETS,
)
HEARTBEAT_AGE = _gauge(
    "group_heartbeat_age_seconds", "How long ago the group's coordinator last answered a heartbeat."
)
RECORDS_BEHIND = _gauge(
    "records_behind", "Records of our partitions not taken up, as of the last answer of the broker."
)
OFFSET_MAP_FILL = _gauge(
    "offset_map_fill_ratio",
    "Size of the largest offset map, of what a commit can hold. From 0.75 its partition takes nothing up.",
)

# The process
READY = _gauge("ready", "1 if jobs are taken up, as /readyz says.")
DRAINING = _gauge("draining_seconds", "How long the drain has lasted; 0 before.")
POLL_AGE = _gauge("poll_age_seconds", "How long ago the poll loop last turned.")
LOOP_LAG = _gauge("event_loop_lag_seconds", "The latest that the event loop lately came to what was due.")
START_TIME = _gauge("start_time_seconds", "When this process started, in seconds since the epoch.")
BUILD_INFO = _gauge("build_info", "Always 1; the labels say what runs.", "version", "python")

TABLE = (
    JOBS_STARTED,
    ATTEMPTS,
    JOBS_ENDED,
    JOB_ERRORS,
    JOB_CRASHES,
    JOBS_ABANDONED,
    JOBS_OPEN,
    OLDEST_JOB,
    QUEUE,
    JOB_DURATION,
    TOKENS,
    DEAD_LETTERS,
    TOMBSTONES,
    RECORDS_SKIPPED,
    TIME_TO_FIRST_DELTA,
    DELTA_GAP,
    RETRIES,
    FALLBACKS,
    CIRCUIT_STATE,
    CIRCUITS_OPENED,
    STREAMS_OPEN,
    STREAMS_LIMIT,
    UPSTREAM_WAITING,
    EVENTS,
    EVENT_BYTES,
    BATCH_SECONDS,
    BATCH_RECORDS,
    UNACKNOWLEDGED,
    COMMIT_SECONDS,
    COMMIT_RECORDS,
    COMMIT_BUSY,
    COMMIT_WAITING,
    KAFKA_FAILURES,
    PARTITIONS_OWNED,
    PARTITIONS_OPENING,
    PARTITIONS_FENCED,
    REBALANCES,
    REBALANCE_SECONDS,
    HEARTBEAT_AGE,
    RECORDS_BEHIND,
    OFFSET_MAP_FILL,
    READY,
    DRAINING,
    POLL_AGE,
    LOOP_LAG,
    START_TIME,
    BUILD_INFO,
)
"""Every metric there is. Documentation and tests read it."""


class Tally:
    """One series of a histogram, for one thread: adding costs a search among its buckets and nothing else."""

    __slots__ = ("_buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        """Values per bucket, not cumulative; the last one is for those above all."""
        self.total = 0.0

    def add(self, value: float) -> None:
        """Put a value in."""
        self.counts[bisect_left(self._buckets, value)] += 1
        self.total += value


class Metrics:
    """The table's metrics on one registry. Labels are given in the order of their definition."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._hooks: list[Callable[[], None]] = []
        self.registry.register(_Hooks(self._hooks))  # the first one, so that the others show what it brings
        # `_created` would double the series; START_TIME says since when they count.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        ProcessCollector(registry=self.registry)
        self._metrics = {
            definition: _create(definition, self.registry)
            for definition in TABLE
            if not definition.is_tallied
        }
        self._tallies = {definition: _Tallies(definition) for definition in TABLE if definition.is_tallied}
        for tallies in self._tallies.values():
            self.registry.register(tallies)
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

    def tally(self, definition: Definition, *labels: str) -> Tally:
        """Return a series to put values into, of a histogram that is tallied. Labels have to be bounded by the caller."""
        return self._tallies[definition].series(labels)

    def track(self, definition: Definition, read: Callable[[], float], *labels: str) -> None:
        """Let a gauge read its value when it is scraped. If `read` raises, the value is NaN."""
        gauge = self._child(definition, labels)
        assert isinstance(gauge, Gauge)
        gauge.set_function(lambda: _value(read))

    def before_scrape(self, hook: Callable[[], None]) -> None:
        """Call this before each scrape: what is too frequent to be counted one by one is added then."""
        self._hooks.append(hook)

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


class _Hooks(Collector):
    def __init__(self, hooks: list[Callable[[], None]]) -> None:
        self._hooks = hooks

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for hook in self._hooks:
            hook()
        return iter(())


class _Tallies(Collector):
    def __init__(self, definition: Definition) -> None:
        self._definition = definition
        self._series: dict[tuple[str, ...], Tally] = {}

    def series(self, labels: tuple[str, ...]) -> Tally:
        return self._series.setdefault(labels, Tally(self._definition.buckets))

    def describe(self) -> list[Metric]:
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        bounds = [*map(str, self._definition.buckets), "+Inf"]
        for labels, tally in self._series.items():
            family.add_metric(labels, list(zip(bounds, accumulate(tally.counts), strict=True)), tally.total)
        yield family

    def _family(self) -> HistogramMetricFamily:
        definition = self._definition
        return HistogramMetricFamily(PREFIX + definition.name, definition.help, labels=definition.labels)


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
