"""Recent records of the events topic, in memory, for clients that join or reconnect.

Records are kept in blocks. A block covers a range of offsets of one partition completely and finds the records of one
key without looking at others. When all blocks together exceed the limit, the oldest ones are dropped. A subscriber that
joins or reconnects within their range needs no request to Kafka, and any number of them cost one read of the log.

What became of a terminal event's transaction is kept with it: the committed reader reports the committed ones, and one
that it has passed without a report was rolled back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING, Protocol

from streamworker.gateway.mailbox import Fate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streamworker.gateway.mailbox import Mailbox

__all__ = ["HISTORY_BYTES", "Block", "History", "Record"]

HISTORY_BYTES = 128 << 20
"""Estimated size of all blocks of a process."""

BLOCK_BYTES = 64 << 10
"""A block takes no further records above this size."""

RECORD_OVERHEAD = 240
"""Bytes of a record in memory besides its value: the objects, and the entry of its key."""

_BLOCK_OVERHEAD = 2000


class Record(Protocol):
    """A record as a reader returns it."""

    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class Block:
    """Every record of a partition at offsets from `begin` to before `end`."""

    __slots__ = (
        "_last",
        "_offsets",
        "_previous",
        "_values",
        "begin",
        "committed",
        "end",
        "partition",
        "size",
    )

    def __init__(self, partition: int, begin: int) -> None:
        self.partition = partition
        self.begin = self.end = begin
        self.committed: set[int] = set()
        """Offsets of terminal events whose transaction was committed."""
        self.size = _BLOCK_OVERHEAD
        # The records of one key are a chain of indices: a list for each key would double the cost of a record.
        self._offsets: list[int] = []
        self._values: list[bytes | None] = []
        self._previous: list[
            int
        ] = []  # the index of the record before with the same key; -1 for the first one
        self._last: dict[bytes | None, int] = {}

    @property
    def count(self) -> int:
        """The number of records."""
        return len(self._values)

    def add(self, records: Iterable[Record], end: int) -> int:
        """Append records, and cover the offsets to before `end`; return by how many bytes the block grew."""
        last, offsets, values, previous = self._last, self._offsets, self._values, self._previous
        index = first = len(values)
        size = 0
        for record in records:
            key, value = record.key, record.value
            offsets.append(record.offset)
            values.append(value)
            previous.append(last.get(key, -1))
            last[key] = index
            index += 1
            if value is not None:
                size += len(value)
        size += (index - first) * RECORD_OVERHEAD
        self.end = end
        self.size += size
        return size

    def of_key(self, key: bytes) -> list[tuple[int, bytes | None]]:
        """Return offset and value of each record of a key."""
        index = self._last.get(key, -1)
        found = []
        while index >= 0:
            found.append((self._offsets[index], self._values[index]))
            index = self._previous[index]
        found.reverse()
        return found

    def replay(self, mailbox: Mailbox, committed: int) -> None:
        """Advance a mailbox whose position is in the block. `committed` is the position of the committed reader now."""
        for offset, value in self.of_key(mailbox.key):
            if offset >= mailbox.position:
                mailbox.replay(offset, value, self.fate(offset, value, committed))
                mailbox.passed(offset + 1)
                if mailbox.is_stopped:
                    return
        mailbox.passed(self.end)

    def fate(self, offset: int, value: bytes | None, committed: int) -> Fate:
        """Return what became of a record. `committed` is the position of the committed reader now."""
        if offset >= committed:
            return Fate.OPEN
        if value is None or value.find(b'"usage"') < 0 or offset in self.committed:
            return Fate.FINAL
        return Fate.ABORTED


class History:
    """The blocks of all partitions."""

    def __init__(self, limit_bytes: int = HISTORY_BYTES) -> None:
        self._limit = limit_bytes
        self.size = 0
        """Estimated size of all blocks, in bytes."""
        self._blocks: dict[int, list[Block]] = {}  # by partition, in the order of their offsets
        self._by_age: deque[Block] = deque()
        self._early: dict[int, set[int]] = {}  # committed terminal events that the tail has not passed yet

    def extend(self, partition: int, begin: int, end: int, records: Iterable[Record]) -> Block:
        """Keep what the tail returned, every record from `begin` to before `end`; return the block that has it."""
        blocks = self._blocks.setdefault(partition, [])
        block = blocks[-1] if blocks else None
        if block is None or block.end != begin or block.size > BLOCK_BYTES:
            block = Block(partition, begin)
            self._insert(block)
        self.size += block.add(records, end)
        if early := self._early.get(partition):
            block.committed |= {offset for offset in early if offset < end}
            early -= block.committed
        self._evict()
        return block

    def insert(self, block: Block) -> None:
        """Keep what a scan returned, unless a part of it is there.

        Of terminal events below the committed reader's position, the block must know the committed ones.
        """
        if block.begin < block.end and not self._overlaps(block.partition, block.begin, block.end):
            self._insert(block)
            self._evict()

    def note_committed(self, partition: int, offset: int) -> None:
        """Note that a terminal event was committed."""
        if (block := self.at(partition, offset)) is not None:
            block.committed.add(offset)
        elif not (blocks := self._blocks.get(partition)) or offset >= blocks[-1].end:
            self._early.setdefault(partition, set()).add(offset)

    def at(self, partition: int, offset: int) -> Block | None:
        """Return the block that covers an offset."""
        blocks = self._blocks.get(partition)
        if not blocks:
            return None
        index = bisect_right(blocks, offset, key=_begin) - 1
        return blocks[index] if index >= 0 and offset < blocks[index].end else None

    def next_begin(self, partition: int, offset: int) -> int | None:
        """Return the first offset of the next block behind an offset."""
        blocks = self._blocks.get(partition, [])
        index = bisect_right(blocks, offset, key=_begin)
        return blocks[index].begin if index < len(blocks) else None

    def replay(self, mailbox: Mailbox, committed: int) -> None:
        """Advance a mailbox as far as the blocks reach, or until it needs no further records."""
        while mailbox.wants_records and (block := self.at(mailbox.partition, mailbox.position)) is not None:
            block.replay(mailbox, committed)

    def drop_undecided(self, partition: int, committed: int) -> None:
        """Drop the blocks that the committed reader has not passed: it is about to skip a part of the log."""
        self._early.pop(partition, None)
        self._drop([block for block in self._blocks.get(partition, ()) if block.end > committed])

    def drop(self, partition: int) -> None:
        """Drop everything of a partition."""
        self._early.pop(partition, None)
        self._drop(list(self._blocks.get(partition, ())))

    def __iter__(self) -> Iterator[Block]:
        return iter(self._by_age)

    def _insert(self, block: Block) -> None:
        blocks = self._blocks.setdefault(block.partition, [])
        blocks.insert(bisect_right(blocks, block.begin, key=_begin), block)
        self._by_age.append(block)
        self.size += block.size

    def _overlaps(self, partition: int, begin: int, end: int) -> bool:
        following = self.next_begin(partition, begin)
        return self.at(partition, begin) is not None or (following is not None and following < end)

    def _drop(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._by_age.remove(block)
            self._forget(block)

    def _evict(self) -> None:
        while self.size > self._limit and len(self._by_age) > 1:
            self._forget(self._by_age.popleft())

    def _forget(self, block: Block) -> None:
        self._blocks[block.partition].remove(block)
        self.size -= block.size


def _begin(block: Block) -> int:
    return block.begin
