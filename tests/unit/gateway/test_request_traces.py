"""The spans of requests that submit jobs: real spans, of a gateway in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from streamworker.gateway.writer import NotAcknowledged
from streamworker.telemetry.tracing import OtelRequestTracer
from tests.turnable import until
from tests.unit.gateway.served import ACME, READ_ONLY, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from opentelemetry.sdk.trace import ReadableSpan

    from tests.unit.gateway.served import Served

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE_ID}-{PARENT}-00"
PROMPT = "the prompt"
REQUEST = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
JOB = {"request": REQUEST, "metadata": {"page": "secret page"}}
CHAT = "/v1/chat/completions"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def gateway(tmp_path: Path, exporter: InMemorySpanExporter) -> AsyncIterator[Served]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with served(tmp_path, tracer=OtelRequestTracer(provider), models="m") as gateway:
        yield gateway


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def written(gateway: Served) -> str:
    """Return the traceparent of the last record."""
    value = dict(gateway.writer.headers)["traceparent"]
    assert value is not None
    return value.decode()


async def test_span_of_a_job_is_a_child_of_the_clients_and_the_parent_of_the_workers(
    gateway: Served, exporter: InMemorySpanExporter
) -> None:
    """The job's record carries the context of the request's span, and the client's tracestate."""
    headers = {"traceparent": SAMPLED, "tracestate": "a=1"}
    status, value, _ = await gateway.call("POST", "/v1/jobs", json=JOB, headers=headers)
    [span] = exporter.get_finished_spans()

    assert status == 202
    assert (span.name, span.kind) == ("POST /v1/jobs", SpanKind.SERVER)
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT)
    assert written(gateway) == f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    assert dict(gateway.writer.headers)["tracestate"] == b"a=1"
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/jobs",
        "url.path": "/v1/jobs",
        "url.scheme": "http",
        "http.response.status_code": 202,
        "streamworker.job.id": value["job_id"],
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_request_without_a_trace_begins_one(gateway: Served, exporter: InMemorySpanExporter) -> None:
    """Its record carries it."""
    await gateway.call("POST", "/v1/jobs", json=JOB)
    [span] = exporter.get_finished_spans()

    assert span.parent is None
    trace, _, flags = written(gateway).rpartition("-")
    assert trace == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}"
    assert int(flags, 16) & 1  # sampled


@pytest.mark.parametrize(
    "given", ["", "00-x", f"00-{TRACE_ID}-{PARENT}", f"00-{'0' * 32}-{PARENT}-01", "é", "x" * 600]
)
async def test_traceparent_that_is_not_valid_begins_a_trace(
    gateway: Served, exporter: InMemorySpanExporter, given: str
) -> None:
    """As the W3C recommendation says: the job is accepted, and the header is not carried on."""
    status, _, _ = await gateway.call("POST", "/v1/jobs", json=JOB, headers={"traceparent": given})
    [span] = exporter.get_finished_spans()

    assert status == 202
    assert span.parent is None
    assert written(gateway).startswith(f"00-{span.context.trace_id:032x}-")


async def test_trace_that_the_client_does_not_sample_is_carried_on_without_a_span(
    gateway: Served, exporter: InMemorySpanExporter
) -> None:
    """The sampler is parent-based."""
    await gateway.call("POST", "/v1/jobs", json=JOB, headers={"traceparent": UNSAMPLED})

    assert exporter.get_finished_spans() == ()
    assert written(gateway).startswith(f"00-{TRACE_ID}-")
    assert written(gateway).endswith("-00")


@pytest.mark.parametrize(
    ("key", "job", "status", "code", "outcome"),
    [
        (ACME, {"request": {}}, 400, "invalid_job", StatusCode.UNSET),
        (None, JOB, 401, "unauthenticated", StatusCode.UNSET),
        (READ_ONLY, JOB, 403, "insufficient_scope", StatusCode.UNSET),
        (ACME, {"job_id": "other.1", **JOB}, 403, "outside_tenant", StatusCode.UNSET),
    ],
)
async def test_span_of_a_refused_job_has_the_code(
    gateway: Served,
    exporter: InMemorySpanExporter,
    key: str | None,
    job: Any,
    status: int,
    code: str,
    outcome: StatusCode,
) -> None:
    """An error of the client is not an error of the server's span."""
    await gateway.call("POST", "/v1/jobs", key=key, json=job)
    [span] = exporter.get_finished_spans()

    assert attributes(span)["http.response.status_code"] == status
    assert attributes(span)["error.type"] == code
    assert "streamworker.job.id" not in attributes(span)
    assert span.status.status_code is outcome


