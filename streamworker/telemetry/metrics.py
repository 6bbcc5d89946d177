"""The table of all metrics, and the registry that holds them. Names follow Prometheus' conventions.

Label values are bounded: statuses, error codes, configured upstreams and models, reasons. No job id or free text is a label.
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
"""The label value that replaces unknown values."""

MAX_SERIES = 1000
"""Maximum number of series per metric. It bounds the memory that a label with unexpected values can take."""

DURATION_BUCKETS = tuple(0.01 * 2**n for n in range(14))
"""0.01 s to 81.92 s: the buckets of OpenTelemetry's GenAI client metrics."""

JOB_BUCKETS = (*DURATION_BUCKETS, *(81.92 * 2**n for n in range(1, 6)))
"""0.01 s to 44 minutes: reasoning models can take that long."""

QUEUE_BUCKETS = tuple(0.01 * 4**n for n in range(12))
"""0.01 s to half a day: a backlog may last a night."""

COMMIT_BUCKETS = tuple(0.001 * 2**n for n in range(15))
"""1 ms to 16 s: from one fast write of a broker to several tries."""

SIZE_BUCKETS = tuple(float(4**n) for n in range(6))
"""1 to 1024 records."""


@dataclass(frozen=True, eq=False)
class Definition:
    """One metric; `name` has no prefix. Compared by identity, because it is used as a key."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = DURATION_BUCKETS
    is_tallied: bool = False
    """Whether the histogram is a `Tally`: it is updated with every delta, and the library's lock would be too slow."""


def _counter(name: str, help_: str, *labels: str) -> Definition:
    return Definition("counter", name, help_, labels)


def _gauge(name: str, help_: str, *labels: str) -> Definition:
    return Definition("gauge", name, help_, labels)


def _histogram(
    name: str, help_: str, *labels: str, buckets: tuple[float, ...], is_tallied: bool = False
) -> Definition:
    return Definition("histogram", name, help_, labels, buckets, is_tallied)


# Jobs
JOBS_STARTED = _counter("jobs_started_total", "Jobs whose first attempt started.", "upstream")
ATTEMPTS = _counter(
    "attempts_total", "Attempts started; more than jobs if streams broke or an attempt crashed.", "upstream"
)
JOBS_ENDED = _counter("jobs_ended_total", "Durable terminal events.", "upstream", "status")
JOB_ERRORS = _counter(
    "job_errors_total",
    "Durable terminal events with an error. model is a name that the upstream's models list, else other.",
    "upstream",
    "code",
    "model",
)
JOB_CRASHES = _counter(
    "job_crashes_total", "Attempts that ended with an unexpected exception of the worker and were repeated."
)
TELEMETRY_FAILURES = _counter(
    "telemetry_failures_total",
    "Exceptions in logs or metrics after a durable commit, which are bugs; the commit stays, and no job runs again.",
)
JOBS_ABANDONED = _counter(
    "jobs_abandoned_total",
    "Jobs returned without a terminal event, for the next owner of their partition.",
    "reason",
)
JOBS_OPEN = _gauge("jobs_open", "Jobs that have started and not ended.")
OLDEST_JOB = _gauge(
    "oldest_job_age_seconds", "Time since the oldest open job of this worker started; 0 if no job is open."
)
QUEUE_DURATION = _histogram(
    "queue_duration_seconds",
    "Time from the job record's timestamp to the start of its first attempt.",
    buckets=QUEUE_BUCKETS,
)
JOB_DURATION = _histogram(
    "job_duration_seconds",
    "Time from the attempt's start to its terminal event.",
    "upstream",
    "status",
    buckets=JOB_BUCKETS,
)
TOKENS = _counter(
    "tokens_total",
    "Tokens reported in terminal events; source says who counted them.",
    "upstream",
    "kind",
    "source",
)

