"""The mailbox of one subscription: a bounded queue of one job's events that the log refills.

A mailbox is either live, and gets what the readers of the log return, or it is replaying, and asks for the records from
`position` on. The log is the buffer: a live mailbox that is full leaves the live path, keeps what its client can take,
and is replayed from there at its client's pace. Nothing is lost or repeated thereby (`streamworker.handover`).

The first record decides whether the place of the replay was right: a cursor's event must be at its offset, and a search
must find a `started` first.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from streamworker.handover import Handover, read_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.gateway.cursors import Cursor
    from streamworker.handover import Delivery, EventHead, Kind

__all__ = ["MAILBOX_BYTES", "Fate", "Mailbox", "Opening"]

MAILBOX_BYTES = 256 << 10
"""Size of the queued events of one subscription."""


class Opening(Enum):
    """What is known of the place at which a mailbox began."""

    PENDING = auto()
    FOUND = auto()
    """The cursor's event, or the job's first event."""

    EMPTY = auto()
    """The log holds no event of the job behind the place."""

    LOST = auto()
    """The cursor's event is not where the cursor says."""

    UNOPENED = auto()
    """The first event is not a `started`."""

    SPENT = auto()
    """As many records were searched as may be, and none of them was the job's."""


_FAILED = frozenset({Opening.LOST, Opening.UNOPENED, Opening.SPENT})


class Fate(Enum):
    """What is known of the transaction of a record that is replayed."""

    FINAL = auto()
    """It was committed, or there was none."""

    ABORTED = auto()
    OPEN = auto()
    """The committed reader has not passed the record."""


class Mailbox:
    """`position` is where the replay begins: the offset of the cursor's event, or the first one that is searched."""

    __slots__ = (
        "_behind",
        "_committed",
        "_handover",
        "has_left",
        "is_closed",
        "is_live",
        "job_id",
        "key",
        "limit_bytes",
        "limit_reached",
        "opening",
        "partition",
        "position",
        "scan_limit",
        "scanned",
    )

    def __init__(
        self,
        job_id: str,
        partition: int,
        position: int,
        *,
        committed: int,
        cursor: Cursor | None = None,
        scan_limit: int | None = None,
        limit_bytes: int = MAILBOX_BYTES,
    ) -> None:
        """`committed` is the position of the committed reader now, `cursor` that of an event, not of a place.

        `scan_limit` is how many records may be looked at until the first one of the job is found.
        """
        self.job_id = job_id
        self.key = job_id.encode()
        self.partition = partition
        self.position = position
        """The next offset that a replay has to look at. It is not kept while the mailbox is live."""
        self.limit_bytes = limit_bytes
        self.limit_reached: Callable[[int], bool] | None = None
        """Whether what is queued here, in bytes, is too much for a limit that mailboxes share."""
        self.scan_limit = scan_limit
        self.scanned = 0
        """How many records were looked at, those of other jobs included."""
        self.opening = Opening.PENDING
        self.is_live = False
        self.is_closed = False
        self.has_left = False
        """Whether it has left the live path since this was last set to false."""
        self._committed = committed
        self._behind = cursor
        self._handover = Handover(tail=position, committed=committed, is_replaying=True, delivers_others=True)

    @property
    def is_over(self) -> bool:
        """Whether the terminal event can be taken or was taken: no event follows it."""
        return self._handover.is_over

    @property
    def has_ready(self) -> bool:
        """Whether `take` returns an event."""
        return self._handover.has_ready

    @property
    def is_stopped(self) -> bool:
        """Whether a replay must not go on now."""
        return self._is_full or self._handover.is_over or self.is_closed or self.opening in _FAILED

    @property
    def _is_full(self) -> bool:
        queued = self._handover.queued_bytes
        return queued > self.limit_bytes or (self.limit_reached is not None and self.limit_reached(queued))

    @property
    def wants_records(self) -> bool:
        """Whether a replay has to begin or go on: what is queued is at most half of the limit."""
        return (
            not self.is_live and not self.is_stopped and self._handover.queued_bytes <= self.limit_bytes // 2
        )

    @property
    def needs_its_record(self) -> bool:
        """Whether the record at `position` has to be read, even if the tail is not there yet: the cursor names it."""
        return self.opening is Opening.PENDING and self._behind is not None

    @property
    def queued_bytes(self) -> int:
        """Size of what is queued."""
        return self._handover.queued_bytes

    @property
    def is_waiting(self) -> bool:
        """Whether records are queued that a new position of a reader may release."""
        return self._handover.is_waiting

    @property
    def next_kind(self) -> Kind | None:
        """The kind of the event that `take` returns next; None if there is none now."""
        return self._handover.next_kind

    def take(self) -> Delivery | None:
        """Return the next event; None if there is none now."""
        return self._handover.take()

    # Replay

    def replay(self, offset: int, value: bytes | None, fate: Fate) -> None:
        """Take a record of the job at `position` or behind it."""
        if (head := read_head(value)) is None or value is None:
            return
        if self.opening is Opening.PENDING and not self._begins(offset, head, fate):
            return
        if fate is Fate.OPEN:
            self._handover.replayed(offset, head, value)
        elif fate is Fate.FINAL or head.type != "usage":
            self._handover.replayed_committed(offset, head, value)

    def passed(self, position: int) -> None:
        """Note that the replay has looked at every record before this offset."""
        if position <= self.position:
            return
        self.scanned += position - self.position
        self.position = position
        if self.opening is not Opening.PENDING:
            return
        if self._behind is not None:  # its offset was the first one to look at
            self.opening = Opening.LOST
        elif self.scan_limit is not None and self.scanned > self.scan_limit:
            self.opening = Opening.SPENT

    def join(self, *, tail: int, committed: int) -> None:
        """Go live. The replay has looked at every record before `tail`, the position of the tail now."""
        self.is_live = True
        if self.opening is Opening.PENDING:
            self.opening = Opening.EMPTY
        self._handover.caught_up(tail=tail, committed=committed)

    def _begins(self, offset: int, head: EventHead, fate: Fate) -> bool:
        """Judge the first record; return whether it is delivered."""
        if self._behind is not None:
            if self._behind.names(offset, head):
                self.opening = Opening.FOUND
                self._handover = Handover(
                    tail=offset + 1,
                    committed=self._committed,
                    is_replaying=True,
                    behind=(offset, head),
                    delivers_others=True,
                )
            else:
                self.opening = Opening.LOST
            return False
        if head.type == "started" or (head.type == "usage" and head.seq == 0):
            if head.type == "usage" and fate is Fate.ABORTED:
                return False
            self.opening = Opening.FOUND
            return True
        self.opening = Opening.UNOPENED
        return False

    # Live

    def direct(self) -> Handover | None:
        """Return what decides on the tail's next records (`Handover.passes`); None unless it is live and nothing is ready.

        The caller delivers the deltas that pass, until a record is passed to this mailbox.
        """
        handover = self._handover
        return handover if self.is_live and not handover.has_ready else None

    def tail(self, offset: int, head: EventHead, value: bytes) -> None:
        """Take a record that the tail has returned. A mailbox that it makes too full is not live any more."""
        handover = self._handover
        handover.tail(offset, head, value)
        if self._is_full:
            self.is_live = False
            self.has_left = True
            self.position = handover.leave()

    def committed(self, offset: int, head: EventHead, value: bytes) -> None:
        """Take a record that the committed reader has returned, whether the mailbox is live or not."""
        self._handover.committed(offset, head, value)

    def readers_passed(self, *, tail: int, committed: int) -> None:
        """Note the readers' new positions."""
        self._handover.passed(tail=tail, committed=committed)
