"""Tracks which offsets of a partition are finished and which offset may be committed.

The tracker knows only offsets that it was given, so gaps from compaction and transaction markers need no
code. The offset that may be committed is the lowest incomplete one; with none incomplete it is the highest
*succeeded* offset plus one. The highest *seen* offset would be wrong: it lost records elsewhere
(parallel-consumer #826).
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["OffsetTracker"]


class OffsetTracker:
    """The offsets of one assignment of one partition.

    Call `begin` when a record is accepted and `finish` when its terminal event is acknowledged. Each
    operation is amortised O(log n) in the number of offsets between the committed one and the newest.
    """

    def __init__(self, committed: int, *, finished: Iterable[int] = ()) -> None:
        """Start at a committed offset (the next to read), with the offsets beyond it that are already finished."""
        self._position = committed
        self._incomplete: set[int] = set()
        self._order: list[int] = []  # heap of incomplete offsets; finished ones are removed lazily
        self._returned: deque[int] = (
            deque()
        )  # incomplete offsets, in order, that are to be accepted once more
        self._finished: set[int] = {offset for offset in finished if offset >= committed}
        self._finished_order = sorted(self._finished)  # heap of the same offsets, to remove them in order
        self._highest_succeeded = committed - 1

    def begin(self, offset: int) -> bool:
        """Accept an offset; return False if it is finished or open already."""
        while self._returned and self._returned[0] < offset:  # the log has deleted the record
            self._incomplete.remove(self._returned.popleft())
        if self._returned and self._returned[0] == offset:
            self._returned.popleft()
            return True
        if offset in self._incomplete:
            return False
        if self.is_finished(offset):
            self._succeed(offset)
            return False
        self._incomplete.add(offset)
        heappush(self._order, offset)
        return True

    def finish(self, offset: int) -> None:
        """Mark an open offset as finished."""
        self._incomplete.remove(offset)
        self._finished.add(offset)
        heappush(self._finished_order, offset)
        self._succeed(offset)

    def give_back(self, offsets: Iterable[int]) -> None:
        """Return open offsets whose jobs did not begin, so that `begin` accepts them once more.

        They stay incomplete: `position` cannot pass them. No offset may be accepted before the records are read again
        from `position` on.
        """
        self._returned = deque(sorted({*self._returned, *offsets}))

    def advance(self, offset: int) -> None:
        """Move the position to `offset`, because no record lies before it. Does nothing while an offset is open.

        Transaction markers and aborted records have offsets, and are never given to `begin`.
        """
        if not self._incomplete and offset > self._position:
            self._succeed(offset - 1)

    def after(self, offsets: Collection[int]) -> tuple[int, frozenset[int]]:
        """Return what `position` and `finished_beyond` will be when these open offsets are finished; change nothing."""
        while self._order and self._order[0] not in self._incomplete:
            heappop(self._order)
        finished = self._finished.union(offsets)
        if not offsets:
            return self._position, frozenset(finished)
        if self._order and self._order[0] not in offsets:  # the lowest one stays open
            lowest = self._order[0]
        else:
            highest = max(self._highest_succeeded, *offsets)
            lowest = min(self._incomplete.difference(offsets), default=highest + 1)
        if lowest <= self._position:
            return self._position, frozenset(finished)
        return lowest, frozenset(one for one in finished if one >= lowest)

    def is_finished(self, offset: int) -> bool:
        """Whether this offset is finished: below the position, or known as finished beyond it."""
        return offset < self._position or offset in self._finished

    @property
    def position(self) -> int:
        """The offset that may be committed: every offset below it is finished."""
        return self._position

    @property
    def finished_beyond(self) -> frozenset[int]:
        """The finished offsets at and beyond `position`. Without an offset map a restart would run them again."""
        return frozenset(self._finished)

    @property
    def incomplete(self) -> int:
        """Number of open offsets, without those that were returned."""
        return len(self._incomplete) - len(self._returned)

    def _succeed(self, offset: int) -> None:
        # Count the offset only when its record is seen. An offset that an earlier run finished says nothing
        # about the records before it that are not delivered yet.
        self._highest_succeeded = max(self._highest_succeeded, offset)
        while self._order and self._order[0] not in self._incomplete:
            heappop(self._order)
        lowest = self._order[0] if self._order else self._highest_succeeded + 1
        self._position = max(self._position, lowest)
        while self._finished_order and self._finished_order[0] < self._position:
            self._finished.remove(heappop(self._finished_order))
