"""The job ids of a partition's last records, so that a record that repeats an id is found."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

__all__ = ["RecentIds"]

_DIGEST_BYTES = 16


class RecentIds:
    """The job ids of the last `records` offsets of one assignment of one partition; 0: of none.

    An id is stored as a digest of 16 bytes, and there are at most `records` of them. Each operation takes constant
    time, amortised.
    """

    def __init__(self, records: int) -> None:
        self._records = records
        self._offsets: OrderedDict[bytes, int] = OrderedDict()  # digest -> greatest offset with this id
        self._newest = -1

    def __len__(self) -> int:
        """Return how many ids are remembered."""
        return len(self._offsets)

    def earlier(self, job_id: str, offset: int) -> int | None:
        """Return the offset before `offset` at which this id came within the window; None if it did not.

        A record that is delivered once more is not a duplicate of itself, nor of a later record.
        """
        known = self._offsets.get(_digest(job_id))
        return known if known is not None and 0 < offset - known <= self._records else None

    def remember(self, job_id: str, offset: int) -> None:
        """Store that the record at `offset` has this id. Records may be delivered again."""
        self._newest = max(self._newest, offset)
        digest = _digest(job_id)
        if self._newest - offset < self._records and self._offsets.get(digest, -1) < offset:
            self._offsets[digest] = offset
            self._offsets.move_to_end(digest)
        while self._offsets and self._is_over(next(iter(self._offsets.values()))):
            self._offsets.popitem(last=False)

    def _is_over(self, oldest: int) -> bool:
        """Return whether the first id must be forgotten: no record that follows is within its window."""
        return self._newest - oldest >= self._records or len(self._offsets) > self._records


def _digest(job_id: str) -> bytes:
    return blake2b(job_id.encode(), digest_size=_DIGEST_BYTES).digest()
