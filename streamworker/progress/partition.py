"""Progress of a partition: finished and open offsets, delivery counts, and the point to commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.model import CommitPoint
from streamworker.progress.offset_map import FULL, LIMIT, OffsetMap, encode_map
from streamworker.progress.tracker import OffsetTracker

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["MAX_AHEAD", "PartitionProgress"]


MAX_AHEAD = 16_384
"""Finished offsets that may lie beyond the committed one. Each commit iterates over all of them."""


MIN_LIMIT = 64
"""Characters of metadata that every broker is taken to accept: a map without offsets has fewer."""


class PartitionProgress:
    """Progress of one assignment of one partition.

    `commit_id` marks its commits as its own. `limit` is the number of characters of commit metadata that the broker
    accepts.
    """

    def __init__(self, committed: int, offset_map: OffsetMap, *, commit_id: str, limit: int = LIMIT) -> None:
        self._limit = limit
        self._tracker = OffsetTracker(committed, finished=offset_map.finished)
        self._deliveries = dict(offset_map.deliveries)
        self._commit_id = commit_id
        self._commits = 0
        self._map_size = 0
        self._beyond = 0
        self.is_cut = False
        """Whether the last point omits part of the map, because the broker would have rejected its size."""

    def begin(self, offset: int) -> int:
        """Accept a record; return how many times it has now been delivered, or 0 if its job is finished or open.

        The delivery is stored by `count`, when the job begins: a job that only waited cannot have killed a
        worker.
        """
        return self._deliveries.get(offset, 0) + 1 if self._tracker.begin(offset) else 0

    def count(self, offset: int) -> None:
        """Store this delivery, because its job begins."""
        self._deliveries[offset] = self._deliveries.get(offset, 0) + 1

    def finish(self, offset: int) -> None:
        """Mark this record's job as finished."""
        self._tracker.finish(offset)
        self._deliveries.pop(
            offset, None
        )  # present if the job was returned while its terminal event was being committed

    def give_back(self, offsets: Iterable[int]) -> None:
        """Return accepted records whose jobs did not begin; they must be read again from `position` on."""
        self._tracker.give_back(offsets)

    def undo_count(self, offset: int) -> None:
        """Undo this delivery's count: a clean shutdown returned the job. Nothing happens if the job is finished."""
        if offset not in self._deliveries:
            return
        count = self._deliveries[offset] - 1
        if count:
            self._deliveries[offset] = count
        else:
            del self._deliveries[offset]

    def point(self, *, finishing: Collection[int] = ()) -> CommitPoint:
        """Return what to commit now, with the open offsets that this commit finishes.

        They stay open until `finish`, because the broker may refuse the commit. Every point is different, so that a
        commit can be recognised in the log.
        """
        self._commits += 1
        # A record that was compacted away after a crash is never fetched again; its count is dropped when it
        # is passed.
        self._deliveries = {
            offset: count for offset, count in self._deliveries.items() if offset >= self._tracker.position
        }
        committed, finished = self._tracker.after(finishing)
        deliveries = {
            offset: count
            for offset, count in self._deliveries.items()
            if offset >= committed and offset not in finished
        }
        offset_map = OffsetMap(finished, deliveries, f"{self._commit_id}.{self._commits}")
        metadata = encode_map(committed, offset_map)
        self._map_size, self._beyond = len(metadata), len(finished)
        self.is_cut = self._map_size > self._limit
        return CommitPoint(committed, _cut(committed, offset_map, self._limit) if self.is_cut else metadata)

    def metadata_refused(self) -> int:
        """Halve the limit, because the broker refused the last point's metadata; return the new limit.

        The broker's own limit cannot be read without the permission DESCRIBE_CONFIGS.
        """
        self._limit = max(MIN_LIMIT, min(self._map_size, self._limit) // 2)
        return self._limit

    @property
    def map_size(self) -> int:
        """Characters of the last point's map, before anything was omitted."""
        return self._map_size

    @property
    def fill(self) -> float:
        """Size of the last point's map as a share of the limit."""
        return self._map_size / self._limit

    @property
    def is_full(self) -> bool:
        """Whether the map is too large to accept new records.

        It is never full without open records: only records before the finished ones can make the map smaller.
        """
        is_large = self._map_size >= self._limit * FULL // LIMIT or self._beyond >= MAX_AHEAD
        return is_large and self._tracker.incomplete > 0

    def advance(self, offset: int) -> None:
        """Move the position to `offset`, because no record lies before it. Does nothing while a record is open."""
        self._tracker.advance(offset)

    @property
    def incomplete(self) -> int:
        """Number of open records."""
        return self._tracker.incomplete

    @property
    def position(self) -> int:
        """The offset of the next commit."""
        return self._tracker.position


def _cut(committed: int, offset_map: OffsetMap, limit: int) -> str:
    """Omit the least costly part. The broker would reject a larger commit every time, and the partition would
    stand still."""
    counted_anew = encode_map(committed, offset_map._replace(deliveries={}))
    return (
        counted_anew
        if len(counted_anew) <= limit
        else encode_map(committed, OffsetMap(commit_id=offset_map.commit_id))
    )
