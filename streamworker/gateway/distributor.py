"""Pass the records of the two readers to the open feeds of their jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.gateway.known_jobs import Place
from streamworker.gateway.mailbox import Fate
from streamworker.handover import read_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.gateway.ended_jobs import EndedJobs
    from streamworker.gateway.feed_registry import FeedRegistry
    from streamworker.gateway.history import Block, History
    from streamworker.gateway.job_feed import JobFeed
    from streamworker.gateway.known_jobs import KnownJobs
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.gateway.replays import Positions
    from streamworker.handover import EventHead
    from streamworker.kafka.clients import FetchedRecord

__all__ = ["WRITTEN_BYTES", "Distributor"]

_REPORTED_STEP = 1 << 20
"""Change of the size of the history, in bytes, that is reported."""

WRITTEN_BYTES = 64 << 10
"""Size of the deltas that are collected before they are written: so much comes at most behind the one that fills a client."""

_STARTED, _USAGE = b'"started"', b'"usage"'
"""Texts that the values of these events have."""


class Distributor:
    """Takes every record that the tail and the committed reader return; notes in `known` and `ended` the jobs that begin."""

    def __init__(
        self,
        registry: FeedRegistry,
        history: History,
        positions: Positions,
        *,
        known: KnownJobs,
        ended: EndedJobs,
        observer: LogObserver,
    ) -> None:
        self._registry = registry
        self._replays = registry.replays
        self._by_key, self._waiting = registry.by_key, registry.waiting
        self._history = history
        self._positions = positions
        self._known = known
        self._ended = ended
        self._observer = observer
        self._writes: list[tuple[JobFeed, bytes]] = []
        self._writes_bytes = 0
        self._reported_size = 0

    def read_tail(self, partition: int, records: Sequence[FetchedRecord], begin: int, end: int) -> None:
        """Keep and distribute every record from `begin` to before `end`, of open transactions too."""
        block = self._history.extend(partition, begin, end, records)
        waiting = self._waiting.get(partition)
        touched: dict[JobFeed, None] = dict(waiting) if waiting else {}
        self._distribute(block, records, touched)
        self._registry.settle(partition, touched)
        self._replays.serve(block)
        if abs(self._history.size - self._reported_size) > _REPORTED_STEP:
            self._reported_size = self._history.size
            self._observer.history_changed(self._reported_size)

    def _distribute(
        self, block: Block, records: Sequence[FetchedRecord], touched: dict[JobFeed, None]
    ) -> None:
        """Pass records of the tail to the live feeds of their jobs; add those that have to take them to `touched`."""
        by_key, partition, writes = self._by_key, block.partition, self._writes
        for record in records:
            if (value := record.value) is None:
                continue
            if value.find(_STARTED) >= 0:  # `in` takes twice the time: it raises and drops a TypeError first
                self._remember(partition, record)
            if (feeds := by_key.get(record.key)) is not None and (head := read_head(value)) is not None:  # type: ignore[arg-type]  # None is not a key of it
                cursor, offset = None, record.offset
                for feed in feeds:
                    if feed.partition != partition:
                        continue
                    if (direct := feed.direct) is not None and direct.passes(offset, head):
                        writes.append((feed, feed.frame(offset, head.seq, value, cursor)))
                        cursor = feed.last
                        self._writes_bytes += len(value)
                    elif feed.mailbox.is_live:
                        touched[feed] = None
                        self._queue(block, feed, offset, head, value)
                if self._writes_bytes > WRITTEN_BYTES:
                    self.write()

    def write(self) -> None:
        """Write the deltas of the records that the tail has returned. Call it behind each read of several partitions.

        uvloop calls the kernel in each write. In turn with the code above, the kernel's code for a socket and that code evict
        each other from the processor's caches, at a cost per event (benchmarks/README.md, "The gateway").
        """
        for feed, data in self._writes:
            feed.write(data)
        self._writes.clear()
        self._writes_bytes = 0

    def _queue(self, block: Block, feed: JobFeed, offset: int, head: EventHead, value: bytes) -> None:
        """Pass a record of the tail to the mailbox of a live feed. What follows must not overtake it."""
        feed.direct = None
        feed.mailbox.tail(offset, head, value)
        if head.type == "usage":
            committed = self._positions.committed_position(block.partition)
            # The committed reader may be ahead of the tail: it has reported this ending before.
            if block.fate(offset, value, committed) is Fate.FINAL:
                feed.mailbox.committed(offset, head, value)

    def read_committed(self, partition: int, records: Sequence[FetchedRecord], _: int, __: int) -> None:
        """Pass on the terminal events whose transactions are committed; other events come from the tail."""
        by_key = self._by_key
        tail = self._positions.tail_position(partition)
        waiting = self._waiting.get(partition)
        touched: dict[JobFeed, None] = dict(waiting) if waiting else {}
        for record in records:
            value = record.value
            if value is None or value.find(_USAGE) < 0:
                continue
            self._history.note_committed(partition, record.offset)
            if (feeds := by_key.get(record.key)) is not None and (head := read_head(value)) is not None:  # type: ignore[arg-type]  # None is not a key of it
                for feed in feeds:
                    mailbox = feed.mailbox
                    # The rest of the log, behind the tail's or the replay's position, is judged when it is read.
                    passed = tail if mailbox.is_live else mailbox.position
                    if mailbox.partition == partition and record.offset < passed:
                        mailbox.committed(record.offset, head, value)
                        touched[feed] = None
        self._registry.settle(partition, touched)

    def _remember(self, partition: int, record: FetchedRecord) -> None:
        """Remember where a job begins."""
        key, head = record.key, read_head(record.value)
        if key is None or head is None or head.type != "started":
            return
        self._ended.forget(key)
        self._known.add(key, Place(partition, record.offset))