JOBS_BY_METADATA = _counter(
    "jobs_by_metadata_total",
    "Durable terminal events by the jobs' value of telemetry.label_metadata.",
    "value",
    "status",
)
TOKENS_BY_METADATA = _counter(
    "tokens_by_metadata_total",
    "Tokens reported in terminal events by the jobs' value of telemetry.label_metadata.",
    "value",
    "kind",
)

# Records that do not become jobs
DEAD_LETTERS = _counter("dead_letters_total", "Records written to the dead-letter topic.", "code")
TOMBSTONES = _counter("tombstones_total", "Records without a value, which were skipped.")
RECORDS_SKIPPED = _counter(
    "records_skipped_total",
    "Records fetched again whose job had ended or was running; they were skipped.",
)
DUPLICATES_SKIPPED = _counter(
    "duplicates_skipped_total",
    "Job records that repeated the id of one of the last worker.dedup_records records; they were skipped.",
)
RECORDS_LOST = _counter(
    "records_lost_total",
    "Job offsets that were deleted by retention (retention), or lost by an unclean election or a replaced topic (reset), before their jobs had ended.",
    "reason",
)

CANCELS = _counter(
    "cancels_total", "Cancel records read, by their effect on the open jobs of this worker.", "effect"
)

# Upstreams
TIME_TO_FIRST_DELTA = _histogram(
    "time_to_first_delta_seconds",
    "Time from the attempt's start to its first delta.",
    "upstream",
    buckets=DURATION_BUCKETS,
)
DELTA_GAP = _histogram(
    "delta_gap_seconds",
    "Time between two reads of one stream that brought deltas.",
    "upstream",
    buckets=DURATION_BUCKETS,
    is_tallied=True,
)
RETRIES = _counter("retries_total", "Failed tries that were followed by another try.", "upstream", "code")
FALLBACKS = _counter("fallbacks_total", "Jobs that continued at a fallback of their upstream.", "upstream")
CIRCUIT_STATE = _gauge(
    "upstream_circuit_state", "State of the circuit: 0 closed, 1 half-open, 2 open (no calls).", "upstream"
)
CIRCUITS_OPENED = _counter(
    "circuits_opened_total", "Number of times the upstream's circuit opened.", "upstream"
)
STREAMS_OPEN = _gauge("upstream_streams_open", "Open calls to the upstream.", "upstream")
STREAMS_LIMIT = _gauge("upstream_streams_limit", "Current limit of open calls to the upstream.", "upstream")
UPSTREAM_WAITING = _gauge("upstream_jobs_waiting", "Jobs in the queue of the upstream.", "upstream")
UPSTREAM_HELD = _gauge(
    "upstream_jobs_held",
    "Jobs in the queue of an upstream that is held or limits its calls; 0 if it is not.",
    "upstream",
)
UPSTREAM_HELD_DURATION = _gauge(
    "upstream_held_seconds",
    "Time for which the jobs of an upstream have been held back; 0 if they are not.",
    "upstream",
)

# Records written
EVENTS = _counter("events_total", "Events passed to the Kafka producer, by type.", "type")
EVENT_BYTES = _counter("event_bytes_total", "Bytes of those events, before compression.", "type")
RESULTS = _counter("results_total", "Durable records of the results topic.")
RESULT_BYTES = _counter("result_bytes_total", "Bytes of those records, before compression.")
RESULT_PARTS_OMITTED = _counter(
    "result_parts_omitted_total",
    "Parts of completions that were left out of results, because of kafka.max_result_bytes: logprobs or completion.",
    "part",
)
BATCH_DURATION = _histogram(
    "sink_batch_duration_seconds",
    "Time from sending a batch of deltas to its acknowledgement.",
    buckets=COMMIT_BUCKETS,
    is_tallied=True,
)
BATCH_RECORDS = _histogram(
    "sink_batch_records", "Records per batch of deltas.", buckets=SIZE_BUCKETS, is_tallied=True
)
UNACKNOWLEDGED = _gauge("sink_unacknowledged_bytes", "Bytes of events that no broker has acknowledged yet.")
COMMIT_DURATION = _histogram(
    "commit_duration_seconds",
    "Time from the start of a commit until it is durable, including failed tries.",
    buckets=COMMIT_BUCKETS,
)
COMMIT_RECORDS = _histogram("commit_records", "Records per commit.", buckets=SIZE_BUCKETS)
COMMIT_IN_PROGRESS = _gauge(
    "commit_in_progress_seconds", "Age of the oldest commit in progress; 0 if none is."
)
COMMIT_PENDING = _gauge("commit_pending_entries", "Starts and ends of jobs that wait for a commit.")
KAFKA_FAILURES = _counter(
    "kafka_failures_total", "Failed requests to Kafka that are repeated, by the part of the worker.", "part"
)

