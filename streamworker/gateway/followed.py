"""The partitions that are read live: two readers for all of them, paused where no feed is open."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import KafkaError
from streamworker.kafka.tail import TopicTail
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import FetchedRecord
    from streamworker.kafka.scan import LogScanner

    OnRecords = Callable[[int, Sequence[FetchedRecord], int, int], None]

__all__ = ["FollowedPartitions"]

IDLE_S = 30.0
"""For how long a partition is read after its last subscriber has left."""

_FETCH_WAIT_MS = 100
"""How long a broker may delay its response for want of records: a partition that is resumed waits for it."""

_TAIL_PACE_S = 0.004
_COMMITTED_PACE_S = 0.02
"""Pauses behind a read, for which records gather. That of the committed reader delays terminal events only."""

_SWEEP_S = 5.0

_APPEND_TIME = 1
"""`timestamp_type` of a record whose timestamp the broker has set."""

_WATCH_S = 5.0
"""How often the topic's id is compared while partitions are read."""

log = structlog.get_logger()


class FollowedPartitions:
    """The tail and the committed reader of one topic.

    Offsets of a topic that was replaced mean other records, and the new log may be longer than the old one was. So the
    topic's id is compared, every few seconds and before a paused partition is read again.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        scanner: LogScanner,
        *,
        reads_all: bool = False,
        idle_s: float = IDLE_S,
        acls: RequiredAcls | None = None,
    ) -> None:
        self.topic = topic
        self._scanner = scanner
        self._reads_all = reads_all
        self._idle_s = idle_s
        self.tail = TopicTail(
            settings,
            topic,
            self._read_tail,
            committed_only=False,
            acls=acls,
            starts_paused=not reads_all,
            fetch_wait_ms=_FETCH_WAIT_MS,
            pace_s=_TAIL_PACE_S,
            with_place=False,
            on_read=self._pass_read,
        )
        self.committed_tail = TopicTail(
            settings,
            topic,
            self._read_committed,
            committed_only=True,
            acls=acls,
            starts_paused=not reads_all,
            fetch_wait_ms=_FETCH_WAIT_MS,
            pace_s=_COMMITTED_PACE_S,
            with_place=False,
        )
        self._tail: dict[int, int] = {}  # positions up to which records were passed on
        self._committed: dict[int, int] = {}
        self._users: Counter[int] = Counter()
        self._idle_since: dict[int, float] = {}
        self._active: set[int] = set()
        self._activating: dict[int, asyncio.Lock] = {}
        self.has_append_time = False
        """Whether the broker sets the records' timestamps, as the latest record of the tail says."""
        self._topic_id: bytes | None = None
        self._comparing = asyncio.Lock()
        self._has_lost = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(
        self,
        *,
        on_tail: OnRecords,
        on_committed: OnRecords,
        on_read: Callable[[], None],
        on_lost: Callable[[int], None],
        on_paused: Callable[[int], None],
        on_replaced: Callable[[], None],
    ) -> None:
        """Connect both readers. Raises KafkaError.

        `on_tail(partition, records, begin, end)` and `on_committed(…)` are called with every record from `begin` to
        before `end` that the reader returns; `on_read()` behind those of each read of the tail, which may be of several
        partitions; `on_lost(partition)` where the log lost its end; `on_paused(partition)` when a partition is read no
        longer; `on_replaced()` after the topic was deleted and created again, behind an `on_lost` for each of its
        partitions.
        """
        self._on_tail, self._on_committed, self._on_read = on_tail, on_committed, on_read
        self._on_lost, self._on_paused, self._on_replaced = on_lost, on_paused, on_replaced
        # A terminal event between the two positions must be above that of the committed reader, which reports it.
        await self.committed_tail.start()
        await self.tail.start()
        self._committed = dict(self.committed_tail.positions)
        self._tail = dict(self.tail.positions)
        if self._reads_all:
            self._active = set(self._tail)
        self._topic_id = await self._scanner.topic_id(self.topic)
        self._tasks = [
            asyncio.create_task(self._sweep(), name="pause idle partitions"),
            asyncio.create_task(self._watch(), name=f"compare the id of {self.topic}"),
        ]

    async def stop(self) -> None:
        """Close both readers. Bounded in time; never raises."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(self.tail.stop(), self.committed_tail.stop())

    @property
    def partitions(self) -> int:
        """How many partitions the topic has."""
        return len(self.tail.positions)

    @property
    def active(self) -> int:
        """How many partitions are read."""
        return len(self._active)

    def tail_position(self, partition: int) -> int:
        """Return the offset up to which the tail's records were passed on."""
        return self._tail.get(partition, 0)

    def committed_position(self, partition: int) -> int:
        """Return the offset up to which the committed reader's records were passed on."""
        return self._committed.get(partition, 0)

    async def acquire(self, partition: int) -> None:
        """Read a partition, until `release` was called as often as this. Raises KafkaError."""
        self._users[partition] += 1
        try:
            async with self._activating.setdefault(partition, asyncio.Lock()):
                if partition not in self._active:
                    await self._activate(partition)
        except BaseException:
            self.release(partition)
            raise

    def hold(self, partition: int) -> None:
        """Count one more user of a partition that the caller has acquired."""
        self._users[partition] += 1

    def release(self, partition: int) -> None:
        """Undo one `acquire`. The partition is read for some time longer."""
        self._users[partition] -= 1
        if not self._users[partition]:
            self._idle_since[partition] = asyncio.get_running_loop().time()

    async def _activate(self, partition: int) -> None:
        await self._compare_topic_id()
        at = TopicPartition(self.topic, partition)
        # In this order: what is committed in between is above the committed reader's position, which reports it.
        committed = await self._scanner.end(at, committed_only=True)
        end = await self._scanner.end(at, committed_only=False)
        self._committed[partition], self._tail[partition] = committed, end
        self.committed_tail.move(partition, committed)
        self.tail.move(partition, end)
        self.committed_tail.resume(partition)
        self.tail.resume(partition)
        self._active.add(partition)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._idle_s))
            before = asyncio.get_running_loop().time() - self._idle_s
            for partition in list(self._active if not self._reads_all else ()):
                lock = self._activating.setdefault(partition, asyncio.Lock())
                if not self._users[partition] and not lock.locked() and self._idle_since[partition] <= before:
                    self._pause(partition)

    # Replacement of the topic

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._has_lost.wait()
            self._has_lost.clear()
            if self._active:
                try:
                    await self._compare_topic_id()
                except KafkaError as error:
                    log.debug("gateway.topic_not_compared", topic=self.topic, reason=str(error))

    async def _compare_topic_id(self) -> None:
        """Begin anew if the topic is not the one that was read before. Raises KafkaError."""
        async with self._comparing:
            topic_id = await self._scanner.topic_id(self.topic)
            if topic_id is None or topic_id == self._topic_id:
                return
            if self._topic_id is not None:
                await self._begin_anew()
            self._topic_id = topic_id

    async def _begin_anew(self) -> None:
        partitions = await self._scanner.partitions(self.topic)
        log.warning(
            "gateway.topic_replaced",
            topic=self.topic,
            partitions=partitions,
            meaning="cursors of before are lost, and streams of running jobs have to begin again",
        )
        before = set(self._tail)
        self.tail.restart(partitions)
        self.committed_tail.restart(partitions)
        self._tail, self._committed = dict(self.tail.positions), dict(self.committed_tail.positions)
        self._active &= self._tail.keys()
        for partition in before:
            self._on_lost(partition)
        self._on_replaced()

    def _pause(self, partition: int) -> None:
        self._active.discard(partition)
        self.tail.pause(partition)
        self.committed_tail.pause(partition)
        self._on_paused(partition)

    # Records

    def _read_tail(self, partition: int, records: Sequence[FetchedRecord], end: int) -> None:
        begin = self._tail.get(partition, 0)
        self._tail[partition] = end
        if records and records[0].offset < begin:
            self._on_lost(partition)
            self._has_lost.set()
            begin = records[0].offset
        if partition in self._active:
            if records:
                self.has_append_time = records[-1].timestamp_type == _APPEND_TIME
            self._on_tail(partition, records, begin, end)

    def _pass_read(self) -> None:
        self._on_read()

    def _read_committed(self, partition: int, records: Sequence[FetchedRecord], end: int) -> None:
        begin = self._committed.get(partition, 0)
        self._committed[partition] = end
        if records and records[0].offset < begin:
            self._on_lost(partition)
            self._has_lost.set()
            begin = records[0].offset
        if partition in self._active:
            self._on_committed(partition, records, begin, end)
