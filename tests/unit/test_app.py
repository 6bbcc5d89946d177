"""The parts of `App` that decide something."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from streamworker.app import SILENT_S, App, _load, open_tracing, run_until_signalled
from streamworker.config import Settings, TelemetrySettings, load
from streamworker.errors import ConfigurationError
from streamworker.stream.usage import Tokenizer
from streamworker.telemetry.metrics import PREFIX
from streamworker.worker.stats import WorkerStats
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from streamworker.kafka.consumer import GroupConsumer


@pytest.fixture
def app() -> App:
    return App(Settings(telemetry=TelemetrySettings(http_host="127.0.0.1", http_port=0)))


def worker_of(stats: WorkerStats, *, last_poll: float = -1e6) -> Any:
    is_ready = stats.is_ready
    return SimpleNamespace(
        stats=lambda: stats, last_poll=last_poll, readiness=lambda: (is_ready, {"joined": is_ready})
    )


def test_worker_that_waits_for_kafka_is_live(app: App) -> None:
    """It has no poll loop yet, and a restart would not bring Kafka back."""
    app._worker = worker_of(WorkerStats(poll_age_s=1e6))

    assert app._heartbeat_age() == app._stat(lambda stats: stats.poll_age_s) == 0
    app._is_joined = True
    assert app._heartbeat_age() > 1e6
    assert app._stat(lambda stats: stats.poll_age_s) == 1e6


@pytest.mark.parametrize(("silent_s", "is_ready"), [(SILENT_S - 1, True), (SILENT_S + 1, False)])
async def test_worker_whose_coordinator_is_silent_is_not_ready_and_says_so(
    app: App, silent_s: float, *, is_ready: bool
) -> None:
    """An idle worker sends nothing else that could fail. It stays live: a restart would not bring the broker back."""
    app._worker = worker_of(WorkerStats(is_ready=True), last_poll=app._clock.monotonic())
    app._is_joined = True
    app._consumer = cast("GroupConsumer", SimpleNamespace(heartbeat_age_s=silent_s))
    async with AsyncExitStack() as stack:
        await app._start_telemetry(stack)
        shown = app.metrics.registry.get_sample_value(f"{PREFIX}ready")

    assert app._readiness() == (is_ready, {"joined": True, "coordinator_silent_s": silent_s})
    assert shown == is_ready
    assert app._heartbeat_age() < 10


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


async def test_first_signal_says_what_a_second_one_does(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain may take minutes, in which someone at a terminal would not know how to end it."""

    async def work() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(app, "run", work)
    monkeypatch.setattr(app, "drain", lambda: None)
    monkeypatch.setattr(type(app), "is_working", True)
    with capture_logs() as logs:
        ending = asyncio.create_task(run_until_signalled(app))
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGINT)
        await eventually(lambda: len(logs) == 1)
        signal.raise_signal(signal.SIGINT)
        code = await ending

    assert code == 1
    assert [entry["meaning"] for entry in logs] == ["drain; a second signal stops at once", "stop at once"]


async def test_tokenizer_is_loaded_in_a_thread() -> None:
    """Its loading takes half a second of processor time, in which the event loop would stand still."""
    threads: list[int] = []

    def count(_: str) -> int:
        threads.append(threading.get_ident())
        return 0

    await _load(Tokenizer("vocabulary", count))

    assert len(threads) == 1
    assert threads != [threading.get_ident()]
