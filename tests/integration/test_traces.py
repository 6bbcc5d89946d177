"""The trace of a job, from its submitter through the worker to the upstream and the events, as a collector gets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.collector import Collector, value_of
from tests.integration.gateways import gateway, open_keys
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


async def test_trace_connects_the_client_of_a_gateway_with_the_job(
    apache: Stage, collector: Collector, tmp_path: Path
) -> None:
    """The client's span, the request's, the delivery's and the call's are one line of descent."""
    open_keys(apache, tmp_path)
    await apache.open()
    headers = {"traceparent": TRACE[0][1].decode()}
    request = {"model": "practice?deltas=2", "messages": [{"role": "user", "content": "prompt of mine"}]}
    over = {"telemetry__traces": "otlp"}
    async with apache.worker(**over), gateway(apache, **over) as served:
        answer = await served.http.post("/v1/jobs", json={"request": request}, headers=headers)
        chat = await served.http.post("/v1/chat/completions", json=request, headers=headers)
        await apache.ended(answer.json()["job_id"], chat.headers["Streamworker-Job-Id"])

    by_kind = {
        kind: [span for span in collector.spans if span.kind == kind]
        for kind in (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CONSUMER, Span.SPAN_KIND_CLIENT)
    }
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert [len(spans) for spans in by_kind.values()] == [2, 2, 2]
    requests = {span.name: span for span in by_kind[Span.SPAN_KIND_SERVER]}
    assert {span.parent_span_id.hex() for span in requests.values()} == {PARENT_ID}
    ids = {
        "POST /v1/jobs": answer.json()["job_id"],
        "POST /v1/chat/completions": chat.headers["Streamworker-Job-Id"],
    }
    for name, job_id in ids.items():
        assert value_of(requests[name], "streamworker.job.id") == job_id
        [job] = [
            one for one in by_kind[Span.SPAN_KIND_CONSUMER] if value_of(one, "streamworker.job.id") == job_id
        ]
        assert job.parent_span_id == requests[name].span_id
        assert job.span_id in {span.parent_span_id for span in by_kind[Span.SPAN_KIND_CLIENT]}
    assert b"prompt of" not in b"".join(span.SerializeToString() for span in collector.spans)


def _header(span: Span) -> str:
    return f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
