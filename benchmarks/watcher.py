"""A reader that follows the events topic and records the age of each delta."""

from __future__ import annotations

import asyncio
import time
from array import array
from typing import TYPE_CHECKING, Self

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as KafkaTopicPartition

from benchmarks.upstream import STAMP_DIGITS

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Watcher"]


class Watcher:
    """Read the events topic as `read_uncommitted` and count. `ages`: µs from the upstream's write to the read."""

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=100,
            max_partition_fetch_bytes=4 << 20,
        )
        self._parts = [KafkaTopicPartition(topic, number) for number in range(partitions)]
        self._task: asyncio.Task[None] | None = None
        self.forget()

    def forget(self) -> None:
        """Reset the counts."""
        self.ages = array("q")
        self.open: set[bytes] = set()
        self.ended = 0

    async def __aenter__(self) -> Self:
        await self._consumer.start()
        self._consumer.assign(self._parts)
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._consumer.stop()

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for a condition on the counts; return whether it was fulfilled in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._task is not None
            if self._task.done():
                self._task.result()
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def _read(self) -> None:
        while True:
            found = await self._consumer.getmany(timeout_ms=1000)
            now = time.monotonic_ns() // 1000
            for records in found.values():
                for record in records:
                    self._note(record.key, record.value, now)

    def _note(self, key: bytes, value: bytes, now: int) -> None:
        at = value.find(b'"@') + 2
        if at > 1:
            self.ages.append(now - int(value[at : at + STAMP_DIGITS]))
            self.open.add(key)
        elif b'"type":"usage"' in value or b'"type": "usage"' in value:
            self.ended += 1
