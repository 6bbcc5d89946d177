"""The trace of a job, from its submitter through the worker to the upstream and the events, as a collector gets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.collector import Collector, value_of
from tests.integration.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from streamworker.demo.broker import EmbeddedBroker
    from streamworker.practice import PracticeUpstream

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACE = [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01".encode()), ("tracestate", b"a=1")]


@pytest.fixture
async def embedded(
    embedded_broker: EmbeddedBroker,
    practice: PracticeUpstream,
    topics: Callable[[str], str],
    tmp_path: Path,
) -> AsyncIterator[Stage]:
    """Yield a stage on the embedded broker."""
    async with Stage(embedded_broker, practice, topics, tmp_path) as stage:
        await stage.open()
        yield stage


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-workers")
        yield collector


async def test_trace_connects_submitter_job_calls_upstream_and_events(
    embedded: Stage, collector: Collector
) -> None:
    """All spans have one trace id: the job is a child of the submitter's span, and each call a child of the job."""
    stage = embedded
    model = "practice?deltas=3&status=503&times=1&retry_after_ms=20"
    async with stage.worker(telemetry__traces="otlp"):
        await stage.submit("traced", model, headers=TRACE)
        await stage.submit("alone", "practice?deltas=1")
        await stage.ended()
    assert stage.breaches() == []

    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]
    [job] = [span for span in spans if span.kind == Span.SPAN_KIND_CONSUMER]
    failed, call = sorted(
        (span for span in spans if span.kind == Span.SPAN_KIND_CLIENT),
        key=lambda span: span.start_time_unix_nano,
    )
    assert (job.name, call.name) == (f"process {stage.jobs_topic}", f"chat {model}")
    assert job.parent_span_id.hex() == PARENT_ID
    assert {failed.parent_span_id, call.parent_span_id} == {job.span_id}
    assert [one.headers["traceparent"] for one in stage.calls("traced")] == [_header(failed), _header(call)]
    assert {one.headers["tracestate"] for one in stage.calls("traced")} == {"a=1"}
    records = [record for record in stage.records if record.event["job_id"] == "traced"]
    carried = [(record.event["type"], dict(record.headers).get("traceparent")) for record in records]
    own = _header(job).encode()
    assert carried == [("started", own), *[("delta", None)] * (len(records) - 2), ("usage", own)]

    [end] = await stage.ended("traced")
    assert (value_of(call, "gen_ai.usage.input_tokens"), value_of(call, "gen_ai.usage.output_tokens")) == (
        end["usage"]["prompt_tokens"],
        end["usage"]["completion_tokens"],
    )
    assert (value_of(failed, "error.type"), failed.status.code) == (
        "upstream_unavailable",
        Status.STATUS_CODE_ERROR,
    )
    assert value_of(call, "server.port") == int(stage.practice.base_url.split(":")[2].split("/")[0])
    assert value_of(job, "messaging.consumer.group.name") == stage.group
    assert (
        job.start_time_unix_nano
        <= failed.start_time_unix_nano
        <= call.end_time_unix_nano
        <= job.end_time_unix_nano
    )

    others = [span for span in collector.spans if span.trace_id.hex() != TRACE_ID]
    assert {len(others), len({span.trace_id for span in others})} == {2, 1}
    assert {value_of(resource, "service.name") for resource in collector.resources} == {"chat-workers"}
    assert b"prompt of" not in b"".join(span.SerializeToString() for span in collector.spans)


def _header(span: Span) -> str:
    return f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
