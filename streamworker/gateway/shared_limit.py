"""The limit of all mailboxes of one connection. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamworker.gateway.feeds import Feed

__all__ = ["CONNECTION_BYTES", "SharedLimit"]

CONNECTION_BYTES = 1 << 20
"""Size of the queued events of one connection."""

_ALWAYS_BYTES = 1024
"""A mailbox may have this much whatever the others have: each of them goes on at its client's pace."""


class SharedLimit:
    """The feeds of one connection. A mailbox takes no further record when all of them together are above the limit.

    A mailbox that may not grow leaves the live path, as one that is full: the log is the buffer.
    """

    def __init__(self, limit_bytes: int = CONNECTION_BYTES) -> None:
        self._limit = limit_bytes
        self._feeds: list[Feed] = []  # an empty set takes four times the memory

    @property
    def queued_bytes(self) -> int:
        """Size of what is queued in all mailboxes."""
        return sum(feed.queued_bytes for feed in self._feeds)

    def add(self, feed: Feed) -> None:
        """Let a feed share the limit."""
        self._feeds.append(feed)
        feed.share(self._is_reached)

    def remove(self, feed: Feed) -> None:
        """Let a feed share the limit no longer."""
        self._feeds.remove(feed)
        feed.share(None)

    def _is_reached(self, queued_bytes: int) -> bool:
        reserved = len(self._feeds) * _ALWAYS_BYTES
        return queued_bytes > _ALWAYS_BYTES and self.queued_bytes > self._limit - reserved
