"""The composition root, as far as it decides anything by itself."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from streamworker.app import App
from streamworker.config import Settings, TelemetrySettings
from streamworker.telemetry.metrics import PREFIX
from streamworker.worker.vitals import Vitals


@pytest.fixture
def app() -> App:
    return App(Settings(telemetry=TelemetrySettings(http_host="127.0.0.1", http_port=0)))


def worker_of(vitals: Vitals) -> Any:
    return SimpleNamespace(
        vitals=lambda: vitals, last_poll=-1e6, readiness=lambda: (False, {"joined": False})
    )


def test_worker_that_waits_for_kafka_to_join_is_live_however_long_it_takes(app: App) -> None:
    """It has no poll loop yet that could stand still, and a restart would bring Kafka no nearer."""
    app._worker = worker_of(Vitals(poll_age_s=1e6))

    assert app._heartbeat_age() == app._vital(lambda vitals: vitals.poll_age_s) == 0
    app._is_joined = True
    assert app._heartbeat_age() > 1e6
    assert app._vital(lambda vitals: vitals.poll_age_s) == 1e6


async def test_vitals_are_on_the_page(app: App) -> None:
    """Each under its own name."""
    told = Vitals(
        is_ready=True,
        poll_age_s=2,
        draining_s=3,
        partitions_opening=4,
        offset_map_fill=0.5,
        lane_busy_s=6,
        lane_waiting=7,
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
                "lane_busy_seconds",
                "lane_waiting_commits",
            )
        }

    assert list(shown.values()) == [1, 2, 3, 4, 0.5, 6, 7]
