"""How far a partition is: offsets finished and open, deliveries counted, and the commit that says so."""

from __future__ import annotations

from streamworker.core.offsetmap import FULL, OffsetMap, encode_map
from streamworker.core.offsets import OffsetTracker
from streamworker.model import CommitPoint

__all__ = ["Progress"]


class Progress:
    """One assignment of one partition. `stamp` makes its commits its own."""

    def __init__(self, committed: int, offset_map: OffsetMap, *, stamp: str) -> None:
        self._tracker = OffsetTracker(committed, finished=offset_map.finished)
        self._deliveries = dict(offset_map.deliveries)
        self._stamp = stamp
        self._commits = 0
        self._map_size = 0

    def begin(self, offset: int) -> int:
        """Take a record in; return how often it has now been delivered, or 0 if there is nothing to do."""
        if not self._tracker.begin(offset):
            return 0
        count = self._deliveries[offset] = self._deliveries.get(offset, 0) + 1
        return count

    def finish(self, offset: int) -> None:
        """Nothing is owed for this record any more."""
        self._tracker.finish(offset)
        del self._deliveries[offset]

    def hand_back(self, offset: int) -> None:
        """Let an open record go in peace: its next owner's delivery is not counted against it."""
        count = self._deliveries[offset] - 1
        if count:
            self._deliveries[offset] = count
        else:
            del self._deliveries[offset]

    def point(self) -> CommitPoint:
        """Return what to commit now. No two are equal, so that a commit can be recognised in the log."""
        self._commits += 1
        committed = self._tracker.position
        # A record that was compacted away after a crash is never seen again; its count goes when it is passed.
        self._deliveries = {
            offset: count for offset, count in self._deliveries.items() if offset >= committed
        }
        offset_map = OffsetMap(
            self._tracker.finished_beyond, self._deliveries, f"{self._stamp}.{self._commits}"
        )
        metadata = encode_map(committed, offset_map)
        self._map_size = len(metadata)
        return CommitPoint(committed, metadata)

    @property
    def map_size(self) -> int:
        """Characters of the last commit's map."""
        return self._map_size

    @property
    def is_full(self) -> bool:
        """Whether the map is so large that no new record may be taken in."""
        return self._map_size >= FULL

    @property
    def incomplete(self) -> int:
        """How many records are open."""
        return self._tracker.incomplete

    @property
    def position(self) -> int:
        """The offset of the next commit."""
        return self._tracker.position
