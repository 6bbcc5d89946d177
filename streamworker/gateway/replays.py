"""Replays from Kafka: merged scans, so that a part of the log is read once for all who wait for it.

A mailbox waits at its position. A pass reads from the lowest position on, and serves each mailbox that it reaches. It
ends when no mailbox waits shortly ahead of it; mailboxes behind it wait for the next pass. A partition has at most two
passes, so that a client that resumes near the end does not wait for a search from far behind.
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
    from collections.abc import Callable, Iterable, Sequence

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
        waiting = self._waiting.setdefault(mailbox.partition, {})
        waiting[mailbox] = None
        passes = self._passes.setdefault(mailbox.partition, {})
        if len(passes) < PASSES and not _is_near(mailbox.position, passes.values()):
            self._begin_pass(mailbox.partition, mailbox.position)

    def discard(self, mailbox: Mailbox) -> None:
        """Let a mailbox wait no longer."""
        if (waiting := self._waiting.get(mailbox.partition)) is not None:
            waiting.pop(mailbox, None)

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
        task.add_done_callback(lambda task: self._ended(partition, task))

    def _ended(self, partition: int, task: asyncio.Task[None]) -> None:
        self._passes[partition].pop(task, None)
        self._ending.discard(task)

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
        waiting = self._waiting.get(partition, {})
        return min(
            (mailbox.position for mailbox in waiting if not _is_near(mailbox.position, others)), default=None
        )

    async def _scan(self, partition: int, start: int, task: asyncio.Task[None]) -> None:
        """Read from `start` on until no mailbox waits near ahead, or the records are in memory, or the range ends."""
        stop, is_committed = self._range(partition, start)
        passes, position = self._passes[partition], start
        at = TopicPartition(self._topic, partition)
        scan = self._scanner.scan(at, start, stop, committed_only=is_committed, with_aborted=is_committed)
        async with aclosing(scan) as batches:
            async for records in batches:
                if not is_committed and position < self._positions.committed_position(partition):
                    return  # the committed reader has passed this: read it again, to know what was rolled back
                block = _block_of(partition, position, records)
                self._observer.scanned(len(records))
                passes[task] = position = block.end
                self._keep(block, is_committed=is_committed)
                self._serve(block)
                if self._history.at(partition, position) is not None or not self._has_near(
                    partition, position
                ):
                    return
        if position < stop and (is_committed or position >= self._positions.committed_position(partition)):
            self._serve(_block_of(partition, position, (), end=stop))

    def _range(self, partition: int, start: int) -> tuple[int, bool]:
        """Return where a scan has to stop that begins at `start`, and whether it reads committed records."""
        committed, tail = (
            self._positions.committed_position(partition),
            self._positions.tail_position(partition),
        )
        is_committed = start < committed
        stop = committed if is_committed else max(tail, start + 1)
        following = self._history.next_begin(partition, start)
        return (stop if following is None else min(stop, following)), is_committed

    def _keep(self, block: Block, *, is_committed: bool) -> None:
        tail = self._positions.tail_position(block.partition)
        if is_committed and block.end <= tail <= block.begin + _KEPT:
            self._history.insert(block)

    def _serve(self, block: Block) -> None:
        """Advance the mailboxes that wait within the block."""
        committed = self._positions.committed_position(block.partition)
        waiting = self._waiting.get(block.partition, {})
        for mailbox in [one for one in waiting if block.begin <= one.position < block.end]:
            block.replay(mailbox, committed)
            if not mailbox.wants_records:
                waiting.pop(mailbox, None)
            self._on_served(mailbox)

    def _has_near(self, partition: int, position: int) -> bool:
        waiting = self._waiting.get(partition, {})
        return any(position <= mailbox.position <= position + NEAR for mailbox in waiting)


def _is_near(position: int, passes: Iterable[int]) -> bool:
    return any(at <= position <= at + NEAR for at in passes)


def _block_of(partition: int, begin: int, records: Sequence[FetchedRecord], end: int | None = None) -> Block:
    """Return the block of a scan's batch. It has all records from `begin` on."""
    block = Block(partition, begin)
    block.add(records, records[-1].offset + 1 if end is None else end)
    block.committed = {
        record.offset
        for record in records
        if record.value is not None and b'"usage"' in record.value and not is_aborted(record)
    }
    return block
