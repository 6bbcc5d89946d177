"""The table of metrics, and the registry."""

import math
import re
import sys
import timeit
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, Histogram, generate_latest

from streamworker import __version__
from streamworker.telemetry import metrics as table
from streamworker.telemetry.metrics import DURATION_BUCKETS, MAX_SERIES, PREFIX, TABLE, Definition, Metrics


def test_table_follows_the_naming_conventions() -> None:
    assert len({definition.name for definition in TABLE}) == len(TABLE)
    for definition in TABLE:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", definition.name)
        assert definition.name.endswith("_total") == (definition.kind == "counter")
        assert definition.name.endswith(("_seconds", "_records")) or definition.kind != "histogram"
        assert [*definition.buckets] == sorted({*definition.buckets})
        assert definition.help.endswith(".")
        assert not {"job_id", "topic", "user", "message"} & {*definition.labels}
        # Models of jobs are unbounded; this metric has the configured names only.
        assert "model" not in definition.labels or definition is table.JOB_ERRORS


def test_table_has_every_definition() -> None:
    defined = [value for value in vars(table).values() if isinstance(value, Definition)]
    assert defined == [*TABLE]


def test_duration_buckets_are_those_of_opentelemetry() -> None:
    halves = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64], [1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
    assert [*DURATION_BUCKETS] == [*halves[0], *halves[1]]
    for definition in (table.TIME_TO_FIRST_DELTA, table.DELTA_GAP):
        assert definition.buckets == DURATION_BUCKETS
    assert table.JOB_DURATION.buckets[: len(DURATION_BUCKETS)] == DURATION_BUCKETS


def test_page_has_every_metric_after_use() -> None:
    metrics = Metrics()
    use: dict[str, Any] = {"counter": metrics.add, "gauge": metrics.set, "histogram": metrics.observe}
    for definition in TABLE:
        labels = ["x" for _ in definition.labels]
        if definition.is_tallied:
            metrics.tally(definition, *labels).add(1)
        else:
            use[definition.kind](definition, 1, *labels)
    page = generate_latest(metrics.registry).decode()
    for definition in TABLE:
        name = PREFIX + definition.name
        assert f"# HELP {name} {definition.help}\n# TYPE {name} {definition.kind}\n" in page
        assert re.search(rf"^{name}(_bucket)?[{{ ]", page, re.MULTILINE)
    assert "_created" not in page


def test_two_registries_share_no_series() -> None:
    one, other = Metrics(), Metrics()
    one.add(table.TOMBSTONES, 2)
    one.tally(table.DELTA_GAP, "default").add(1)
    assert one.registry.get_sample_value("streamworker_tombstones_total") == 2
    assert other.registry.get_sample_value("streamworker_tombstones_total") == 0
    assert (
        other.registry.get_sample_value("streamworker_delta_gap_seconds_sum", {"upstream": "default"}) is None
    )
    assert b"streamworker" not in generate_latest(REGISTRY)


def test_page_has_build_info_and_process_metrics() -> None:
    page = generate_latest(Metrics().registry).decode()
    assert f'version="{__version__}"' in page
    assert sys.platform != "linux" or re.search(r"^process_resident_memory_bytes [1-9]", page, re.MULTILINE)


@given(st.lists(st.floats(0, 200), min_size=1))
def test_tally_gives_the_same_samples_as_the_library(values: list[float]) -> None:
    """The same values are counted in the same buckets, boundaries included."""
    metrics = Metrics()
    library = Histogram("library", "", registry=metrics.registry, buckets=DURATION_BUCKETS)
    for value in values:
        metrics.tally(table.DELTA_GAP, "default").add(value)
        library.observe(value)
    samples = [
        {
            (sample.name.rpartition("_")[2], sample.labels.get("le")): sample.value
            for metric in metrics.registry.collect()
            for sample in metric.samples
            if metric.name == name
        }
        for name in ("streamworker_delta_gap_seconds", "library")
    ]

    assert len(samples[0]) == len(DURATION_BUCKETS) + 3
    assert samples[0] == samples[1]


def test_tally_takes_less_than_half_the_time_of_the_library() -> None:
    """Speed is the reason for the class: it is updated with every delta."""
    metrics = Metrics()
    tally = metrics.tally(table.DELTA_GAP, "default")
    library = Histogram("library", "", registry=metrics.registry, buckets=DURATION_BUCKETS)
    seconds = [
        min(timeit.repeat(partial(add, 0.03), number=2000, repeat=5)) for add in (tally.add, library.observe)
    ]

    assert seconds[0] < seconds[1] / 2


def test_hook_is_called_before_each_scrape() -> None:
    metrics = Metrics()
    metrics.before_scrape(lambda: metrics.add(table.TOMBSTONES, 2))
    pages = [generate_latest(metrics.registry).decode() for _ in range(2)]
    assert "streamworker_tombstones_total 2.0" in pages[0]
    assert "streamworker_tombstones_total 4.0" in pages[1]


def test_label_with_too_many_values_is_counted_as_other() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES + 50):
        metrics.add(table.JOBS_ABANDONED, 1, f"reason {number}")
    metrics.add(table.JOBS_ABANDONED, 1, "reason 1")
    page = generate_latest(metrics.registry).decode()
    assert page.count("streamworker_jobs_abandoned_total{") == MAX_SERIES + 1
    assert 'streamworker_jobs_abandoned_total{reason="other"} 50.0' in page
    assert 'streamworker_jobs_abandoned_total{reason="reason 1"} 2.0' in page


def test_gauge_whose_read_fails_is_nan() -> None:
    metrics, values = Metrics(), [3.0]
    metrics.track(table.UNACKNOWLEDGED, values.pop)
    assert metrics.registry.get_sample_value("streamworker_sink_unacknowledged_bytes") == 3
    failed = metrics.registry.get_sample_value("streamworker_sink_unacknowledged_bytes")
    assert failed is not None
    assert math.isnan(failed)

    metrics.track(table.STREAMS_OPEN, lambda: 2, "default")
    labels = {"upstream": "default"}
    assert metrics.registry.get_sample_value("streamworker_upstream_streams_open", labels) == 2


def test_operation_of_another_kind_raises() -> None:
    with pytest.raises(AssertionError):
        Metrics().add(table.JOBS_OPEN)
