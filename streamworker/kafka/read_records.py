"""Which records of a partition were read, to find the first new record after the log lost its end."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from aiokafka import TopicPartition as KafkaTopicPartition

from streamworker.kafka.errors import translate_errors
from streamworker.kafka.log import open_log

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.config import KafkaSettings
    from streamworker.kafka.clients import Consumer, FetchedRecord
    from streamworker.model import TopicPartition

__all__ = ["ReadRecords", "first_new_offset"]

_REMEMBERED = 1000


class ReadRecords:
    """Offsets and timestamps of the last records that were read from one partition."""

    def __init__(self) -> None:
        self._timestamps: dict[int, int] = {}  # offset -> timestamp in ms
        self._order: deque[int] = deque()

    def add(self, records: Iterable[FetchedRecord]) -> None:
        """Remember records; forget the oldest ones beyond the limit."""
        for record in records:
            self._timestamps[record.offset] = record.timestamp
            self._order.append(record.offset)
        while len(self._order) > _REMEMBERED:
            self._timestamps.pop(self._order.popleft(), None)

    @property
    def first(self) -> int | None:
        """The oldest remembered offset."""
        return self._order[0] if self._order else None

    @property
    def last_timestamp(self) -> int:
        """The largest timestamp that was read, in ms; 0 if none was."""
        return max(self._timestamps.values(), default=0)

    def has(self, record: FetchedRecord) -> bool:
        """Return whether this very record was read: its offset has the same timestamp."""
        return self._timestamps.get(record.offset) == record.timestamp


async def first_new_offset(
    settings: KafkaSettings, partition: TopicPartition, read: ReadRecords | None, bounds: tuple[int, int]
) -> int:
    """Return the first offset of a shortened log whose record was not read before. Raises KafkaError.

    `bounds` are the log's first offset and its end. A log that lost its end (an unclean leader election) may hold new
    records at offsets that were read. The remembered records are compared with the log; where the log ends before
    them, the first record after the last timestamp that was read counts.
    """
    begin, end = bounds
    if read is None or read.first is None:
        return begin
    at = KafkaTopicPartition(*partition)
    async with open_log(settings, partition.topic) as log:
        with translate_errors(f"reading {partition} again"):
            if read.first < end:
                return await _first_difference(log.consumer, at, read, max(begin, read.first), end)
            found = (await log.consumer.offsets_for_times({at: read.last_timestamp + 1}))[at]
    return end if found is None else max(begin, found.offset)


async def _first_difference(
    consumer: Consumer, at: KafkaTopicPartition, read: ReadRecords, start: int, end: int
) -> int:
    consumer.assign([at])
    consumer.seek(at, start)
    while await consumer.position(at) < end:
        fetched = await consumer.getmany(at, timeout_ms=500, max_records=_REMEMBERED)
        for record in fetched.get(at, ()):
            if not read.has(record):
                return start
            start = record.offset + 1
    return end
