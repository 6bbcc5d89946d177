"""Which offsets of a partition are finished, and what may be committed.

The tracker only knows offsets that it was given, so gaps from compaction and transaction markers need no code. What
may be committed is the lowest incomplete offset; with none incomplete it is the highest *succeeded* plus one. "Seen"
is not "done": taking the highest seen instead has lost records elsewhere (parallel-consumer #826).
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["OffsetTracker"]


class OffsetTracker:
    """The offsets of one assignment of one partition.

    `begin` an offset when its record is taken, `finish` it when its terminal event is acknowledged. Every operation is
    amortised O(log n) in the offsets between the committed one and the newest.
    """

    def __init__(self, committed: int, *, finished: Iterable[int] = ()) -> None:
        """Start at a committed offset (the next to read), with the offsets beyond it that are finished already."""
        self._position = committed
        self._incomplete: set[int] = set()
        self._order: list[int] = []  # heap of incomplete offsets; finished ones leave it lazily
        self._finished: set[int] = {offset for offset in finished if offset >= committed}
        self._finished_order = sorted(self._finished)  # a heap of the same, to forget them in order
        self._highest_succeeded = committed - 1

    def begin(self, offset: int) -> bool:
        """Take an offset in; False if there is nothing to do: it is finished, or open already."""
        if offset in self._incomplete:
            return False
        if self.is_finished(offset):
            self._succeed(offset)
            return False
        self._incomplete.add(offset)
        heappush(self._order, offset)
        return True

    def finish(self, offset: int) -> None:
        """Note that nothing is owed for this offset any more. It must be open."""
        self._incomplete.remove(offset)
        self._finished.add(offset)
        heappush(self._finished_order, offset)
        self._succeed(offset)

    def is_finished(self, offset: int) -> bool:
        """Whether this offset is finished: below the position, or beyond it and known."""
        return offset < self._position or offset in self._finished

    @property
    def position(self) -> int:
        """What may be committed: everything below it is finished."""
        return self._position

    @property
    def finished_beyond(self) -> frozenset[int]:
        """The finished offsets at and beyond `position`; what a restart would run again without an offset map."""
        return frozenset(self._finished)

    @property
    def incomplete(self) -> int:
        """How many offsets are open."""
        return len(self._incomplete)

    def _succeed(self, offset: int) -> None:
        # Only now that its record was seen: an offset known finished from an earlier run says nothing about the
        # records before it that have not been delivered to us yet.
        self._highest_succeeded = max(self._highest_succeeded, offset)
        while self._order and self._order[0] not in self._incomplete:
            heappop(self._order)
        lowest = self._order[0] if self._order else self._highest_succeeded + 1
        self._position = max(self._position, lowest)
        while self._finished_order and self._finished_order[0] < self._position:
            self._finished.remove(heappop(self._finished_order))
