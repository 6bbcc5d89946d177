"""Every query of the dashboard and the alerts matches metrics of a running worker."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from streamworker.demo.child import free_port
from streamworker.telemetry.metrics import PREFIX, TABLE
from tests.integration.stage import InProcess, Stage, eventually
from tests.queries import questions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prometheus_client.samples import Sample

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream
    from tests.brokers.apache import ApacheKafka

TARGET = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds."""


async def scrape(port: int) -> dict[str, list[Sample]]:
    """Return the samples by name."""
    url = f"http://127.0.0.1:{port}/metrics"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        page = await answer.text()
    samples = defaultdict(list)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples[sample.name].append(sample)
    return samples


def _gauge(worker: InProcess, name: str) -> float | None:
    return worker.app.metrics.registry.get_sample_value(PREFIX + name)


async def test_every_query_matches_a_metric_of_a_worker(
    embedded_broker: EmbeddedBroker,
    practice: PracticeUpstream,
    topics: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """Each metric and label of a query exists, and each label value has a series.

    Every metric is used by a query.
    """
    port = free_port()
    async with Stage(embedded_broker, practice, topics, tmp_path) as stage:
        await stage.open()
        await stage.submit("well", "practice?deltas=25&pace_ms=20")
        await stage.submit("again", "practice?deltas=3&status=503&times=1&retry_after_ms=1")
        await stage.submit("breaks", "practice?deltas=8&break_after=3&times=1", on_break="restart")
        await stage.submit("key", "practice?status=401", max_wait_s=0)
        await stage.submit_bytes(b"no job")
        await stage.submit_bytes(None, key=b"gone")
        worker = stage.worker(
            telemetry__http_port=port, telemetry__label_metadata="tenant", worker__max_in_flight=1
        )
        async with worker:
            gauge = partial(_gauge, worker)
            await eventually(lambda: gauge("records_behind") == 5)
            await stage.ended("well", "again", "breaks", "key")
            await stage.dead_letters(1)
            await eventually(lambda: gauge("tombstones_total") == 1 and gauge("jobs_open") == 0)
            samples = await scrape(port)

    def value(name: str, **labels: str) -> float:
        return sum(
            sample.value for sample in samples[PREFIX + name] if labels.items() <= sample.labels.items()
        )

    asked = set()
    for question in questions():
        if any(one.metric.startswith(f"{PREFIX}gateway_") for one in question.selectors):
            continue  # only gateways have them
        labels = set(TARGET)
        for metric, patterns in question.selectors:
            found = samples[metric]
            asked.add(re.sub(r"_(bucket|sum|count)$", "", metric))
            if metric.startswith("process_") and sys.platform != "linux":
                continue
            assert found, f"{question.where}: no worker exports {metric}"
            for label, pattern in patterns.items():
                known = {"" if label in TARGET else sample.labels.get(label) for sample in found}
                alternatives = pattern.split("|")
                assert all(
                    any(one is not None and re.fullmatch(alternative, one) for one in known)
                    for alternative in alternatives
                ), f"{question.where}: {metric} has no {label} like {pattern}, only {known}"
            labels |= found[0].labels.keys()
        assert question.labels <= labels, f"{question.where}: nothing has {question.labels - labels}"
    assert {PREFIX + definition.name for definition in TABLE} - asked == set()

    # The values are correct where they are known.
    assert value("jobs_started_total") == value("queue_duration_seconds_count") == 4
    assert value("attempts_total") == 5
    assert value("jobs_ended_total", status="completed") == 3
    assert value("retries_total", code="upstream_unavailable") == 1
    assert value("job_errors_total", code="auth") == 1
    assert value("dead_letters_total", code="invalid_job") == 1
    assert (
        value("tombstones_total")
        == value("rebalances_total")
        == value("rebalance_duration_seconds_count")
        == 1
    )
    assert value("events_total", type="delta") == sum(
        record.event["type"] == "delta" for record in stage.records
    )
    assert value("event_bytes_total", type="usage") > 4 * 300
    assert value("delta_gap_seconds_count") >= 10
    assert value("commit_records_sum") == value("events_total", type="started") + value(
        "events_total", type="usage"
    ) + value("dead_letters_total")
    assert value("sink_batch_records_sum") == value("events_total", type="delta")
    assert value("jobs_open") == value("records_behind") == value("oldest_job_age_seconds") == 0
    assert value("ready") == value("partitions_owned") == 1
    assert 0 <= value("group_heartbeat_age_seconds") < 10
    assert 0 < value("offset_map_fill_ratio") < 0.1


async def test_broker_outage_is_visible_in_the_metrics_of_an_idle_worker(
    apache: Stage, apache_kafka: ApacheKafka
) -> None:
    """An idle worker sends no requests that could fail, but its heartbeat age grows until the broker is back."""
    await apache.open()
    worker = apache.worker()
    async with worker:
        gauge = partial(_gauge, worker)
        await eventually(lambda: gauge("ready") == 1)
        apache_kafka.pause()
        await eventually(lambda: (gauge("group_heartbeat_age_seconds") or 0) > 2.5)
        apache_kafka.resume()
        await eventually(lambda: (gauge("group_heartbeat_age_seconds") or 0) < 1)
