"""Export of spans to a collector that works, is down, refuses or hangs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from streamworker import __version__
from streamworker.cli.check import _check_traces
from streamworker.config import load
from streamworker.demo.child import free_port
from streamworker.errors import ConfigurationError
from streamworker.telemetry.otlp import _LastError, open_tracing
from tests.collector import Collector, value_of
from tests.streams import make_job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.config import Settings
    from streamworker.telemetry.otlp import Tracing

VARIABLES = {
    "OTEL_BSP_SCHEDULE_DELAY": "20",  # ms
    "OTEL_EXPORTER_OTLP_TIMEOUT": "0.2",  # s
}


@pytest.fixture(autouse=True)
def threads_have_ended() -> Iterator[None]:
    """Wait for the exporter's threads: their backoff draws random numbers, which would disturb later property tests."""
    yield
    _join_threads()


def _join_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith(("OtelBatch", "traces-")):
            thread.join(20)
            assert not thread.is_alive(), thread


@pytest.fixture
def settings() -> Settings:
    return load(None, {"STREAMWORKER_TELEMETRY__TRACES": "otlp"})


@pytest.fixture
def trace_to(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Callable[..., Tracing]:
    """Open tracing to an endpoint, with these environment variables."""

    def trace_to(endpoint: str, **variables: str) -> Tracing:
        for name, value in {**VARIABLES, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables}.items():
            monkeypatch.setenv(name, value)
        tracing = open_tracing(settings)
        assert tracing is not None
        return tracing

    return trace_to


def make_span(tracing: Tracing) -> None:
    """Make one span."""
    tracing.tracer.open_job(make_job(), 1).abandoned("stopped")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the condition is set by threads
            await asyncio.sleep(0.01)


async def test_traces_at_close_are_flushed_with_the_service_as_resource(trace_to: Any) -> None:
    """Spans that are still in the queue are sent at the end."""
    with Collector() as collector:
        headers = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x"}
        tracing = trace_to(collector.endpoint, OTEL_BSP_SCHEDULE_DELAY="60000", **headers)
        make_span(tracing)
        assert collector.spans == []
        await tracing.close(within_s=30)

    assert [span.name for span in collector.spans] == ["process jobs"]
    assert collector.headers[0]["authorization"] == "Bearer x"
    [resource] = collector.resources
    assert value_of(resource, "service.name") == "streamworker"
    assert value_of(resource, "service.version") == __version__


async def test_traces_of_a_gateway_have_a_service_of_their_own(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    """Unless the environment names one."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        tracing = open_tracing(settings, service="streamworker-gateway")
        assert tracing is not None
        span = tracing.requests.open_request("POST", "/v1/jobs", ())
        span.ended(202, job_id="j", error=None)
        await tracing.close()

    [resource] = collector.resources
    assert value_of(resource, "service.name") == "streamworker-gateway"
    assert [span.name for span in collector.spans] == ["POST /v1/jobs"]


async def test_traces_with_a_configured_service_name_carry_it(trace_to: Any) -> None:
    """OpenTelemetry's standard variables have precedence."""
    with Collector() as collector:
        tracing = trace_to(collector.endpoint, OTEL_SERVICE_NAME="mine", OTEL_RESOURCE_ATTRIBUTES="a=b")
        make_span(tracing)
        await tracing.close(within_s=30)

    [resource] = collector.resources
    assert (value_of(resource, "service.name"), value_of(resource, "a")) == ("mine", "b")


async def test_collector_that_is_down_is_logged_once_and_its_recovery_once(trace_to: Any) -> None:
    """Several batches fail; the log has one line for the outage and one for its end."""
    port = free_port()
    with capture_logs() as logs:
        tracing = trace_to(f"http://127.0.0.1:{port}")
        exporter = tracing._exporter
        for failures in range(3):
            make_span(tracing)
            await until(partial(lambda before: exporter.outage_log.failures > before, failures))
        with Collector(port) as collector:
            make_span(tracing)
            await until(lambda: collector.spans)
            await tracing.close(within_s=30)

    assert [line["event"] for line in logs] == ["traces.export_failing", "traces.export_recovered"]
    assert logs[0]["reason"].startswith("Failed to export spans batch")
    assert logs[1]["failures"] == 3


async def test_collector_that_refuses_is_logged_with_its_reason(trace_to: Any) -> None:
    """A wrong path or a missing key needs a change of the configuration."""
    with Collector() as collector, capture_logs() as logs:
        tracing = trace_to("", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.endpoint}/wrong")
        make_span(tracing)
        await tracing.close(within_s=30)

    [line] = logs
    assert (line["event"], line["log_level"]) == ("traces.export_failing", "warning")
    assert "code: 404, reason: Not Found" in line["reason"]


@pytest.mark.parametrize(
    ("path", "printed"),
    [
        ("", "ok      traces\n"),
        ("/wrong", "wrong   traces: Failed to export spans batch code: 404, reason: Not Found; "),
    ],
)
async def test_check_of_traces_reports_whether_the_collector_accepts_them(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: Settings,
    path: str,
    printed: str,
) -> None:
    """The check sends an empty batch and prints the result."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint + path)
        assert await _check_traces(settings) is (path == "")

    assert collector.spans == []
    assert capsys.readouterr().out.startswith(printed)


async def test_export_error_with_a_secret_is_logged_without_it(trace_to: Any) -> None:
    """The library quotes a header that cannot be sent, which often holds the key."""
    with capture_logs() as logs:
        tracing = trace_to(
            "http://user:canary-1@127.0.0.1:1",
            OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20canary-2%0Ax",
        )
        make_span(tracing)
        await tracing.close(within_s=30)

    [line] = logs
    assert "header" in line["reason"]
    assert "canary" not in str(line)


def test_last_error_with_several_lines_keeps_the_reason() -> None:
    """The library logs a reason for each try, and at the end only that the export failed."""
    last_error = _LastError()
    lines = [
        ("Transient error %s, retrying in %.2fs.", ("refused", 1.0)),
        ("Failed to export %s batch.", ("spans",)),
    ]
    for message, arguments in lines:
        record = logging.LogRecord("x", logging.WARNING, "", 0, message, arguments, None)
        assert last_error.filter(record) is False

    assert last_error.text == "Transient error refused"


async def test_collector_that_hangs_delays_neither_jobs_nor_the_end(trace_to: Any) -> None:
    """Spans that the collector has not accepted in time are dropped, and a warning is logged."""
    with Collector() as collector, capture_logs() as logs:
        collector.answering.clear()
        tracing = trace_to(collector.endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="30", OTEL_BSP_MAX_QUEUE_SIZE="600")
        make_span(tracing)
        await until(collector.asked.is_set)
        began = time.monotonic()
        for _ in range(2000):
            make_span(tracing)
        assert time.monotonic() - began < 10  # a blocking call would last 30 s
        assert len(_queue(tracing)) == 600
        await tracing.close(within_s=0.1)
        assert time.monotonic() - began < 20
        collector.answering.set()
        await asyncio.to_thread(_join_threads)

    assert [line["event"] for line in logs] == ["traces.not_flushed"]


def _queue(tracing: Tracing) -> Any:
    [processor] = tracing._provider._active_span_processor._span_processors
    return processor._batch_processor._queue  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"])
def test_traces_over_grpc_are_refused_with_advice(settings: Settings, name: str) -> None:
    """Every export over HTTP to the port for gRPC would fail."""
    with pytest.raises(
        ConfigurationError, match=f"{name}: 'grpc' is not supported; use http/protobuf .* 4318"
    ):
        open_tracing(settings, {name: "grpc"})


async def test_protocol_for_traces_has_precedence_over_the_general_one(settings: Settings) -> None:
    """The general variable may be meant for the metrics of other programs."""
    for_traces, general = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    tracing = open_tracing(settings, {for_traces: "http/protobuf", general: "grpc"})

    assert tracing is not None
    await tracing.close(within_s=30)


def test_traces_with_another_exporter_are_refused_with_advice(settings: Settings) -> None:
    """The exporters for Zipkin and the console are not supported."""
    with pytest.raises(
        ConfigurationError, match="OTEL_TRACES_EXPORTER: 'zipkin' is not supported; use otlp, or none"
    ):
        open_tracing(settings, {"OTEL_TRACES_EXPORTER": "zipkin"})


@pytest.mark.parametrize("variables", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_traces_turned_off_in_the_environment_stay_off(settings: Settings, variables: dict[str, str]) -> None:
    """The variables that turn traces off have precedence over every other one."""
    assert open_tracing(settings, {**variables, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) is None
