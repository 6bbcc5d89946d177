"""Spans on their way to a collector: a real one, one that is away, one that hangs."""

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
from streamworker.telemetry.otlp import _LastWords, open_tracing
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
    """What is left sending draws random numbers for its backoff, in the middle of somebody else's property."""
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
    """Open the way to an endpoint, with these environment variables."""

    def trace_to(endpoint: str, **variables: str) -> Tracing:
        for name, value in {**VARIABLES, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **variables}.items():
            monkeypatch.setenv(name, value)
        tracing = open_tracing(settings)
        assert tracing is not None
        return tracing

    return trace_to


def tell(tracing: Tracing) -> None:
    """Make one span."""
    tracing.tracer.open_job(make_job(), 1).abandoned("stopped")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it belongs to threads
            await asyncio.sleep(0.01)


async def test_traces_reach_the_collector_with_who_sent_them(trace_to: Any) -> None:
    """Whatever was not yet sent is, at the end."""
    with Collector() as collector:
        headers = {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20x"}
        tracing = trace_to(collector.endpoint, OTEL_BSP_SCHEDULE_DELAY="60000", **headers)
        tell(tracing)
        assert collector.spans == []
        await tracing.close()

    assert [span.name for span in collector.spans] == ["process jobs"]
    assert collector.headers[0]["authorization"] == "Bearer x"
    [resource] = collector.resources
    assert value_of(resource, "service.name") == "streamworker"
    assert value_of(resource, "service.version") == __version__


async def test_traces_of_a_service_that_has_a_name_carry_it(trace_to: Any) -> None:
    """The standard variables win."""
    with Collector() as collector:
        tracing = trace_to(collector.endpoint, OTEL_SERVICE_NAME="mine", OTEL_RESOURCE_ATTRIBUTES="a=b")
        tell(tracing)
        await tracing.close()

    [resource] = collector.resources
    assert (value_of(resource, "service.name"), value_of(resource, "a")) == ("mine", "b")


async def test_collector_that_is_away_is_told_once_and_once_that_it_is_back(trace_to: Any) -> None:
    """It answers no batch of many; the log holds two lines, and the worker does not notice."""
    port = free_port()
    with capture_logs() as logs:
        tracing = trace_to(f"http://127.0.0.1:{port}")
        exporter = tracing._exporter
        for failures in range(3):
            tell(tracing)
            await until(partial(lambda before: exporter._failures > before, failures))
        with Collector(port) as collector:
            tell(tracing)
            await until(lambda: collector.spans)
            await tracing.close()

    assert [line["event"] for line in logs] == ["traces.export_failing", "traces.export_recovered"]
    assert logs[0]["reason"].startswith("Failed to export spans batch")
    assert logs[1]["batches_lost"] == 3


async def test_collector_that_refuses_is_told_with_its_reason(trace_to: Any) -> None:
    """A wrong path, a missing key: a person has to change something."""
    with Collector() as collector, capture_logs() as logs:
        tracing = trace_to("", OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=f"{collector.endpoint}/wrong")
        tell(tracing)
        await tracing.close()

    [line] = logs
    assert (line["event"], line["log_level"]) == ("traces.export_failing", "warning")
    assert "code: 404, reason: Not Found" in line["reason"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "ok      traces\n"),
        ("/wrong", "wrong   traces: Failed to export spans batch code: 404, reason: Not Found; "),
    ],
)
async def test_check_asks_the_collector(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: Settings,
    path: str,
    said: str,
) -> None:
    """It is sent nothing, and whether it takes that is told."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint + path)
        assert await _check_traces(settings) is (path == "")

    assert collector.spans == []
    assert capsys.readouterr().out.startswith(said)


async def test_reason_quotes_no_secret(trace_to: Any) -> None:
    """A header that cannot be sent is quoted in the error; it is often the key."""
    with capture_logs() as logs:
        tracing = trace_to(
            "http://user:canary-1@127.0.0.1:1",
            OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20canary-2%0Ax",
        )
        tell(tracing)
        await tracing.close()

    [line] = logs
    assert "header" in line["reason"]
    assert "canary" not in str(line)


def test_reason_is_kept_from_the_line_that_has_one() -> None:
    """The library says of each try what was wrong, and in the end that it gave up."""
    words = _LastWords()
    lines = [
        ("Transient error %s, retrying in %.2fs.", ("refused", 1.0)),
        ("Failed to export %s batch.", ("spans",)),
    ]
    for message, arguments in lines:
        record = logging.LogRecord("x", logging.WARNING, "", 0, message, arguments, None)
        assert words.filter(record) is False

    assert words.text == "Transient error refused"


async def test_collector_that_hangs_holds_up_neither_jobs_nor_the_end(trace_to: Any) -> None:
    """What it has not taken in time is lost, and it is said."""
    with Collector() as collector, capture_logs() as logs:
        collector.answering.clear()
        tracing = trace_to(collector.endpoint, OTEL_EXPORTER_OTLP_TIMEOUT="30", OTEL_BSP_MAX_QUEUE_SIZE="600")
        tell(tracing)
        await until(collector.asked.is_set)
        began = time.monotonic()
        for _ in range(2000):
            tell(tracing)
        assert time.monotonic() - began < 10  # a call that waited would wait for 30 s
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
def test_traces_over_grpc_are_refused_with_what_to_do(settings: Settings, name: str) -> None:
    """Sent to that port they would be lost one by one."""
    with pytest.raises(ConfigurationError, match=f"{name}: 'grpc' is not spoken; use http/protobuf .* 4318"):
        open_tracing(settings, {name: "grpc"})


async def test_protocol_for_traces_wins_over_the_one_for_all(settings: Settings) -> None:
    """Metrics of others may go another way."""
    ours, all_others = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    tracing = open_tracing(settings, {ours: "http/protobuf", all_others: "grpc"})

    assert tracing is not None
    await tracing.close()


def test_traces_to_another_exporter_are_refused_with_what_to_do(settings: Settings) -> None:
    """Zipkin and the console are not there."""
    with pytest.raises(
        ConfigurationError, match="OTEL_TRACES_EXPORTER: 'zipkin' is not there; use otlp, or none"
    ):
        open_tracing(settings, {"OTEL_TRACES_EXPORTER": "zipkin"})


@pytest.mark.parametrize("variables", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_traces_can_be_turned_off_where_opentelemetry_is(
    settings: Settings, variables: dict[str, str]
) -> None:
    """The environment has the last word, over whatever else it says."""
    assert open_tracing(settings, {**variables, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) is None
