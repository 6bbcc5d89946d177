"""Follow every partition of a topic from its present end, or from given offsets, without a consumer group.

One tail serves all readers of a process: each record is fetched once, whatever the number of jobs that are read.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import CorruptRecordException, IllegalStateError

from streamworker.errors import KafkaError, KafkaRefused, KafkaUnavailable
from streamworker.kafka.clients import close_consumer, new_consumer
from streamworker.kafka.compat import (
    client_of,
    fetch_all_metadata,
    has_stopped_fetching,
    positions_of,
    return_plain_records,
)
from streamworker.kafka.errors import translate_errors
from streamworker.log_throttle import OutageLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import Consumer, FetchedRecord

__all__ = ["TopicTail"]

_POLL_MS = 200
_POLL_RECORDS = 2000
_PACED_RECORDS = 32
"""Records of one read behind which further ones may gather."""

_METADATA_MAX_AGE_MS = 30_000  # how soon partitions that were added are noticed
_BACKOFF_S = 0.5
_STOP_TIMEOUT_S = 2.0


class TopicTail:
    """A group-less consumer over all partitions of one topic.

    No record after the positions at `start` is skipped or returned twice, also when brokers restart and leaders move:
    a consumer that fails is replaced by one that continues at `positions`. Partitions that are added later are read
    from their beginning.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        on_records: Callable[[int, Sequence[FetchedRecord], int], None],
        *,
        committed_only: bool,
        acls: RequiredAcls | None = None,
        start: Mapping[int, int] | None = None,
        starts_paused: bool = False,
        fetch_wait_ms: int = 500,
        pace_s: float = 0.0,
        with_place: bool = True,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        """`on_records(partition, records, position)` is called in the tail's task and must return at once.

        With `start`, offsets by partition, the topic is read from there instead of from its end.

        `position` is the next offset to read. Without records it has passed what the reader does not return: the
        markers of transactions and, for a committed reader, the records of aborted ones. It is lower than before where
        the log lost its end.

        With `starts_paused`, all partitions are paused, until `move` and `resume` are called. `fetch_wait_ms` is how
        long a broker may delay its response for want of records: a partition that is resumed waits for it.

        `pace_s` is a pause behind a read that returned many records, but not a backlog: a request costs the same for one
        record as for many, and a record of a quiet topic is not to wait. Without `with_place`, records have no `topic`
        and no `partition`, which saves a copy of each. `on_read()` is called behind the records of each read, which may be
        of several partitions.
        """
        self.topic = topic
        self.positions: dict[int, int] = dict(start or {})
        """The next offset to read, by partition. Complete when `start` returns."""
        self.crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with the exception of `on_records`, if it raises one. The tail has then ended."""
        self._settings = settings
        self._on_records = on_records
        self._on_read = on_read
        self._isolation = "read_committed" if committed_only else "read_uncommitted"
        self._acls = acls
        self._starts_paused = starts_paused
        self._fetch_wait_ms = fetch_wait_ms
        self._pace_s = pace_s
        self._with_place = with_place
        self._paused: set[int] = set()
        self._assigned: set[int] = set()
        self._has_lost_partitions = False
        self._consumer: Consumer | None = None
        self._task: asyncio.Task[None] | None = None
        self._outages = OutageLog("tail.recovered", topic=topic, isolation=self._isolation)

    async def start(self) -> None:
        """Connect, read the end of each partition, and follow the topic in a task. Raises KafkaError."""
        self._consumer = await self._connect()
        self._task = asyncio.create_task(self._run(), name=f"tail {self.topic} {self._isolation}")
        self._task.add_done_callback(self._report_crash)

    async def stop(self) -> None:
        """End the task and close the consumer. Bounded in time; never raises."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._close()

    def pause(self, partition: int) -> None:
        """Stop fetching a partition. Its position stays where it is."""
        self._paused.add(partition)
        with suppress(IllegalStateError):
            if self._consumer is not None:
                self._consumer.pause(KafkaTopicPartition(self.topic, partition))

    def resume(self, partition: int) -> None:
        """Continue to fetch a partition at its position."""
        self._paused.discard(partition)
        with suppress(IllegalStateError):
            if self._consumer is not None:
                self._consumer.resume(KafkaTopicPartition(self.topic, partition))

    def move(self, partition: int, offset: int) -> None:
        """Set the position of a paused partition."""
        self.positions[partition] = offset
        with suppress(IllegalStateError):
            if self._consumer is not None:
                self._consumer.seek(KafkaTopicPartition(self.topic, partition), offset)

    def restart(self, partitions: int) -> None:
        """Read a topic from its beginning that was replaced by another one of the same name, which has `partitions` partitions."""
        for number in [one for one in self.positions if one >= partitions]:
            del self.positions[number]
            self._assigned.discard(number)
            self._has_lost_partitions = True
        for number in self.positions:
            self.move(number, 0)

    # The task

    def _report_crash(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.crashed.done():
            self.crashed.set_exception(error)
            self.crashed.exception()  # a crash that no caller waits for is not an unhandled future

    async def _run(self) -> None:
        while True:
            try:
                if self._consumer is None:
                    self._consumer = await self._connect()
                await self._follow(self._consumer)
            except KafkaError as error:
                self._outages.failed("tail.unavailable", monotonic(), reason=str(error))
                await self._close()
                await asyncio.sleep(_BACKOFF_S)

    async def _follow(self, consumer: Consumer) -> None:
        while True:
            with translate_errors(f"reading {self.topic}", self._acls):
                batches = await self._fetch(consumer)
            if self._has_lost_partitions:  # the consumer's metadata may still name them
                self._has_lost_partitions = False
                raise KafkaUnavailable(
                    f"reading {self.topic}: it was replaced by a topic with fewer partitions"
                )
            for partition, records in batches.items():
                if partition.partition in self.positions:
                    self._advance(partition.partition, records, records[-1].offset + 1)
            if self._on_read is not None:
                self._on_read()
            self._pass_hidden_records(positions_of(consumer))
            if batches:
                self._outages.worked()
            self._add_partitions(consumer)
            count = sum(map(len, batches.values()))
            # Also a backlog in the consumer's buffer, which is read without a pace, must not block other tasks.
            await asyncio.sleep(self._pace_s if _PACED_RECORDS <= count < _POLL_RECORDS else 0)

    async def _fetch(self, consumer: Consumer) -> dict[KafkaTopicPartition, list[FetchedRecord]]:
        try:
            batches = await consumer.getmany(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        except UnicodeDecodeError as error:  # raised by aiokafka's C code for a header name that is not UTF-8
            raise CorruptRecordException(str(error)) from error
        if not batches and has_stopped_fetching(consumer):
            raise KafkaUnavailable(f"reading {self.topic}: the consumer's fetcher has failed")
        return batches

    def _advance(self, partition: int, records: Sequence[FetchedRecord], position: int) -> None:
        self.positions[partition] = position
        self._on_records(partition, records, position)

    def _pass_hidden_records(self, positions: Mapping[KafkaTopicPartition, int]) -> None:
        known = self.positions
        for partition, position in positions.items():
            if position > known.get(partition.partition, position):
                self._advance(partition.partition, (), position)

    # Connections

    async def _connect(self) -> Consumer:
        consumer = new_consumer(
            self._settings,
            group_id=None,
            isolation_level=self._isolation,
            auto_offset_reset="earliest",  # where retention deleted the position, nothing later is skipped
            metadata_max_age_ms=_METADATA_MAX_AGE_MS,
            fetch_max_wait_ms=self._fetch_wait_ms,
        )
        try:
            with translate_errors(
                f"connecting to {self._settings.bootstrap_servers} to read {self.topic}", self._acls
            ):
                await consumer.start()
                if not self._with_place:
                    return_plain_records(consumer)
                numbers = await self._partitions(consumer)
                if not self.positions:
                    self.positions = await self._ends(consumer, numbers)
                self._assign(consumer, numbers)
        except BaseException:
            await close_consumer(consumer, _STOP_TIMEOUT_S)
            raise
        return consumer

    async def _partitions(self, consumer: Consumer) -> set[int]:
        cluster = await fetch_all_metadata(consumer)
        numbers: set[int] | None = cluster.partitions_for_topic(self.topic)
        if numbers:
            return numbers
        if self.positions:  # a broker that has just started may not know its topics yet
            raise KafkaUnavailable(f"reading {self.topic}: the topic is not in the broker's metadata")
        raise KafkaRefused(f"topic {self.topic} does not exist: create it with `streamworker topics create`")

    async def _ends(self, consumer: Consumer, numbers: Iterable[int]) -> dict[int, int]:
        partitions = [KafkaTopicPartition(self.topic, number) for number in sorted(numbers)]
        ends = await consumer.end_offsets(partitions)
        return {partition.partition: offset for partition, offset in ends.items()}

    def _assign(self, consumer: Consumer, numbers: Iterable[int]) -> None:
        """Assign the partitions and seek to the positions; a partition without position is read from its beginning."""
        for number in numbers:
            if self._starts_paused and number not in self._assigned:
                self._paused.add(number)
            self._assigned.add(number)
            self.positions.setdefault(number, 0)
        partitions = {number: KafkaTopicPartition(self.topic, number) for number in self.positions}
        consumer.assign(list(partitions.values()))
        for number, partition in partitions.items():
            consumer.seek(partition, self.positions[number])
            if number in self._paused:
                consumer.pause(partition)

    def _add_partitions(self, consumer: Consumer) -> None:
        known = client_of(consumer).cluster.partitions_for_topic(self.topic)
        if known and len(known) > len(self.positions):
            self._assign(consumer, known)

    async def _close(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await close_consumer(consumer, _STOP_TIMEOUT_S)
