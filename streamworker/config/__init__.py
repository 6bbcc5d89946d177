"""The configuration: a TOML file, overridden by environment variables `STREAMWORKER_<SECTION>__<NAME>`.

Each setting is declared once, in `settings`, with its default and its help text; `streamworker run --help`,
docs/configuration.md and the messages about unknown names are derived from these declarations.
"""

from streamworker.config.load import load, variables_read
from streamworker.config.settings import (
    PREFIX,
    BatchSettings,
    EventSettings,
    GatewaySettings,
    KafkaSettings,
    Settings,
    TelemetrySettings,
    TopicSettings,
    UpstreamSettings,
    WorkerSettings,
    describe,
)

__all__ = [
    "PREFIX",
    "BatchSettings",
    "EventSettings",
    "GatewaySettings",
    "KafkaSettings",
    "Settings",
    "TelemetrySettings",
    "TopicSettings",
    "UpstreamSettings",
    "WorkerSettings",
    "describe",
    "load",
    "variables_read",
]
