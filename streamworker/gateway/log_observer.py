"""What the reader of the events topic reports about itself, and an observer that ignores it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["LogObserver", "NullLogObserver"]


class LogObserver(Protocol):
    """Called in the event loop; each call must return at once."""

    def subscribed(self, change: int) -> None:
        """Count open feeds: +1 for each that opens, -1 for each that is closed."""

    def followed_changed(self, partitions: int) -> None:
        """Report how many partitions the tail reads now."""

    def replay_began(self, kind: str) -> None:
        """Count replays: `cursor`, `place`, `known` (id seen before), `search`, or `slow` (a client that fell behind)."""

    def scanned(self, records: int) -> None:
        """Count records that replays have read from Kafka, of all jobs."""

    def searched(self, outcome: str, records: int, seconds: float) -> None:
        """Report the cost of finding a job's first event: `found`, `empty` (no event yet), or `not_found`."""

    def mailbox_overflowed(self) -> None:
        """Count live feeds that were too slow and left the live path."""

    def history_changed(self, size: int) -> None:
        """Report the size of the recent records in memory, in bytes."""


class NullLogObserver:
    """Ignores all reports."""

    def subscribed(self, change: int) -> None: ...
    def followed_changed(self, partitions: int) -> None: ...
    def replay_began(self, kind: str) -> None: ...
    def scanned(self, records: int) -> None: ...
    def searched(self, outcome: str, records: int, seconds: float) -> None: ...
    def mailbox_overflowed(self) -> None: ...
    def history_changed(self, size: int) -> None: ...
