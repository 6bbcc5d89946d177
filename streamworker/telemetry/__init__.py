"""Logs, metrics, traces and probes of a running worker."""

from streamworker.telemetry.logging import configure_logging
from streamworker.telemetry.loop_lag import LoopLag
from streamworker.telemetry.metrics import LOOP_LAG, UNACKNOWLEDGED, Metrics
from streamworker.telemetry.observer import Telemetry
from streamworker.telemetry.probes import Probes

__all__ = [
    "LOOP_LAG",
    "UNACKNOWLEDGED",
    "LoopLag",
    "Metrics",
    "Probes",
    "Telemetry",
    "configure_logging",
]
