"""The parts of `App` that decide something."""

from __future__ import annotations

import sys
import threading
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamworker.app import App, _load, open_tracing, run_until_signalled
from streamworker.config import Settings, TelemetrySettings, load
from streamworker.errors import ConfigurationError
from streamworker.stream.usage import Tokenizer
from streamworker.telemetry.metrics import PREFIX
from streamworker.worker.stats import WorkerStats


@pytest.fixture
def app() -> App:
    return App(Settings(telemetry=TelemetrySettings(http_host="127.0.0.1", http_port=0)))


def worker_of(stats: WorkerStats) -> Any:
    return SimpleNamespace(stats=lambda: stats, last_poll=-1e6, readiness=lambda: (False, {"joined": False}))


def test_worker_that_waits_for_kafka_is_live(app: App) -> None:
    """It has no poll loop yet, and a restart would not bring Kafka back."""
    app._worker = worker_of(WorkerStats(poll_age_s=1e6))

    assert app._heartbeat_age() == app._stat(lambda stats: stats.poll_age_s) == 0
    app._is_joined = True
    assert app._heartbeat_age() > 1e6
    assert app._stat(lambda stats: stats.poll_age_s) == 1e6


async def test_stats_are_exported_as_metrics(app: App) -> None:
    """Each value under its own name."""
    told = WorkerStats(
        is_ready=True,
        poll_age_s=2,
        draining_s=3,
        partitions_opening=4,
        offset_map_fill=0.5,
        commit_in_progress_s=6,
        commit_pending_entries=7,
    )
    app._worker, app._is_joined = worker_of(told), True
    async with AsyncExitStack() as stack:
        await app._start_telemetry(stack)
        shown = {
            name: app.metrics.registry.get_sample_value(PREFIX + name)
            for name in (
                "ready",
                "poll_age_seconds",
                "draining_seconds",
                "partitions_opening",
                "offset_map_fill_ratio",
                "commit_in_progress_seconds",
                "commit_pending_entries",
            )
        }

    assert list(shown.values()) == [1, 2, 3, 4, 0.5, 6, 7]


def test_traces_that_are_off_import_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenTelemetry is not imported by default."""
    monkeypatch.setitem(sys.modules, "streamworker.telemetry.otlp", None)

    assert open_tracing(load(None, {})) is None


def test_traces_without_the_extra_raise_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that asks for traces and cannot send them is refused at the start."""
    monkeypatch.delitem(sys.modules, "streamworker.telemetry.otlp", raising=False)
    monkeypatch.delattr("streamworker.telemetry.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with pytest.raises(ConfigurationError, match=r"telemetry.traces: .* pip install 'streamworker\[otel\]'"):
        open_tracing(load(None, {"STREAMWORKER_TELEMETRY__TRACES": "otlp"}))


async def test_worker_that_crashes_reports_it_in_the_last_line_and_exits_with_1(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception's own text may repeat a prompt, so it is left out."""

    async def crash() -> None:
        raise ZeroDivisionError("my prompt")

    monkeypatch.setattr(app, "run", crash)
    with capture_logs() as logs:
        code = await run_until_signalled(app)

    assert code == 1
    assert [entry["event"] for entry in logs] == ["worker.crashed"]
    assert "my prompt" not in str(logs)


async def test_tokenizer_is_loaded_in_a_thread() -> None:
    """Its loading takes half a second of processor time, in which the event loop would stand still."""
    threads: list[int] = []

    def count(_: str) -> int:
        threads.append(threading.get_ident())
        return 0

    await _load(Tokenizer("vocabulary", count))

    assert len(threads) == 1
    assert threads != [threading.get_ident()]
