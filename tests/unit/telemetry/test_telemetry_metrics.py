"""The table of metrics, and what is kept of it."""

import math
import re
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest

from streamworker import __version__
from streamworker.telemetry import metrics as table
from streamworker.telemetry.metrics import DURATION_BUCKETS, MAX_SERIES, PREFIX, TABLE, Definition, Metrics


def test_names_follow_the_conventions() -> None:
    assert len({definition.name for definition in TABLE}) == len(TABLE)
    for definition in TABLE:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", definition.name)
        assert definition.name.endswith("_total") == (definition.kind == "counter")
        assert definition.name.endswith("_seconds") or definition.kind != "histogram"
        assert definition.help.endswith(".")
        assert not {"job_id", "model", "topic", "user", "message"} & {*definition.labels}


def test_every_definition_is_in_the_table() -> None:
    defined = [value for value in vars(table).values() if isinstance(value, Definition)]
    assert defined == [*TABLE]


def test_buckets_are_the_genai_ones() -> None:
    halves = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64], [1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
    assert [*DURATION_BUCKETS] == [*halves[0], *halves[1]]


def test_page_has_every_metric_after_use() -> None:
    metrics = Metrics()
    use: dict[str, Any] = {"counter": metrics.add, "gauge": metrics.set, "histogram": metrics.observe}
    for definition in TABLE:
        use[definition.kind](definition, 1, *("x" for _ in definition.labels))
    page = generate_latest(metrics.registry).decode()
    for definition in TABLE:
        name = PREFIX + definition.name
        assert f"# HELP {name} {definition.help}\n# TYPE {name} {definition.kind}\n" in page
        assert re.search(rf"^{name}(_bucket)?[{{ ]", page, re.MULTILINE)
    assert "_created" not in page


def test_registry_is_its_own() -> None:
    one, other = Metrics(), Metrics()
    one.add(table.DELTAS, 2)
    assert one.registry.get_sample_value("streamworker_deltas_total") == 2
    assert other.registry.get_sample_value("streamworker_deltas_total") == 0
    assert b"streamworker" not in generate_latest(REGISTRY)


def test_build_is_told() -> None:
    page = generate_latest(Metrics().registry).decode()
    assert f'version="{__version__}"' in page


def test_labels_that_are_not_bounded_cost_no_more_than_the_limit() -> None:
    metrics = Metrics()
    for number in range(MAX_SERIES + 50):
        metrics.add(table.JOBS_ABANDONED, 1, f"reason {number}")
    metrics.add(table.JOBS_ABANDONED, 1, "reason 1")
    page = generate_latest(metrics.registry).decode()
    assert page.count("streamworker_jobs_abandoned_total{") == MAX_SERIES + 1
    assert 'streamworker_jobs_abandoned_total{reason="other"} 50.0' in page
    assert 'streamworker_jobs_abandoned_total{reason="reason 1"} 2.0' in page


def test_gauge_reads_when_scraped_and_survives_a_failure() -> None:
    metrics, values = Metrics(), [3.0]
    metrics.track(table.UNACKNOWLEDGED, values.pop)
    assert metrics.registry.get_sample_value("streamworker_sink_unacknowledged_bytes") == 3
    failed = metrics.registry.get_sample_value("streamworker_sink_unacknowledged_bytes")
    assert failed is not None
    assert math.isnan(failed)


def test_wrong_kind_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        Metrics().add(table.JOBS_OPEN)