# The consumer group
PARTITIONS_OWNED = _gauge("partitions_owned", "Job partitions assigned to this worker.")
PARTITIONS_OPENING = _gauge("partitions_opening", "Job partitions that are assigned and not open yet.")
PARTITIONS_FENCED = _counter(
    "partitions_fenced_total", "Number of times another worker fenced this one on a partition."
)
REBALANCES = _counter("rebalances_total", "Completed rebalances.")
REBALANCE_DURATION = _histogram(
    "rebalance_duration_seconds",
    "Rebalance duration, from revocation to assignment. No records are fetched meanwhile.",
    buckets=JOB_BUCKETS,
)
MOVES_DEFERRED = _counter(
    "moves_deferred_total", "Partitions that could not move at once, because they had open jobs."
)
MOVES_WAITING = _gauge(
    "moves_waiting", "Partitions that move to another worker when their open jobs have ended."
)
MOVE_WAIT = _histogram(
    "move_wait_seconds",
    "Time from the promise of a partition to its move. Its new jobs wait meanwhile.",
    buckets=JOB_BUCKETS,
)
MOVES_FORCED = _counter(
    "moves_forced_total",
    "Promised partitions that moved although they had open jobs, after worker.move_timeout_s.",
)
STREAMS_CUT = _counter(
    "streams_cut_total", "Begun jobs whose partition was lost; another worker repeats their calls."
)
HEARTBEAT_AGE = _gauge(
    "group_heartbeat_age_seconds", "Time since the group coordinator last answered a heartbeat."
)
RECORDS_BEHIND = _gauge(
    "records_behind", "Records in the assigned partitions that were not accepted yet, as of the last fetch."
)
OFFSET_MAP_FILL = _gauge(
    "offset_map_fill_ratio",
    "Size of the largest offset map relative to what a commit can hold. From 0.75 its partition accepts no jobs.",
)

# The process
READY = _gauge("ready", "1 if the worker accepts jobs, as /readyz reports.")
DRAINING = _gauge("draining_seconds", "Time since the drain began; 0 before.")
POLL_AGE = _gauge("poll_age_seconds", "Time since the last iteration of the poll loop.")
LOOP_LAG = _gauge("event_loop_lag_seconds", "Maximum event-loop delay over the last 15 s, in seconds.")
START_TIME = _gauge("start_time_seconds", "Start time of the process, in seconds since the epoch.")
BUILD_INFO = _gauge(
    "build_info", "Always 1; the labels have the versions of streamworker and Python.", "version", "python"
)

