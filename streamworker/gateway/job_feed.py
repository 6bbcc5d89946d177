"""One job's events for one client: the mailbox, and the waiting for it."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Protocol

from streamworker.gateway.cursors import Cursor, attempt8
from streamworker.gateway.feeds import START, FeedEvent
from streamworker.gateway.mailbox import Opening
from streamworker.handover import Kind, read_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.gateway.feeds import Push, Tally
    from streamworker.gateway.frames import DeltaFraming
    from streamworker.gateway.mailbox import Mailbox
    from streamworker.handover import Delivery, Handover

__all__ = ["FeedOwner", "JobFeed"]

_KINDS = {Kind.STARTED: "started", Kind.RESTARTED: "started", Kind.DELTA: "delta", Kind.ENDED: "usage"}

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A type that may be the name of a server-sent event: it must not have a line end."""


class FeedOwner(Protocol):
    """What a feed needs of the log that opened it."""

    def refill(self, feed: JobFeed) -> None:
        """Continue the replay of a feed whose mailbox has room again."""
        ...

    def forget(self, feed: JobFeed) -> None:
        """Release what a feed holds. Repeated calls do nothing."""
        ...

    def position(self, partition: int) -> int:
        """Return the position of the tail."""
        ...


class JobFeed:
    """Implements `Feed`. `behind` is the cursor behind which it begins; None for the job's first event."""

    __slots__ = (
        "_attempt",
        "_attempt8",
        "_begin",
        "_delivered",
        "_error",
        "_first",
        "_framing",
        "_is_held",
        "_waiter",
        "_write",
        "direct",
        "is_over",
        "last",
        "mailbox",
        "owner",
        "partition",
        "resumed_from",
    )

    def __init__(
        self,
        owner: FeedOwner,
        mailbox: Mailbox,
        *,
        behind: Cursor | None = None,
    ) -> None:
        self.owner = owner
        self.mailbox = mailbox
        self.partition = mailbox.partition
        self.is_over = False
        self.direct: Handover | None = None
        """Decides which records of the tail `frame` takes. Set while `next` waits, and nothing is queued, and its caller
        takes deltas by a call."""
        self.resumed_from = START if behind is None else str(behind)
        self.last = b""
        """The cursor of the last event that was taken; empty before the first one."""
        self._begin: Cursor | int = behind or mailbox.position  # no object of its own for a place
        self._attempt, self._attempt8 = "", b""
        self._first: FeedEvent | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_held = False
        self._framing: DeltaFraming
        self._write: Callable[[bytes], object]
        self._delivered: Tally

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.mailbox.job_id

    @property
    def cursor(self) -> str:
        """The cursor of the last event that was taken; before the first one, a place."""
        if self.last:
            return self.last.decode()
        begin = self._begin
        return str(begin if isinstance(begin, Cursor) else Cursor(self.partition, begin))

    @property
    def is_live(self) -> bool:
        """Whether the replay is over."""
        return self.mailbox.is_live or self.mailbox.is_over

    def take(self) -> FeedEvent | None:
        """Return the next event without waiting; None if there is none."""
        if self._error is not None:
            return None
        if self._first is not None:
            event, self._first = self._first, None
            self.last = event.cursor.encode()
            return event
        delivery = self.fold()
        if delivery is None:
            return None
        kind = _KINDS.get(delivery.kind) or _name_of(delivery.value)
        return FeedEvent(kind, self.cursor, delivery.value, delivery.seq, delivery.attempt)

    def fold(self) -> Delivery | None:
        """Take the next event as the mailbox has it; None if there is none."""
        mailbox = self.mailbox
        delivery = mailbox.take()
        if delivery is None:
            return None
        if delivery.attempt != self._attempt:
            self._note_attempt(delivery.attempt)
        cursor = b"%d.%d.%d.%b" % (self.partition, delivery.offset, delivery.seq, self._attempt8)
        if delivery.kind is Kind.ENDED:
            self.last = cursor + b".end"
            self.is_over = True
            self.owner.forget(self)
        else:
            self.last = cursor
            if not mailbox.is_live and mailbox.wants_records:
                self.owner.refill(self)
        return delivery

    async def next(self, push: Push | None = None) -> FeedEvent | None:
        """Wait for the next event; None behind `usage`. Raises FeedLost, BrokerUnavailable."""
        self._is_held = False
        while (event := self.take()) is None:
            if self.is_over:
                return None
            if push is not None and not self._is_held and (direct := self.mailbox.direct()) is not None:
                self._framing, self._write, self._delivered = push
                if direct.attempt != self._attempt:
                    self._note_attempt(direct.attempt)
                self.direct = direct
            try:
                await self.changed()
            finally:
                self.direct = None
        return event

    def hold(self) -> None:
        """Take no further delta for `write` in the present call of `next`, which a record that is not delivered wakes too."""
        self._is_held = True
        self.direct = None

    def frame(self, offset: int, seq: int, value: bytes, cursor: bytes | None) -> bytes:
        """Take a delta that passed `direct`; return it framed. The caller passes it to `write` before another task runs.

        `cursor` is `last` of another feed that took this record; None for the first one.
        """
        if cursor is None:
            cursor = b"%d.%d.%d.%b" % (self.partition, offset, seq, self._attempt8)
        self.last = cursor
        return self._framing.delta(cursor, value)

    def write(self, data: bytes) -> None:
        """Write a delta that `frame` returned."""
        try:
            self._write(data)
            self._delivered.events += 1
        except Exception as error:  # noqa: BLE001 - of one client, which must not end the reader of all
            self.fail(error)

    def _note_attempt(self, attempt: str) -> None:
        self._attempt, self._attempt8 = attempt, attempt8(attempt).encode()

    async def changed(self) -> None:
        """Wait until the mailbox has news. Raises FeedLost, BrokerUnavailable."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    async def opened(self) -> Opening:
        """Wait until it is known whether the place is right. Raises as `next` does."""
        while self.mailbox.opening is Opening.PENDING:
            await self.changed()
        return self.mailbox.opening

    def put_first(self, event: FeedEvent) -> None:
        """Let `take` return this event next."""
        self._first = event

    def place(self) -> str:
        """Return a cursor from which to resume that is as late as possible."""
        mailbox = self.mailbox
        is_untouched = not self.last and not mailbox.queued_bytes
        if is_untouched and mailbox.is_live and mailbox.opening is Opening.EMPTY:
            return str(Cursor(mailbox.partition, self.owner.position(mailbox.partition)))
        return self.cursor

    def wake(self) -> None:
        """Wake the task that waits."""
        self.direct = None
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Drop what is queued, and raise this error in `next`."""
        if self._error is None:
            self._error = error
        self.wake()

    @property
    def queued_bytes(self) -> int:
        """Size of what is queued."""
        return self.mailbox.queued_bytes

    def share(self, limit_reached: Callable[[int], bool] | None) -> None:
        """Obey a limit that feeds share, besides that of the mailbox."""
        self.mailbox.limit_reached = limit_reached

    def close(self) -> None:
        """End the feed."""
        self.owner.forget(self)


def _name_of(value: bytes) -> str:
    """Return the type of an event of an unknown type; `other` for one that cannot be the name of a server-sent event."""
    head = read_head(value)
    return head.type if head is not None and _NAME.fullmatch(head.type) else "other"
