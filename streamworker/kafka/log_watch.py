"""Notice that the log of a job partition lost records, was replaced, or is held up by another program's transaction.

Deleted records are reported and skipped. A log that lost its end in an unclean election, or whose topic was created
again, has new records below the position that is read next: it is reported, and its partition is taken over anew.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import structlog
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import IllegalStateError

from streamworker.errors import KafkaError, KafkaUnavailable
from streamworker.kafka.acls import RequiredAcls
from streamworker.kafka.compat import client_of
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.read_records import first_new_offset
from streamworker.kafka.topic_ids import read_topic_ids
from streamworker.redaction import without_message

if TYPE_CHECKING:
    from streamworker.config import Settings
    from streamworker.kafka.clients import Consumer
    from streamworker.kafka.read_records import ReadRecords
    from streamworker.model import TopicPartition
    from streamworker.observe import LossReason, Observer

__all__ = ["LogOwner", "LogWatch", "Positions"]

_WATCH_S = 5.0
_OPEN_TRANSACTION_S = 10.0
_PAUSE_S = 1.0
"""Time between two reads after which a topic may have been replaced in between."""

log = structlog.get_logger()


class Positions:
    """What a member of the group knows of the logs of its partitions."""

    def __init__(self) -> None:
        self.next: dict[TopicPartition, int] = {}
        """The offset that is read next, of each owned partition."""
        self.epochs: dict[TopicPartition, object] = {}
        """The ownership epoch of each owned partition."""
        self.read: dict[TopicPartition, ReadRecords] = {}
        self.restart_at: dict[TopicPartition, int] = {}
        """Where to read a partition whose log was reset."""

    def assigned(self, owned: frozenset[TopicPartition], kept: frozenset[TopicPartition]) -> None:
        """Forget the partitions that are not owned any more. Those that are not `kept` begin an epoch."""
        self.next = {partition: offset for partition, offset in self.next.items() if partition in owned}
        self.read = {partition: read for partition, read in self.read.items() if partition in self.next}
        self.epochs = {
            partition: (self.epochs.get(partition) if partition in kept else None) or object()
            for partition in owned
        }


class LogOwner(Protocol):
    """The group consumer, as the watch needs it."""

    @property
    def joined(self) -> Consumer:
        """The consumer that joined the group. Raises KafkaUnavailable while there is none."""
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read this partition from `offset`."""
        ...

    def position(self, partition: TopicPartition) -> int | None:
        """Return the offset that is read next; None if unknown."""
        ...

    async def beginning(self, partition: TopicPartition) -> int:
        """Return the partition's first offset. Raises KafkaError."""
        ...

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        """Have a partition taken over anew whose offsets mean other records now."""
        ...


class LogWatch:
    """Watches the logs of the owned partitions."""

    def __init__(
        self, settings: Settings, owner: LogOwner, positions: Positions, observer: Observer | None
    ) -> None:
        self._settings = settings
        self._owner = owner
        self._positions = positions
        self._observer = observer
        self._acls = RequiredAcls.of_worker(settings)
        self._topic_ids: dict[str, bytes] = {}
        self._blocked: dict[TopicPartition, tuple[int, float]] = {}  # see _report_open_transactions
        self._received_at = monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Compare topic ids and report foreign transactions in the background."""
        self._task = asyncio.create_task(self._run(), name="watch logs")

    async def stop(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def locate(self, partition: TopicPartition) -> None:
        """Find out why the log does not have the position, report it, and read on. Raises KafkaError."""
        position = self._positions.next.get(partition)
        if position is None:
            return  # its log was reset: it is about to be taken over anew
        at = KafkaTopicPartition(*partition)
        with translate_errors(f"reading the bounds of {partition}", self._acls):
            begin = (await self._owner.joined.beginning_offsets([at]))[at]
            end = (await self._owner.joined.end_offsets([at]))[at]
        if position < begin:
            log.warning(
                "jobs.deleted_unread",
                partition=str(partition),
                records=begin - position,
                from_offset=position,
                to_offset=begin,
                reason="the topic's retention deleted records before a worker read them, or before their jobs ended",
            )
            self._report_lost("retention", begin - position)
            self._owner.seek(partition, begin)
        else:
            start = await first_new_offset(
                self._settings.kafka, partition, self._positions.read.get(partition), (begin, end)
            )
            self._reset(partition, start, "the log ends before the offset that is read next")

    def _reset(self, partition: TopicPartition, start: int, reason: str) -> None:
        """Report a log whose offsets mean other records now, and have the partition taken over anew."""
        position = self._positions.next.pop(partition, start)
        log.warning(
            "jobs.log_reset",
            partition=str(partition),
            position=position,
            read_from=start,
            reason=f"{reason}: an unclean leader election lost records, or the topic was replaced",
        )
        self._report_lost("reset", max(0, position - start))
        self._positions.read.pop(partition, None)
        self._positions.restart_at[partition] = start
        self._positions.epochs[partition] = object()
        with suppress(IllegalStateError, KafkaUnavailable):
            self._owner.joined.pause(KafkaTopicPartition(*partition))
        self._owner.log_reset(partition, reason)

    def _report_lost(self, reason: LossReason, records: int) -> None:
        if self._observer is not None:
            self._observer.records_lost(reason, records)

    async def _run(self) -> None:
        """Compare topic ids and report foreign transactions every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                with translate_errors("reading topic ids", self._acls):
                    await self.compare_topic_ids()
                self._report_open_transactions()
            except KafkaError as error:
                log.debug("watch.failed", reason=str(error))
            except Exception as error:  # a bug, which must not end the watch
                log.error("watch.crashed", exc_info=without_message(error))  # noqa: TRY400 - without the exception's text

    async def check_after_pause(self) -> None:
        """Compare topic ids before records are returned, if this process was suspended. Raises KafkaError."""
        paused_s, self._received_at = monotonic() - self._received_at, monotonic()
        if paused_s > _PAUSE_S:
            with translate_errors("reading topic ids", self._acls):
                await self.compare_topic_ids()

    async def compare_topic_ids(self) -> None:
        """Reset the partitions of a topic that was deleted and created again while it was read."""
        found = await read_topic_ids(client_of(self._owner.joined), self._settings.topics.jobs)
        for topic, topic_id in found.items():
            if self._topic_ids.setdefault(topic, topic_id) != topic_id:
                self._topic_ids[topic] = topic_id
                for partition in [one for one in self._positions.next if one.topic == topic]:
                    start = await self._owner.beginning(partition)
                    self._reset(partition, start, "the topic was deleted and created again")

    def _report_open_transactions(self) -> None:
        """Warn of jobs that cannot be read because another program's transaction before them is open."""
        now = monotonic()
        for partition in list(self._positions.next):
            position, at = self._owner.position(partition), KafkaTopicPartition(*partition)
            with suppress(IllegalStateError, KafkaUnavailable):
                stable, end = self._owner.joined.last_stable_offset(at), self._owner.joined.highwater(at)
                if position is None or stable is None or end is None or not position == stable < end:
                    self._blocked.pop(partition, None)
                    continue
                offset, since = self._blocked.setdefault(partition, (position, now))
                if offset != position:
                    self._blocked[partition] = (position, now)
                elif now - since >= _OPEN_TRANSACTION_S:
                    self._blocked[partition] = (position, inf)  # reported
                    log.warning(
                        "jobs.behind_open_transaction",
                        partition=str(partition),
                        offset=position,
                        records=end - position,
                        reason="a transaction of another producer is open; its records and those after it cannot be "
                        "read until it ends: see kafka-transactions.sh --find-hanging",
                    )