TABLE = (
    JOBS_STARTED,
    ATTEMPTS,
    JOBS_ENDED,
    JOB_ERRORS,
    JOB_CRASHES,
    TELEMETRY_FAILURES,
    JOBS_ABANDONED,
    JOBS_OPEN,
    OLDEST_JOB,
    QUEUE_DURATION,
    JOB_DURATION,
    TOKENS,
    JOBS_BY_METADATA,
    TOKENS_BY_METADATA,
    DEAD_LETTERS,
    TOMBSTONES,
    RECORDS_SKIPPED,
    DUPLICATES_SKIPPED,
    RECORDS_LOST,
    CANCELS,
    TIME_TO_FIRST_DELTA,
    DELTA_GAP,
    RETRIES,
    FALLBACKS,
    CIRCUIT_STATE,
    CIRCUITS_OPENED,
    STREAMS_OPEN,
    STREAMS_LIMIT,
    UPSTREAM_WAITING,
    UPSTREAM_HELD,
    UPSTREAM_HELD_DURATION,
    EVENTS,
    EVENT_BYTES,
    RESULTS,
    RESULT_BYTES,
    RESULT_PARTS_OMITTED,
    BATCH_DURATION,
    BATCH_RECORDS,
    UNACKNOWLEDGED,
    COMMIT_DURATION,
    COMMIT_RECORDS,
    COMMIT_IN_PROGRESS,
    COMMIT_PENDING,
    KAFKA_FAILURES,
    PARTITIONS_OWNED,
    PARTITIONS_OPENING,
    PARTITIONS_FENCED,
    REBALANCES,
    REBALANCE_DURATION,
    MOVES_DEFERRED,
    MOVES_WAITING,
    MOVE_WAIT,
    MOVES_FORCED,
    STREAMS_CUT,
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
"""Every metric, in the order of docs/metrics.md."""


class Tally:
    """One series of a histogram, without a lock: only one thread may add values."""

    __slots__ = ("_buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        """Values per bucket, not cumulative; the last one counts values above every bound."""
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self._buckets, value)] += 1
        self.total += value


class Metrics:
    """The metrics of a table in one registry. Label values are passed in the order of their definition."""

    def __init__(
        self, registry: CollectorRegistry | None = None, table: tuple[Definition, ...] = TABLE
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._hooks: list[Callable[[], None]] = []
        self.registry.register(
            _Hooks(self._hooks)
        )  # the first collector, so that its updates are in the same scrape
        # `_created` would double the number of series; START_TIME has the same information.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        ProcessCollector(registry=self.registry)
        self._metrics = {
            definition: _create(definition, self.registry)
            for definition in table
            if not definition.is_tallied
        }
        self._tallies = {definition: _Tallies(definition) for definition in table if definition.is_tallied}
        for tallies in self._tallies.values():
            self.registry.register(tallies)
        # `labels()` takes a lock and builds a key at each call.
        self._children: dict[tuple[Definition, tuple[str, ...]], Counter | Gauge | Histogram] = {}
        self._series = dict.fromkeys(table, 0)
        self.set(BUILD_INFO, 1, __version__, platform.python_version())

    def add(self, definition: Definition, amount: float = 1, *labels: str) -> None:
        """Increase a counter. Adding 0 creates its series."""
        child = self._child(definition, labels)
        assert isinstance(child, Counter)
        child.inc(amount)

    def set(self, definition: Definition, value: float, *labels: str) -> None:
        """Set a gauge."""
        child = self._child(definition, labels)
        assert isinstance(child, Gauge)
        child.set(value)

    def observe(self, definition: Definition, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        child = self._child(definition, labels)
        assert isinstance(child, Histogram)
        child.observe(value)

    def tally(self, definition: Definition, *labels: str) -> Tally:
        """Return one series of a tallied histogram. The caller bounds the number of label values."""
        return self._tallies[definition].series(labels)

    def track(self, definition: Definition, read: Callable[[], float], *labels: str) -> None:
        """Set a gauge from `read()` at every scrape. If `read` raises, the value is NaN."""
        gauge = self._child(definition, labels)
        assert isinstance(gauge, Gauge)
        gauge.set_function(lambda: _value(read))

    def before_scrape(self, hook: Callable[[], None]) -> None:
        """Call `hook` before each scrape, to add what is too frequent to be counted one by one."""
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
    except Exception:  # noqa: BLE001 - one gauge must not make the whole page fail
        return math.nan
