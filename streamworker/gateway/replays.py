"""Replays from Kafka: merged scans, so that a part of the log is read once for all who wait for it.

A mailbox waits at its position. A pass reads from the lowest position on, and serves each mailbox that it reaches. It
ends when no mailbox waits shortly ahead of it; mailboxes behind it wait for the next pass. A partition has at most two
passes, so that a client that resumes near the end does not wait for a search from far behind.

What a pass reads near the tail is kept in the history. A pass stops where the history or the other pass begins: its
mailboxes take what is kept, and wait for the other pass where that is. So two passes never read the same records near
the tail, in whatever order the clients come. Nothing is read from the tail's position on: a mailbox there waits for the
tail.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from streamworker.errors import KafkaError
from streamworker.gateway.history import Block
from streamworker.kafka.scan import is_aborted
from streamworker.log_throttle import OutageLog
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from streamworker.gateway.history import History
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.gateway.mailbox import Mailbox
    from streamworker.kafka.clients import FetchedRecord
    from streamworker.kafka.scan import LogScanner

__all__ = ["Positions", "Replays"]

PASSES = 2
"""Passes of one partition at the same time."""

NEAR = 20_000
"""A pass serves the mailboxes that wait at most this number of records ahead of it."""

_KEPT = 100_000
"""Records that are at most this far behind the tail are kept in memory: other clients will need them soon."""

_BACKOFF_S = 0.5

_USAGE = b'"usage"'
"""A text that the values of terminal events have."""


class Positions(Protocol):
    """The positions of the live readers."""

    def tail_position(self, partition: int) -> int:
        """Return that of the tail."""
        ...

    def committed_position(self, partition: int) -> int:
        """Return that of the committed reader."""
        ...


class Replays:
    """The mailboxes that wait for records from Kafka.

    `on_served(mailbox)` is called for each mailbox that a pass has served. `on_failed(mailboxes, error)` is called
    when a pass ends with an error that is not Kafka's.
    """

    def __init__(
        self,
        scanner: LogScanner,
        topic: str,
        history: History,
        positions: Positions,
        *,
        on_served: Callable[[Mailbox], None],
        on_failed: Callable[[Sequence[Mailbox], Exception], None],
        observer: LogObserver,
    ) -> None:
        self._scanner = scanner
        self._topic = topic
        self._history = history
        self._positions = positions
        self._on_served = on_served
        self._on_failed = on_failed
        self._observer = observer
        self._waiting: dict[int, dict[Mailbox, None]] = {}  # by partition
        self._passes: dict[int, dict[asyncio.Task[None], int]] = {}  # by partition, with the pass's position
        self._ending: set[asyncio.Task[None]] = set()  # passes that were cancelled
        self._outages = OutageLog("gateway.replays_recovered", topic=topic)

    async def stop(self) -> None:
        """End all passes. Bounded in time; never raises."""
        for partition in self._passes:
            self.cancel(partition)
        if self._ending:
            await asyncio.wait(self._ending)

    def add(self, mailbox: Mailbox) -> None:
        """Let a mailbox wait for the records at its position."""
        partition, position = mailbox.partition, mailbox.position
        self._waiting.setdefault(partition, {})[mailbox] = None
        passes = self._passes.setdefault(partition, {})
        if position >= self._positions.tail_position(partition):
            return  # the tail returns the record soon: see `serve`
        if len(passes) < PASSES and not _is_near(position, passes.values()):
            self._begin_pass(partition, position)

    def discard(self, mailbox: Mailbox) -> None:
        """Let a mailbox wait no longer."""
        if (waiting := self._waiting.get(mailbox.partition)) is not None:
            waiting.pop(mailbox, None)

    def serve(self, block: Block) -> None:
        """Advance the mailboxes that wait within a block. Call it with each block that the tail has extended."""
        if not (waiting := self._waiting.get(block.partition)):
            return
        committed = self._positions.committed_position(block.partition)
        for mailbox in [one for one in waiting if block.begin <= one.position < block.end]:
            block.replay(mailbox, committed)
            if not mailbox.wants_records:
                waiting.pop(mailbox, None)
            self._on_served(mailbox)

    def cancel(self, partition: int) -> None:
        """End the passes of a partition.

        A pass takes some time to end, and a mailbox that is added meanwhile must not rely on it.
        """
        passes = self._passes.get(partition, {})
        for task in passes:
            task.cancel()
        self._ending.update(passes)
        passes.clear()

    # Passes

    def _begin_pass(self, partition: int, position: int) -> None:
        task = asyncio.create_task(self._run(partition), name=f"replay {self._topic}-{partition}")
        self._passes[partition][task] = position
        task.add_done_callback(self._ending.discard)

    async def _run(self, partition: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._pass(partition, task)
        finally:  # not in a callback: the next mailbox must not rely on this pass
            self._passes[partition].pop(task, None)

    async def _pass(self, partition: int, task: asyncio.Task[None]) -> None:
        passes = self._passes[partition]
        while (start := self._next_start(partition, task)) is not None:
            passes[task] = start
            try:
                await self._scan(partition, start, task)
            except KafkaError as error:
                self._outages.failed("gateway.replays_failed", monotonic(), reason=str(error))
                await asyncio.sleep(_BACKOFF_S)
            except Exception as error:  # noqa: BLE001 - whatever it is, no mailbox must wait for ever
                waiting = list(self._waiting.pop(partition, {}))
                self._on_failed(waiting, error)
                return
            else:
                self._outages.worked()

    def _next_start(self, partition: int, task: asyncio.Task[None]) -> int | None:
        others = [position for other, position in self._passes[partition].items() if other is not task]
        return min((at for at in self._wanted(partition) if not _is_near(at, others)), default=None)

    async def _scan(self, partition: int, start: int, task: asyncio.Task[None]) -> None:
        """Read from `start` on until no mailbox waits near ahead, the range ends, or the history or another pass begins."""
        stop, is_committed = self._range(partition, start)
        stop = self._free_until(partition, start, stop, task)
        passes, position = self._passes[partition], start
        at = TopicPartition(self._topic, partition)
        scan = self._scanner.scan(at, start, stop, committed_only=is_committed, with_aborted=is_committed)
        async with aclosing(scan) as batches:
            async for records in batches:
                stop = self._free_until(partition, position, stop, task)  # another pass may have begun since
                if not is_committed:
                    stop = self._first_undecided(partition, records, stop)
                block = _block_of(partition, position, stop, records, is_committed=is_committed)
                passes[task] = position = block.end
                self._take(block)
                if position >= stop or not self._has_near(partition, position):
                    return
        self._take(_block_of(partition, position, stop, (), is_committed=is_committed))

    def _range(self, partition: int, start: int) -> tuple[int, bool]:
        """Return where the records end that one scan from `start` on can read, and whether they are committed."""
        committed = self._positions.committed_position(partition)
        is_committed = start < committed
        return (committed if is_committed else self._positions.tail_position(partition)), is_committed

    def _free_until(self, partition: int, position: int, stop: int, task: asyncio.Task[None]) -> int:
        """Return where the history or another pass begins behind `position`; at most `stop`."""
        passes = self._passes[partition].items()
        begins = [stop, *(at for other, at in passes if other is not task and at > position)]
        if (kept := self._history.next_begin(partition, position)) is not None:
            begins.append(kept)
        return min(begins)

    def _first_undecided(self, partition: int, records: Sequence[FetchedRecord], stop: int) -> int:
        """Return the offset of the first terminal event that the committed reader has passed since it was read; at most `stop`.

        It was committed or rolled back: a scan of committed records returns that too.
        """
        passed = min(stop, self._positions.committed_position(partition))
        return next((one.offset for one in records if one.offset < passed and _is_usage(one)), stop)

    def _take(self, block: Block) -> None:
        """Keep what a scan has returned, and serve it."""
        self._observer.scanned(block.count)
        tail = self._positions.tail_position(block.partition)
        if block.end <= tail <= block.begin + _KEPT:
            self._history.insert(block)
        self.serve(block)

    def _has_near(self, partition: int, position: int) -> bool:
        return any(_is_near(at, [position]) for at in self._wanted(partition))

    def _wanted(self, partition: int) -> Iterator[int]:
        """Yield the positions at which mailboxes wait for a scan: those at the tail's position wait for the tail."""
        tail = self._positions.tail_position(partition)
        positions = (mailbox.position for mailbox in self._waiting.get(partition, ()))
        return (position for position in positions if position < tail)


def _is_near(position: int, passes: Iterable[int]) -> bool:
    return any(at <= position <= at + NEAR for at in passes)


def _is_usage(record: FetchedRecord) -> bool:
    return record.value is not None and _USAGE in record.value


def _block_of(
    partition: int, begin: int, stop: int, records: Sequence[FetchedRecord], *, is_committed: bool
) -> Block:
    """Return the block of a scan's batch: every record from `begin` on, but none at `stop` or behind it."""
    end = stop
    if records and records[-1].offset < stop:
        end = records[-1].offset + 1
    else:
        records = [record for record in records if record.offset < stop]
    block = Block(partition, begin)
    block.add(records, end)
    if is_committed:
        block.committed = {one.offset for one in records if _is_usage(one) and not is_aborted(one)}
    return block
