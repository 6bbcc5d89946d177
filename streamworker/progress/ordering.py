"""Jobs of one record key, one after another (`worker.ordering = "key"`).

Jobs of one key lie in one partition, so the order needs no more than this partition's memory, and a new owner of the
partition finds it again in the log: it begins at the lowest unfinished offset.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

__all__ = ["KeyOrder"]

Item = TypeVar("Item")


class KeyOrder(Generic[Item]):
    """Who may go, and who waits behind whom. Holds nothing for a key whose last job has left."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Item]] = {}
        self.waiting = 0
        """How many items wait."""

    def enter(self, key: bytes, item: Item) -> bool:
        """Come with an item; True if it may go now, False if it waits for those of its key that came before."""
        queue = self._queues.get(key)
        if queue is None:
            self._queues[key] = deque()
            return True
        queue.append(item)
        self.waiting += 1
        return False

    def withdraw(self, key: bytes, item: Item) -> None:
        """Stop waiting. Nothing happens if the item does not wait."""
        queue = self._queues.get(key)
        if queue and item in queue:
            queue.remove(item)
            self.waiting -= 1

    def leave(self, key: bytes) -> Item | None:
        """The key's item that went has ended; return the one that may go now, None if none waits."""
        queue = self._queues[key]
        if not queue:
            del self._queues[key]
            return None
        self.waiting -= 1
        return queue.popleft()
