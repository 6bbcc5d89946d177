"""Runs jobs with the same record key one after another (`worker.ordering = "key"`).

Jobs with the same key lie in one partition, so the order can be kept in the memory of the partition's owner.
A new owner restores it from the log, because it starts at the lowest unfinished offset.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

__all__ = ["KeyOrder"]

Item = TypeVar("Item")


class KeyOrder(Generic[Item]):
    """A queue per key. It holds nothing for a key whose last job has left."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Item]] = {}
        self.waiting = 0
        """Number of items that wait."""

    def enter(self, key: bytes, item: Item) -> bool:
        """Add an item; return True if it may run now, False if it waits for earlier items of its key."""
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = deque()
            return True
        queue.append(item)
        self.waiting += 1
        return False

    def withdraw(self, key: bytes, item: Item) -> None:
        """Remove a waiting item. Nothing happens if the item does not wait."""
        queue = self._queues.get(key)
        if queue and item in queue:
            queue.remove(item)
            self.waiting -= 1

    def leave(self, key: bytes) -> Item | None:
        """Record that the key's running item has ended; return the next item, or None if none waits."""
        queue = self._queues[key]
        if not queue:
            del self._queues[key]
            return None
        self.waiting -= 1
        return queue.popleft()
