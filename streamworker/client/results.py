"""Waiting for results of the results topic: one committed tail for all jobs, and a scan for each that is asked late."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from streamworker.client.result import result_of
from streamworker.errors import KafkaRefused
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.tail import TopicTail
from streamworker.model import TopicPartition
from streamworker.wire.event import read_event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.client.result import Result
    from streamworker.config import KafkaSettings
    from streamworker.kafka.clients import FetchedRecord
    from streamworker.kafka.scan import LogScanner

__all__ = ["AwaitedResult", "TopicResults"]

_KEPT_BYTES = 64 << 10
"""Largest result that is kept until its job is asked for it. Of a larger one the offset is kept."""


class AwaitedResult:
    """The place of one job's result: an offset, and the record's value unless it is large."""

    __slots__ = ("_came", "_error", "key", "offset", "value")

    def __init__(self, job_id: str) -> None:
        self.key = job_id.encode()
        self.offset: int | None = None
        self.value: bytes | None = None
        self._came = asyncio.Event()
        self._error: BaseException | None = None

    def set(self, offset: int, value: bytes) -> None:
        """Take a record. Of several results of one job the last one counts."""
        if self.offset is None or offset > self.offset:
            self.offset = offset
            self.value = value if len(value) <= _KEPT_BYTES else None
            self._came.set()

    def fail(self, error: BaseException) -> None:
        """Raise this error in `wait`, unless the record is there."""
        self._error = error
        self._came.set()

    async def wait(self) -> int:
        """Wait for the record; return its offset. Raises the error with which the topic's reader ended."""
        await self._came.wait()
        if self.offset is None:
            assert self._error is not None, "a result was set, or the reader has failed"
            raise self._error
        return self.offset


class TopicResults:
    """The results topic."""

    def __init__(self, settings: KafkaSettings, topic: str, scanner: LogScanner) -> None:
        self._topic = topic
        self._scanner = scanner
        self._tail = TopicTail(settings, topic, self._read, committed_only=True)
        self._by_key: dict[bytes, tuple[AwaitedResult, ...]] = {}

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        await self._tail.start()
        self._tail.crashed.add_done_callback(self._fail_all)

    async def stop(self) -> None:
        """Close the reader. Bounded in time; never raises."""
        await self._tail.stop()

    def expect(self, job_id: str) -> AwaitedResult:
        """Return the place of a result that is written from now on."""
        awaited = AwaitedResult(job_id)
        self._by_key[awaited.key] = (*self._by_key.get(awaited.key, ()), awaited)
        return awaited

    def forget(self, awaited: AwaitedResult) -> None:
        """Do not look for this result any more."""
        left = tuple(one for one in self._by_key.get(awaited.key, ()) if one is not awaited)
        if left:
            self._by_key[awaited.key] = left
        else:
            self._by_key.pop(awaited.key, None)

    async def find(self, job_id: str, since_ms: int) -> AwaitedResult:
        """Return the place of a result that was written since a time, or is written from now on. Raises KafkaError."""
        partition = self._home(job_id.encode())
        start = await self._scanner.offset_at(partition, since_ms)
        awaited = self.expect(job_id)
        stop = self._tail.positions[partition.partition]
        try:
            async with aclosing(self._scanner.scan(partition, start, stop, committed_only=True)) as batches:
                async for records in batches:
                    for record in records:
                        if record.key == awaited.key and record.value is not None:
                            awaited.set(record.offset, record.value)
        except BaseException:
            self.forget(awaited)
            raise
        return awaited

    async def read(self, awaited: AwaitedResult) -> Result:
        """Wait for a result and return it. Raises KafkaError."""
        offset = await awaited.wait()
        value = awaited.value
        if value is None:
            value = await self._value_at(self._home(awaited.key), offset)
        record: dict[str, Any] = read_event(value)
        return result_of(record, record.get("completion"), tuple(record.get("omitted") or ()))

    async def _value_at(self, partition: TopicPartition, offset: int) -> bytes:
        async with aclosing(
            self._scanner.scan(partition, offset, offset + 1, committed_only=True)
        ) as batches:
            async for records in batches:
                return records[0].value or b""
        raise KafkaRefused(f"{partition}: the result at offset {offset} was deleted before it was read")

    def _home(self, key: bytes) -> TopicPartition:
        return TopicPartition(self._topic, partition_of(key, len(self._tail.positions)))

    def _fail_all(self, crashed: asyncio.Future[None]) -> None:
        if not crashed.cancelled() and (error := crashed.exception()) is not None:
            for awaited in [one for ones in self._by_key.values() for one in ones]:
                awaited.fail(error)

    def _read(self, _: int, records: Sequence[FetchedRecord], __: int) -> None:
        if not (by_key := self._by_key):
            return
        for record in records:
            for awaited in by_key.get(record.key or b"", ()):
                if record.value is not None:
                    awaited.set(record.offset, record.value)
