"""Read a range of one partition's offsets, and find the offset that belongs to a time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from enum import Enum, auto
from itertools import chain
from typing import TYPE_CHECKING

from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import CorruptRecordException

from streamworker.errors import KafkaRefused
from streamworker.kafka.clients import close_consumer, new_consumer
from streamworker.kafka.compat import (
    AbortedRecord,
    client_of,
    fetch_all_metadata,
    positions_of,
    return_aborted_records,
)
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.topic_ids import read_topic_ids

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import Consumer, FetchedRecord
    from streamworker.model import TopicPartition

__all__ = ["LogScanner", "is_aborted"]

_SCANS = 4
_POLL_MS = 50
_POLL_RECORDS = 2000
_FETCH_WAIT_MS = 20
"""How long a broker may delay its response for want of records. The next request on the connection waits for it."""
_STOP_TIMEOUT_S = 2.0


class _Isolation(Enum):
    """What a consumer returns."""

    UNCOMMITTED = auto()
    COMMITTED = auto()
    WITH_ABORTED = auto()
    """What is below the last stable offset; `is_aborted` recognizes records of rolled back transactions."""


class LogScanner:
    """Reads ranges of partitions. At most four scans run at once; their consumers are kept for the next ones."""

    def __init__(self, settings: KafkaSettings, acls: RequiredAcls | None = None) -> None:
        self._settings = settings
        self._acls = acls
        self._slots = asyncio.Semaphore(_SCANS)
        self._idle: dict[_Isolation, list[Consumer]] = {kind: [] for kind in _Isolation}
        self._scouts: dict[bool, Consumer] = {}
        self._connecting = asyncio.Lock()

    async def stop(self) -> None:
        """Close all consumers. Bounded in time; never raises."""
        consumers = [*self._scouts.values(), *chain.from_iterable(self._idle.values())]
        self._scouts.clear()
        self._idle = {kind: [] for kind in _Isolation}
        await asyncio.gather(*(close_consumer(consumer, _STOP_TIMEOUT_S) for consumer in consumers))

    async def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has. Raises KafkaError; KafkaRefused for an unknown topic."""
        scout = await self._scout(committed_only=False)
        with translate_errors(f"reading the partitions of {topic}", self._acls):
            cluster = await fetch_all_metadata(scout)
        if not (partitions := cluster.partitions_for_topic(topic)):
            raise KafkaRefused(f"topic {topic} does not exist: create it with `streamworker topics create`")
        return len(partitions)

    async def topic_id(self, topic: str) -> bytes | None:
        """Return the topic's id, which another topic of the same name does not have. Raises KafkaError.

        None if there is no such topic now, or if the brokers are older than Kafka 3.0.
        """
        scout = await self._scout(committed_only=False)
        with translate_errors(f"reading the id of {topic}", self._acls):
            return (await read_topic_ids(client_of(scout), [topic])).get(topic)

    async def end(self, partition: TopicPartition, *, committed_only: bool) -> int:
        """Return the offset after the last record, or after the last one that is committed. Raises KafkaError."""
        at = KafkaTopicPartition(*partition)
        scout = await self._scout(committed_only=committed_only)
        with translate_errors(f"reading the end of {partition}", self._acls):
            return (await scout.end_offsets([at]))[at]

    async def beginning(self, partition: TopicPartition) -> int:
        """Return the offset of the first record that retention has kept, or the end. Raises KafkaError."""
        at = KafkaTopicPartition(*partition)
        scout = await self._scout(committed_only=False)
        with translate_errors(f"reading the beginning of {partition}", self._acls):
            return (await scout.beginning_offsets([at]))[at]

    async def offset_at(self, partition: TopicPartition, time_ms: int) -> int:
        """Return the first offset whose record is from `time_ms` or later, else the end. Raises KafkaError.

        The scout is never assigned a partition: a request on a connection that has a fetch pending would wait for it.
        """
        at = KafkaTopicPartition(*partition)
        scout = await self._scout(committed_only=False)
        with translate_errors(f"looking up a time in {partition}", self._acls):
            found = (await scout.offsets_for_times({at: max(0, time_ms)}))[at]
            if found is None:
                return (await scout.end_offsets([at]))[at]
        return int(found.offset)

    async def scan(
        self,
        partition: TopicPartition,
        start: int,
        stop: int,
        *,
        committed_only: bool,
        with_aborted: bool = False,
    ) -> AsyncGenerator[Sequence[FetchedRecord], None]:
        """Yield the records at offsets from `start` to before `stop`, in batches, none of them empty. Raises KafkaError.

        Where the range holds no record (only markers of transactions, or what retention has deleted), nothing is yielded.
        With `committed_only`, `stop` must not be greater than the partition's committed end; `with_aborted` then
        returns records of rolled back transactions too, which `is_aborted` recognizes. Close the iterator (`contextlib.aclosing`)
        where it may not be exhausted.
        """
        if start >= stop:
            return
        isolation = _Isolation.COMMITTED if committed_only else _Isolation.UNCOMMITTED
        async with self._reader(_Isolation.WITH_ABORTED if with_aborted else isolation) as reader:
            at = KafkaTopicPartition(*partition)
            reader.assign([at])
            reader.seek(at, start)
            while (position := positions_of(reader).get(at, start)) < stop:
                with translate_errors(f"reading {partition}", self._acls):
                    records = await _fetch(reader, at, min(_POLL_RECORDS, stop - position))
                is_end = bool(records) and records[-1].offset >= stop
                if is_end:
                    records = [record for record in records if record.offset < stop]
                if records:
                    yield records
                if is_end:
                    return

    @asynccontextmanager
    async def _reader(self, isolation: _Isolation) -> AsyncIterator[Consumer]:
        """Lend a consumer for one scan. It is kept for the next one, unless the scan failed or was cancelled."""
        async with self._slots:
            idle = self._idle[isolation]
            reader = idle.pop() if idle else await self._connect(isolation)
            try:
                yield reader
            except GeneratorExit:
                self._keep(reader, idle)
                raise
            except BaseException:
                await close_consumer(reader, _STOP_TIMEOUT_S)
                raise
            self._keep(reader, idle)

    def _keep(self, reader: Consumer, idle: list[Consumer]) -> None:
        reader.unsubscribe()
        idle.append(reader)

    async def _scout(self, *, committed_only: bool) -> Consumer:
        async with self._connecting:
            if committed_only not in self._scouts:
                isolation = _Isolation.COMMITTED if committed_only else _Isolation.UNCOMMITTED
                self._scouts[committed_only] = await self._connect(isolation)
            return self._scouts[committed_only]

    async def _connect(self, isolation: _Isolation) -> Consumer:
        consumer = new_consumer(
            self._settings,
            group_id=None,
            isolation_level="read_uncommitted" if isolation is _Isolation.UNCOMMITTED else "read_committed",
            auto_offset_reset="earliest",
            fetch_max_wait_ms=_FETCH_WAIT_MS,
        )
        try:
            with translate_errors(f"connecting to {self._settings.bootstrap_servers}", self._acls):
                await consumer.start()
        except BaseException:
            await close_consumer(consumer, _STOP_TIMEOUT_S)
            raise
        if isolation is _Isolation.WITH_ABORTED:
            return_aborted_records(consumer)
        return consumer


async def _fetch(reader: Consumer, at: KafkaTopicPartition, limit: int) -> list[FetchedRecord]:
    try:
        fetched = await reader.getmany(timeout_ms=_POLL_MS, max_records=limit)
    except UnicodeDecodeError as error:  # raised by aiokafka's C code for a header name that is not UTF-8
        raise CorruptRecordException(str(error)) from error
    await asyncio.sleep(0)  # a long scan must not block other tasks
    return fetched.get(at, [])


def is_aborted(record: FetchedRecord) -> bool:
    """Whether the record's transaction was rolled back. Only records of a scan `with_aborted` can be asked."""
    return type(record) is AbortedRecord
