"""Where jobs begin: the places of the `started` events that the tail has returned."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

__all__ = ["KnownJobs", "Place"]

_LIMIT = 100_000


class Place(NamedTuple):
    """The coordinates of a record."""

    partition: int
    offset: int


class KnownJobs:
    """The first `started` of each job, by the key of its records. Above the limit, the jobs that were added first are dropped."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._places: OrderedDict[bytes, Place] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> Place | None:
        """Return where a job begins."""
        return self._places.get(key)

    def add(self, key: bytes, place: Place) -> None:
        """Remember where a job begins, unless an earlier place is known."""
        if key not in self._places:
            self._places[key] = place
            while len(self._places) > self._limit:
                self._places.popitem(last=False)

    def forget(self, key: bytes) -> None:
        """Forget a job whose `started` is not where it was."""
        self._places.pop(key, None)

    def drop(self, partition: int) -> None:
        """Forget the jobs of a partition."""
        self._places = OrderedDict((key, at) for key, at in self._places.items() if at.partition != partition)
