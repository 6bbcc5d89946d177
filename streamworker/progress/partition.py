"""How far a partition is: offsets finished and open, deliveries counted, and the commit that says so."""

from __future__ import annotations

from streamworker.model import CommitPoint
from streamworker.progress.offset_map import FULL, LIMIT, OffsetMap, encode_map
from streamworker.progress.tracker import OffsetTracker

__all__ = ["MAX_AHEAD", "PartitionProgress"]


MAX_AHEAD = 16_384
"""Finished offsets that may lie beyond the committed one. Each commit goes through them all."""


class PartitionProgress:
    """One assignment of one partition. `stamp` makes its commits its own."""

    def __init__(self, committed: int, offset_map: OffsetMap, *, commit_id: str) -> None:
        self._tracker = OffsetTracker(committed, finished=offset_map.finished)
        self._deliveries = dict(offset_map.deliveries)
        self._commit_id = commit_id
        self._commits = 0
        self._map_size = 0
        self._beyond = 0
        self.is_cut = False
        """Whether the last point leaves out what we know, because the broker would have refused it."""

    def begin(self, offset: int) -> int:
        """Take a record in; return how often it has now been delivered, or 0 if there is nothing to do.

        The delivery goes on record with `count`, when the job begins: one that only waited cannot have done harm.
        """
        return self._deliveries.get(offset, 0) + 1 if self._tracker.begin(offset) else 0

    def count(self, offset: int) -> None:
        """Put this delivery on record, for its job begins."""
        self._deliveries[offset] = self._deliveries.get(offset, 0) + 1

    def finish(self, offset: int) -> None:
        """Nothing is owed for this record any more."""
        self._tracker.finish(offset)
        self._deliveries.pop(offset, None)  # handed back before, where its end was waiting to be committed

    def hand_back(self, offset: int) -> None:
        """Let a record go in peace: its next owner's delivery is not counted against it. A finished one needs none."""
        if offset not in self._deliveries:
            return
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
        finished = self._tracker.finished_beyond
        offset_map = OffsetMap(finished, self._deliveries, f"{self._commit_id}.{self._commits}")
        metadata = encode_map(committed, offset_map)
        self._map_size, self._beyond = len(metadata), len(finished)
        self.is_cut = self._map_size > LIMIT
        return CommitPoint(committed, _cut(committed, offset_map) if self.is_cut else metadata)

    @property
    def map_size(self) -> int:
        """Characters of the last commit's map."""
        return self._map_size

    @property
    def is_full(self) -> bool:
        """Whether the map is so large that no new record may be taken in.

        With nothing open it is not: only the records before the finished ones can make it smaller.
        """
        is_large = self._map_size >= FULL or self._beyond >= MAX_AHEAD
        return is_large and self._tracker.incomplete > 0

    @property
    def incomplete(self) -> int:
        """How many records are open."""
        return self._tracker.incomplete

    @property
    def position(self) -> int:
        """The offset of the next commit."""
        return self._tracker.position


def _cut(committed: int, offset_map: OffsetMap) -> str:
    """Leave out what costs least: a refused commit would be refused for ever, and the partition stand still."""
    counted_anew = encode_map(committed, offset_map._replace(deliveries={}))
    return (
        counted_anew
        if len(counted_anew) <= LIMIT
        else encode_map(committed, OffsetMap(commit_id=offset_map.commit_id))
    )
