"""The consumer group, as a `Source`. Every trap of aiokafka's consumer that we know of is met here.

* Rebalances are eager: each one makes a new assignment in which *kept* partitions rewind to their committed offset. So
  the first thing that happens on assignment, before anything can await, is a seek to where we were.
* `getmany` may wait for an assignment longer than its timeout; it runs in a task of its own and is never cancelled but
  at the end, because a cancelled one leaks aiokafka's fetch count.
* `getmany()` without partitions means all of them; asked for none, we poll a partition that does not exist, which keeps
  errors of the coordinator coming and touches no record.
* Commits carry the current generation, not the one of the fetch, so the worker never commits for what it let go.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import CommitFailedError, CorruptRecordException, IllegalStateError
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import KafkaError, KafkaUnavailable
from streamworker.kafka.assignor import new_sticky_assignor
from streamworker.kafka.connection import client_arguments, install_client
from streamworker.kafka.errors import describe_error, translate_errors
from streamworker.model import ConsumerRecord, Coordinates, TopicPartition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from streamworker.config import Settings
    from streamworker.model import CommitPoint
    from streamworker.ports import Assignments

__all__ = ["GroupConsumer", "record_of"]

POLL_S = 0.25
"""How long one `receive` waits for records."""

STOP_TIMEOUT_S = 3.0
_NOTHING = KafkaTopicPartition("no-topic", 0)
_NEVER_MS = 10**9

log = structlog.get_logger()


class GroupConsumer:
    """One member of the consumer group."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: Any = None
        self._assignments: Assignments | None = None
        self._next: dict[TopicPartition, int] = {}  # where we were in each partition that is ours
        self._epochs: dict[TopicPartition, object] = {}
        self._membership: tuple[str, int] | None = None  # member id and generation of the last assignment
        self._heartbeat_at = monotonic()
        self.before_rebalance: Callable[[], Awaitable[None]] | None = None
        """Awaited while the generation that is about to end can still commit. Must be bounded in time."""

    async def start(self, assignments: Assignments) -> None:
        """Join the group. Raises KafkaError."""
        self._assignments = assignments
        await self._join()

    async def receive(self, partitions: Collection[TopicPartition], limit: int) -> list[ConsumerRecord]:
        """Return records of these partitions, at most `limit`, waiting a moment for them.

        A consumer whose coordination has died is replaced by a new one, which joins as a new member.
        """
        if self._is_dead:
            await self._leave()
            await self._join()
        wanted = [KafkaTopicPartition(*partition) for partition in partitions] or [_NOTHING]
        wait_ms = round(POLL_S * 1000) if partitions else 0
        try:
            fetched = await self._fetch(wanted, wait_ms, max(1, limit))
        except KafkaError as error:
            # What aiokafka had drained of the others before it came to the bad one is gone, positions included.
            self._go_back(partitions)
            fetched = await self._fetch_one_by_one(wanted, max(1, limit))
            if not fetched:
                raise
            log.warning("jobs.partition_unreadable", reason=str(error))
        records = [record_of(record) for batch in fetched.values() for record in batch]
        for record in records:
            self._next[record.topic_partition] = record.at.offset + 1
        return records

    async def _fetch(self, wanted: list[Any], wait_ms: int, limit: int) -> dict[Any, list[Any]]:
        with translate_errors("reading jobs"):
            try:
                return await self._client.getmany(*wanted, timeout_ms=wait_ms, max_records=limit)  # type: ignore[no-any-return]
            except UnicodeDecodeError as error:  # a header's name; aiokafka's C code lets it through
                raise CorruptRecordException(str(error)) from error

    async def _fetch_one_by_one(self, wanted: list[Any], limit: int) -> dict[Any, list[Any]]:
        fetched: dict[Any, list[Any]] = {}
        for one in wanted:
            try:
                found = await self._fetch([one], round(POLL_S * 1000), limit)
            except KafkaError:
                self._go_back([TopicPartition(*one)])
                continue
            fetched |= found
            limit -= sum(map(len, found.values()))
            if limit <= 0:
                break
        return fetched

    def _go_back(self, partitions: Collection[TopicPartition]) -> None:
        for partition in partitions:
            if (offset := self._next.get(partition)) is not None:
                self.seek(partition, offset)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read this partition from here on; nothing happens if it is not ours any more."""
        self._next[partition] = offset
        with suppress(IllegalStateError, KafkaUnavailable):
            self._client.seek(KafkaTopicPartition(*partition), offset)

    async def commit(self, points: Mapping[TopicPartition, CommitPoint]) -> bool:
        """Commit by generation; False if a rebalance is in the way. Raises KafkaError."""
        offsets = {
            KafkaTopicPartition(*partition): OffsetAndMetadata(*point) for partition, point in points.items()
        }
        try:
            with translate_errors("committing offsets"):
                async with asyncio.timeout(self._settings.kafka.request_timeout_s):
                    await self._client.commit(offsets)
        except KafkaUnavailable as error:
            if isinstance(error.__cause__, CommitFailedError | IllegalStateError):
                return False
            raise
        return True

    async def beginning(self, partition: TopicPartition) -> int:
        """Return the partition's first offset. Raises KafkaError."""
        topic_partition = KafkaTopicPartition(*partition)
        with translate_errors(f"asking where {partition} begins"):
            offsets = await self._client.beginning_offsets([topic_partition])
        return int(offsets[topic_partition])

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the group's coordinator last answered a heartbeat, or since we joined."""
        return monotonic() - self._heartbeat_at

    @property
    def records_behind(self) -> int:
        """How many records of our partitions are not handed out yet, as far as the broker's last answers tell."""
        if self._consumer is None:
            return 0
        ends = {partition: self._end_of(partition) for partition in self._next}
        return sum(max(0, end - self._next[partition]) for partition, end in ends.items() if end is not None)

    def _end_of(self, partition: TopicPartition) -> int | None:
        with suppress(IllegalStateError):  # not ours any more
            return self._consumer.highwater(KafkaTopicPartition(*partition))  # type: ignore[no-any-return]
        return None

    def epoch(self, partition: TopicPartition) -> object:
        """Return a token for the time in which the partition was ours without a break; None if it is not ours."""
        return self._epochs.get(partition)

    @property
    def owners_are_fenced(self) -> bool:
        """Whether a former owner of a partition is refused by the broker, whatever it believes."""
        return self._settings.worker.delivery == "exactly_once"

    async def confirm_membership(self) -> bool:
        """Ask the coordinator whether we still are the member that got our partitions.

        Raises KafkaError where there is no answer now: a broker that is away, or a rebalance on its way, is no reason
        to stop what runs.
        """
        coordinator, membership = self._client._coordinator, self._membership  # noqa: SLF001 - no public way to ask
        if coordinator is None:
            raise KafkaUnavailable("the group is being joined anew")
        with translate_errors("asking the group's coordinator for our membership"):
            is_answered = await coordinator._do_heartbeat()  # noqa: SLF001 - it forgets our id if the group did
        if membership is None or coordinator.member_id != membership[0]:
            return False
        is_settled = coordinator.generation == membership[1] and not coordinator._rejoin_needed_fut.done()  # noqa: SLF001
        if not (is_answered and is_settled):
            raise KafkaUnavailable("the group's coordinator is away, or the group is rebalancing")
        return True

    async def stop(self) -> None:
        """Leave the group. Bounded in time."""
        await self._leave()

    async def _join(self) -> None:
        session_ms = round(self._settings.worker.session_timeout_s * 1000)
        assignor = new_sticky_assignor()
        arguments = client_arguments(self._settings.kafka)
        # A JoinGroup is answered when every member has come, so it may take as long as a rebalance.
        arguments["request_timeout_ms"] = max(arguments["request_timeout_ms"], session_ms + 15_000)
        consumer = AIOKafkaConsumer(
            **arguments,
            group_id=self._settings.worker.group_id,
            group_instance_id=self._settings.worker.group_instance_id,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=min(3000, session_ms // 10),
            rebalance_timeout_ms=session_ms,
            max_poll_interval_ms=_NEVER_MS,  # jobs last longer than any interval; the probes watch the poll loop
            partition_assignment_strategy=[assignor],
        )
        install_client(consumer._client, self._settings.kafka)  # noqa: SLF001 - it has no public name
        consumer.subscribe(list(self._settings.topics.jobs), listener=_Listener(self, consumer, assignor))
        self._consumer = consumer
        try:
            with translate_errors(f"joining the consumer group at {self._settings.kafka.bootstrap_servers}"):
                await consumer.start()
        except BaseException:
            await self._leave()  # a consumer that failed to start leaves tasks behind
            raise
        self._listen_to_heartbeats(consumer._coordinator)  # noqa: SLF001 - it has no public name

    def _listen_to_heartbeats(self, coordinator: Any) -> None:
        """Note each heartbeat that was answered: nothing else tells a broker that is away from one with no records."""
        heartbeat = coordinator._do_heartbeat  # noqa: SLF001 - nothing public is told

        async def noted() -> bool:
            if is_answered := await heartbeat():
                self._heartbeat_at = monotonic()
            return bool(is_answered)

        self._heartbeat_at = monotonic()
        coordinator._do_heartbeat = noted  # noqa: SLF001

    async def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await consumer.stop()
        except (TimeoutError, ForeignKafkaError) as error:
            log.warning("consumer.stopped_uncleanly", reason=describe_error(error))
            with suppress(Exception):  # it raises what its tasks died of
                await consumer._client.close()  # noqa: SLF001 - `stop` did not come that far

    @property
    def _client(self) -> Any:
        if self._consumer is None:
            raise KafkaUnavailable("the group was left and is not joined again yet")
        return self._consumer

    @property
    def _is_dead(self) -> bool:
        """Whether this consumer will never be a member again.

        A heartbeat that failed for good, such as for a right that was taken away, is never begun anew: the consumer
        raises that error for ever, also when the right is back.
        """
        if self._consumer is None:
            return True
        coordinator = self._consumer._coordinator  # noqa: SLF001 - as above
        routine = getattr(coordinator, "_coordination_task", None)
        heartbeat = getattr(coordinator, "_heartbeat_task", None)
        return (routine is not None and routine.done()) or _has_failed(heartbeat)

    def _assigned(self, assigned: frozenset[TopicPartition], *, is_continuous: bool) -> None:
        self._next = {partition: offset for partition, offset in self._next.items() if partition in assigned}
        kept = self._epochs if is_continuous else {}
        self._epochs = {partition: kept.get(partition) or object() for partition in assigned}
        assert self._assignments is not None
        self._assignments.assigned(assigned, is_continuous=is_continuous)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """Hears of rebalances in the consumer's own task, in which nothing may be slow: no heartbeats are sent meanwhile."""

    def __init__(self, owner: GroupConsumer, consumer: Any, assignor: Any) -> None:
        self._owner = owner
        self._consumer = consumer
        self._assignor = assignor
        owner._membership = None  # noqa: SLF001 - one object in two halves

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Commit. Which partitions are gone is known at the next assignment; streams go on until then."""
        if self._owner._assignments is not None:  # noqa: SLF001 - one object in two halves
            self._owner._assignments.rebalancing()  # noqa: SLF001
        if revoked and self._owner.before_rebalance is not None:
            await self._owner.before_rebalance()

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Put kept partitions back to where we were, first of all; then tell."""
        for partition, offset in self._owner._next.items():  # noqa: SLF001 - one object in two halves
            topic_partition = KafkaTopicPartition(*partition)
            if topic_partition in assigned:
                self._consumer.seek(topic_partition, offset)
        coordinator = self._consumer._coordinator  # noqa: SLF001 - generation and member id have no public name
        generation, member = coordinator.generation, coordinator.member_id
        self._assignor.on_generation_assignment(generation)
        # A generation that passed without us may have had another owner, unless owners are fenced.
        before = self._owner._membership  # noqa: SLF001
        is_next = before is not None and (generation == before[1] + 1 or self._owner.owners_are_fenced)
        is_continuous = before is not None and member == before[0] and is_next
        self._owner._membership = (member, generation)  # noqa: SLF001
        ours = frozenset(TopicPartition(*topic_partition) for topic_partition in assigned)
        self._owner._assigned(ours, is_continuous=is_continuous)  # noqa: SLF001


def _has_failed(task: asyncio.Task[None] | None) -> bool:
    return task is not None and task.done() and not task.cancelled() and task.exception() is not None


def record_of(record: Any) -> ConsumerRecord:
    """Return what aiokafka fetched as ours."""
    return ConsumerRecord(
        at=Coordinates(record.topic, record.partition, record.offset),
        timestamp=record.timestamp,
        key=record.key,
        value=record.value,
        headers=tuple(record.headers),
    )
