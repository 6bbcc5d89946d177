"""The reader of the events topic, in metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.telemetry import gateway_metrics as table

if TYPE_CHECKING:
    from streamworker.telemetry.metrics import Metrics

__all__ = ["LogMetrics"]


class LogMetrics:
    """Implements `LogObserver`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._subscriptions = 0

    def subscribed(self, change: int) -> None:
        """Count open feeds."""
        self._subscriptions += change
        self._metrics.set(table.SUBSCRIPTIONS, self._subscriptions)

    def followed_changed(self, partitions: int) -> None:
        """Set the number of partitions that the tail reads."""
        self._metrics.set(table.PARTITIONS_FOLLOWED, partitions)

    def replay_began(self, kind: str) -> None:
        """Count a replay."""
        self._metrics.add(table.REPLAYS, 1, kind)

    def scanned(self, records: int) -> None:
        """Count records that replays have read from Kafka."""
        self._metrics.add(table.RECORDS_SCANNED, records)

    def searched(self, outcome: str, records: int, seconds: float) -> None:
        """Record the cost of a search."""
        self._metrics.add(table.SEARCHED_RECORDS, records, outcome)
        self._metrics.observe(table.SEARCH_DURATION, seconds, outcome)

    def mailbox_overflowed(self) -> None:
        """Count a client that fell behind."""
        self._metrics.add(table.MAILBOX_OVERFLOWS)

    def history_changed(self, size: int) -> None:
        """Set the size of the recent records in memory."""
        self._metrics.set(table.HISTORY_BYTES, size)