async def test_span_of_a_job_that_kafka_does_not_acknowledge_is_an_error(
    gateway: Served, exporter: InMemorySpanExporter
) -> None:
    """With the code of the response."""
    gateway.writer.errors.append(NotAcknowledged("late"))
    status, _, _ = await gateway.call("POST", "/v1/jobs", json=JOB)
    [span] = exporter.get_finished_spans()

    assert status == 503
    assert attributes(span)["error.type"] == "submit_unknown"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None


@pytest.mark.parametrize("stream", [True, False])
async def test_span_of_a_chat_completion_lasts_as_long_as_the_response(
    gateway: Served, exporter: InMemorySpanExporter, stream: bool
) -> None:
    """It ends with the job."""
    asking = asyncio.create_task(
        gateway.call("POST", CHAT, json={**REQUEST, "stream": stream}, headers={"traceparent": SAMPLED})
    )
    await until(lambda: gateway.writer.records)
    assert exporter.get_finished_spans() == ()
    job_id = gateway.writer.records[-1][2]["job_id"]
    gateway.log.publish(job_id, ["a"])
    status, _, _ = await asking
    await until(exporter.get_finished_spans)
    [span] = exporter.get_finished_spans()

    assert status == 200
    assert span.name == f"POST {CHAT}"
    assert attributes(span)["streamworker.job.id"] == job_id
    assert written(gateway) == f"00-{TRACE_ID}-{span.context.span_id:016x}-01"


async def test_span_of_a_client_that_disconnects_has_no_status(
    gateway: Served, exporter: InMemorySpanExporter
) -> None:
    """None was sent."""
    asking = asyncio.create_task(gateway.call("POST", CHAT, json=REQUEST))
    await until(lambda: gateway.writer.records)
    asking.cancel()
    await asyncio.wait([asking])
    await until(exporter.get_finished_spans)
    [span] = exporter.get_finished_spans()

    assert attributes(span)["error.type"] == "disconnected"
    assert "http.response.status_code" not in attributes(span)
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/acme.1"),
        ("POST", "/v1/jobs/acme.1/cancel"),
        ("POST", "/v1/tokens"),
        ("GET", "/v1/models"),
        ("GET", "/v1/jobs"),
        ("POST", "/nowhere"),
    ],
)
async def test_other_requests_have_no_span(
    gateway: Served, exporter: InMemorySpanExporter, method: str, path: str
) -> None:
    """A span per poll, stream or unknown path would be of no use."""
    gateway.log.publish("acme.1", ["a"])
    await gateway.call(method, path, headers={"traceparent": SAMPLED})

    assert exporter.get_finished_spans() == ()


async def test_spans_hold_no_prompt_and_no_secret(gateway: Served, exporter: InMemorySpanExporter) -> None:
    """Neither the key, nor the record's key, nor metadata, whatever becomes of the request."""
    await gateway.call("POST", "/v1/jobs", json={**JOB, "key": "record key"})
    await gateway.call("POST", "/v1/jobs?x=secret+query", json=JOB, headers={"X-Request-Id": "id-of-request"})
    await gateway.call("POST", "/v1/jobs", json={**JOB, PROMPT: 1})
    gateway.writer.errors.append(NotAcknowledged(PROMPT))
    await gateway.call("POST", "/v1/jobs", json=JOB)
    encoded = encode_spans(exporter.get_finished_spans()).SerializeToString()

    assert len(exporter.get_finished_spans()) == 4
    for secret in (PROMPT, ACME, "record key", "secret page", "secret+query", "secret query"):
        assert secret.encode() not in encoded
