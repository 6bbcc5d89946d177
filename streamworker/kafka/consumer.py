"""A member of the consumer group, as a `Source`.

The traps of aiokafka's consumer that this module handles:

* Every rebalance creates a new assignment in which *kept* partitions return to their committed offsets. So the first
  thing that happens on assignment, before anything can await, is a seek to the offset that is read next. A new
  partition is paused until its committed offset was read, after its former owner was fenced.
* aiokafka resets a position that the log does not have, and logs it at level info. Here the position is never reset:
  `LogWatch` reports what happened to the log.
* A record that aiokafka cannot decode blocks its partition. It is returned as an unreadable record instead.
* `getmany` may wait for an assignment for longer than its timeout, and a cancelled call leaks aiokafka's fetch count.
  So it is called in a task of its own, which is cancelled only at the end.
* `getmany()` without partitions means all partitions. To poll for errors only, a partition that does not exist is given.
* A commit carries the current generation and not the generation of the fetch, so the worker never commits for a
  partition that it lost in between.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from functools import partial
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

import structlog
from aiokafka import ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    IllegalStateError,
    OffsetOutOfRangeError,
)
from aiokafka.errors import KafkaError as ForeignKafkaError
from aiokafka.structs import OffsetAndMetadata

from streamworker.errors import InstanceFenced, KafkaError, KafkaRefused, KafkaUnavailable
from streamworker.kafka.acls import RequiredAcls
from streamworker.kafka.assignor import DeferredAssignor
from streamworker.kafka.clients import Consumer, FetchedRecord, new_consumer, record_of
from streamworker.kafka.compat import (
    FENCED_INSTANCE_ID,
    GROUP_MAX_SIZE_REACHED,
    Membership,
    client_of,
    known_position,
    offset_of_unreadable_record,
)
from streamworker.kafka.errors import describe_error, translate_errors
from streamworker.kafka.log_watch import LogWatch, Positions
from streamworker.kafka.read_records import ReadRecords
from streamworker.kafka.scan import LogScanner
from streamworker.log_throttle import LogThrottle
from streamworker.model import ConsumerRecord, Coordinates, TopicPartition
from streamworker.progress.moves import MoveSchedule

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence

    from streamworker.config import Settings
    from streamworker.model import CommitPoint
    from streamworker.observe import Observer
    from streamworker.ports import Assignments

__all__ = ["GroupConsumer"]

POLL_S = 0.25
"""How long one `receive` waits for records."""

STOP_TIMEOUT_S = 3.0
_NOTHING = KafkaTopicPartition("no-topic", 0)
_NEVER_MS = 10**9
_JOIN_TIMEOUT_MARGIN_MS = 15_000
_JOIN_POLL_S = 0.05
_STATIC_REBALANCE_S = 3.0
"""How long a rebalance waits for a static member. A live one learns of it by its next heartbeat, after a second at most."""

_JOINING_S = 2.0
"""How long the question for our membership waits for the end of a rebalance."""
_UNREADABLE = "the record cannot be decoded: a header name is not UTF-8"
_SILENCE_S = 3.0
"""How long a wait may last before the log says what is waited for."""

log = structlog.get_logger()


class GroupConsumer:
    """One member of the consumer group."""

    def __init__(self, settings: Settings, observer: Observer | None = None) -> None:
        self._settings = settings
        self._acls = RequiredAcls.of_worker(settings)
        self._scanner = LogScanner(settings.kafka, self._acls)
        self._consumer: Consumer | None = None
        self._membership: Membership | None = None
        self._assignments: Assignments | None = None
        self._positions = Positions()
        self._watch = LogWatch(settings, self, self._positions, observer)
        self._assigned_as: tuple[str, int] | None = None  # member id and generation of the last assignment
        self._moves = MoveSchedule(
            move_timeout_s=settings.worker.move_timeout_s,
            absence_s=inf if settings.worker.group_instance_id is None else _STATIC_REBALANCE_S,
        )
        self._assignor: DeferredAssignor | None = None
        self._heartbeat_at = monotonic()
        self.before_rebalance: Callable[[], Awaitable[None]] | None = None
        """Awaited while the generation that is about to end can still commit. Must be bounded in time."""
        self.uncommitted: Callable[[], Collection[TopicPartition]] = tuple
        """Returns the partitions with ended jobs whose offsets are not committed: another owner would repeat them."""

    async def start(self, assignments: Assignments) -> None:
        """Join the group and wait for the first assignment. Raises KafkaError."""
        self._assignments = assignments
        await self._join()
        self._watch.start()

    async def receive(self, partitions: Collection[TopicPartition], limit: int) -> list[ConsumerRecord]:
        """Return at most `limit` records of these partitions, waiting up to POLL_S for them.

        Raises KafkaError, and InstanceFenced if another process joined under the same instance id.

        A consumer whose coordination task has died is replaced by a new one, which joins as a new member.
        """
        if self._is_dead:
            self._check_refusal()  # to join again would fence the process that holds the instance id now
            await self._leave()
            await self._join()
        self._rejoin_if_due()
        wanted = [KafkaTopicPartition(*partition) for partition in partitions] or [_NOTHING]
        wait_ms = round(POLL_S * 1000) if partitions else 0
        try:
            fetched = await self._fetch(wanted, wait_ms, max(1, limit))
        except KafkaError:
            self._check_refusal()
            # aiokafka has advanced the positions of the partitions that it drained before the one that failed.
            self._rewind(partitions)
            return await self._receive_one_by_one(partitions, max(1, limit))
        await self._watch.check_after_pause()
        return [record for partition, batch in fetched.items() for record in self._note(partition, batch)]

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        """Have a partition taken over anew whose offsets mean other records now."""
        if self._assignments is not None:
            self._assignments.log_reset(partition, reason)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read this partition from `offset`. Does nothing if the partition is not owned any more."""
        self._positions.next[partition] = offset
        topic_partition = KafkaTopicPartition(*partition)
        with suppress(IllegalStateError, KafkaUnavailable):
            self.joined.seek(topic_partition, offset)
            self.joined.resume(topic_partition)

    def position(self, partition: TopicPartition) -> int | None:
        """Return the offset that is read next, behind transaction markers and aborted records; None if unknown."""
        if self._consumer is None or partition not in self._positions.next:
            return None
        return known_position(self._consumer, KafkaTopicPartition(*partition))

    async def read_back(
        self, partition: TopicPartition, start: int, stop: int
    ) -> AsyncGenerator[Sequence[ConsumerRecord]]:
        """Iterate over the committed records from `start` to before `stop`, in batches. Raises KafkaError.

        Other consumers read them, which are not members of the group: the position and the fetches stay as they are.
        """
        end = await self._scanner.end(partition, committed_only=True)  # the log may have lost its end
        batches = self._scanner.scan(partition, start, min(stop, end), committed_only=True)
        async with aclosing(batches):
            async for batch in batches:
                yield [record_of(record) for record in batch]

    def take_restart_offset(self, partition: TopicPartition) -> int | None:
        """Return where to read a partition whose log was reset, once; None if its committed offset counts."""
        return self._positions.restart_at.pop(partition, None)

    async def commit(self, points: Mapping[TopicPartition, CommitPoint]) -> bool:
        """Commit offsets in the current generation; return False if a rebalance prevents it. Raises KafkaError."""
        offsets = {
            KafkaTopicPartition(*partition): OffsetAndMetadata(*point) for partition, point in points.items()
        }
        try:
            with translate_errors("committing offsets", self._acls):
                async with asyncio.timeout(self._settings.kafka.request_timeout_s):
                    await self.joined.commit(offsets)
        except KafkaUnavailable as error:
            if isinstance(error.__cause__, CommitFailedError | IllegalStateError):
                return False
            raise
        return True

    async def beginning(self, partition: TopicPartition) -> int:
        """Return the partition's first offset. Raises KafkaError."""
        topic_partition = KafkaTopicPartition(*partition)
        with translate_errors(f"reading the first offset of {partition}", self._acls):
            offsets = await self.joined.beginning_offsets([topic_partition])
        return offsets[topic_partition]

    async def end(self, partition: TopicPartition) -> int:
        """Return the offset behind the partition's last readable record. Raises KafkaError."""
        topic_partition = KafkaTopicPartition(*partition)
        with translate_errors(f"reading the end offset of {partition}", self._acls):
            offsets = await self.joined.end_offsets([topic_partition])
        return offsets[topic_partition]

    def announce_departure(self) -> None:
        """Ask the group to move this member's partitions as soon as they have no open jobs, because it will leave.

        A static member keeps them: the process that replaces it is given the same partitions.
        """
        if self._settings.worker.group_instance_id is None:
            self._moves.leave()

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the group's coordinator last answered a heartbeat, or since the group was joined."""
        return monotonic() - self._heartbeat_at

    @property
    def records_behind(self) -> int:
        """How many records of the owned partitions were not returned yet, by the last fetch responses."""
        if self._consumer is None:
            return 0
        behind = 0
        for partition in self._positions.next:
            end, position = self._end_of(self._consumer, partition), self.position(partition)
            if end is not None and position is not None:
                behind += max(0, end - position)
        return behind

    def epoch(self, partition: TopicPartition) -> object:
        """Return the ownership epoch of a partition: a new object each time it is gained; None if it is not owned."""
        return self._positions.epochs.get(partition)

    @property
    def owners_are_fenced(self) -> bool:
        """Whether the broker refuses the writes of a partition's former owners."""
        return self._settings.worker.delivery == "exactly_once"

    async def confirm_membership(self) -> bool:
        """Ask the coordinator whether we are still the member that was assigned our partitions.

        Raises KafkaError where the coordinator gives no answer now. A broker that is away, or a rebalance in progress,
        is not a reason to stop open jobs.
        """
        membership = self._membership
        if membership is None:
            raise KafkaUnavailable("the worker is joining the group again")
        await self._wait_while_joining(membership)
        with translate_errors("asking the group's coordinator for our membership", self._acls):
            is_answered = await membership.heartbeat()
        member_id, generation = membership.identity
        if self._assigned_as is None or member_id != self._assigned_as[0]:
            return False
        is_settled = generation == self._assigned_as[1] and not membership.is_rejoining
        if not (is_answered and is_settled):
            raise KafkaUnavailable("the group's coordinator is away, or the group is rebalancing")
        return True

    async def _wait_while_joining(self, membership: Membership) -> None:
        waited_s = 0.0
        while membership.is_joining and waited_s < _JOINING_S:
            await asyncio.sleep(_JOIN_POLL_S)
            waited_s += _JOIN_POLL_S

    async def stop(self) -> None:
        """Leave the group. Bounded in time; never raises.

        A static member stays in it for its successor, except while partitions move: the rebalances that they need
        would wait for it.
        """
        await self._watch.stop()
        await self._scanner.stop()
        if self._membership is not None and self._delays_moves(self._membership):
            self._membership.give_up_instance()
        await self._leave()

    def _delays_moves(self, membership: Membership) -> bool:
        """Whether the group rebalances now, or will soon because a partition is promised."""
        if self._assignor is None or membership.refusal:  # a fenced member's place is another process's now
            return False
        return membership.is_rejoining or self._assignor.outcome.is_moving

    # Reading

    async def _fetch(
        self, wanted: list[KafkaTopicPartition], wait_ms: int, limit: int
    ) -> dict[KafkaTopicPartition, list[FetchedRecord]]:
        with translate_errors("reading jobs", self._acls):
            try:
                return await self.joined.getmany(*wanted, timeout_ms=wait_ms, max_records=limit)
            except (
                UnicodeDecodeError
            ) as error:  # raised by aiokafka's C code for a header name that is not UTF-8
                raise CorruptRecordException(str(error)) from error

    def _note(self, partition: KafkaTopicPartition, batch: list[FetchedRecord]) -> list[ConsumerRecord]:
        """Remember records as read, and convert them. Drops those of a partition whose log was reset meanwhile."""
        topic_partition = TopicPartition(*partition)
        if topic_partition not in self._positions.next:
            return []
        self._positions.read.setdefault(topic_partition, ReadRecords()).add(batch)
        if batch:
            self._positions.next[topic_partition] = batch[-1].offset + 1
        return [record_of(record) for record in batch]

    async def _receive_one_by_one(
        self, partitions: Collection[TopicPartition], limit: int
    ) -> list[ConsumerRecord]:
        """Read each partition by itself after a read of all failed, and handle the failure of each.

        Raises the last error that could not be handled, if no record could be read.
        """
        records: list[ConsumerRecord] = []
        failure: KafkaError | None = None
        for partition in partitions or [TopicPartition(*_NOTHING)]:
            if len(records) >= limit:
                break
            try:
                records += await self._receive_from(partition, limit - len(records))
            except KafkaError as error:
                self._rewind([partition])
                failure = error
        if failure is not None:
            if not records:
                raise failure
            log.warning("jobs.partition_unreadable", reason=str(failure))
        return records

    async def _receive_from(self, partition: TopicPartition, limit: int) -> list[ConsumerRecord]:
        at = KafkaTopicPartition(*partition)
        try:
            fetched = await self._fetch([at], round(POLL_S * 1000), limit)
        except KafkaError as error:
            cause = error.__cause__
            if isinstance(cause, OffsetOutOfRangeError):
                await self._watch.locate(partition)
                return []
            if isinstance(cause, CorruptRecordException) and isinstance(cause.__cause__, UnicodeDecodeError):
                return await self._read_around_unreadable(partition, limit)
            raise
        return self._note(at, fetched.get(at, []))

    async def _read_around_unreadable(self, partition: TopicPartition, limit: int) -> list[ConsumerRecord]:
        """Return the records before the one that cannot be decoded, or that one as an unreadable record."""
        at = KafkaTopicPartition(*partition)
        position = self._positions.next[partition]
        offset = offset_of_unreadable_record(self.joined, at)
        if offset is None or offset < position:
            raise KafkaUnavailable(f"{partition}: a record after {position} cannot be decoded")
        if offset > position:
            self._rewind([partition])
            fetched = await self._fetch([at], round(POLL_S * 1000), min(limit, offset - position))
            return self._note(at, fetched.get(at, []))
        self.seek(partition, offset + 1)
        coordinates = Coordinates(*partition, offset)
        log.warning("jobs.record_unreadable", at=str(coordinates), reason=_UNREADABLE)
        return [ConsumerRecord(at=coordinates, timestamp=-1, key=None, value=None, unreadable=_UNREADABLE)]

    # Positions

    def _rewind(self, partitions: Collection[TopicPartition]) -> None:
        for partition in partitions:
            if (offset := self._positions.next.get(partition)) is not None:
                self.seek(partition, offset)

    def _end_of(self, consumer: Consumer, partition: TopicPartition) -> int | None:
        with suppress(IllegalStateError):  # the partition is not owned any more
            return consumer.highwater(KafkaTopicPartition(*partition))
        return None

    # Membership

    @property
    def joined(self) -> Consumer:
        """The consumer that joined the group. Raises KafkaUnavailable while there is none."""
        if self._consumer is None:
            raise KafkaUnavailable("the worker left the group and has not joined it again yet")
        return self._consumer

    @property
    def _is_dead(self) -> bool:
        return self._membership is None or self._membership.has_died

    async def _join(self) -> None:
        assignor = self._assignor = DeferredAssignor(
            self._moves,
            identity=lambda: ("", -1) if self._membership is None else self._membership.identity,
            busy=self._busy,
            is_fenced=self.owners_are_fenced,
        )
        consumer = self._consumer = self._new_consumer(assignor)
        self._assigned_as = None
        try:
            with translate_errors(
                f"joining the consumer group at {self._settings.kafka.bootstrap_servers}", self._acls
            ):
                await consumer.start()
                await self._watch.compare_topic_ids()
                self._heartbeat_at = monotonic()
                self._membership = Membership(consumer, on_heartbeat=self._note_heartbeat)
                assigned = partial(self._assigned, consumer, self._membership, assignor)
                listener = _Listener(self._revoked, assigned)
                consumer.subscribe(list(self._settings.topics.jobs), listener=listener)
                await self._wait_for_assignment(self._membership)
        except BaseException:
            await self._leave()  # a consumer that failed to start leaves tasks behind
            raise

    def _busy(self) -> frozenset[TopicPartition]:
        """Return the partitions that another owner could not take over without repeating work."""
        if self._assignments is None:
            return frozenset()
        return self._assignments.busy_partitions() | frozenset(self.uncommitted())

    def _rejoin_if_due(self) -> None:
        """Ask for a rebalance if a promised partition may move, or if this member is about to leave."""
        if not self._moves.is_pending or self._membership is None:
            return
        now = monotonic()
        if self._moves.rejoin_at(self._busy(), now) <= now:
            self._membership.request_rejoin()
            self._moves.requested(now)

    def _new_consumer(self, assignor: DeferredAssignor) -> Consumer:
        session_ms = round(self._settings.worker.session_timeout_s * 1000)
        request_ms = round(self._settings.kafka.request_timeout_s * 1000)
        return new_consumer(
            self._settings.kafka,
            # The broker answers a JoinGroup when every member has joined, which may take as long as a session.
            request_timeout_ms=max(request_ms, session_ms + _JOIN_TIMEOUT_MARGIN_MS),
            group_id=self._settings.worker.group_id,
            group_instance_id=self._settings.worker.group_instance_id,
            auto_offset_reset="none",
            isolation_level="read_committed",
            session_timeout_ms=session_ms,
            # A member learns of a rebalance by its heartbeat, and the others wait for it.
            heartbeat_interval_ms=min(1000, session_ms // 10),
            rebalance_timeout_ms=round(self._rebalance_timeout_s * 1000),
            max_poll_interval_ms=_NEVER_MS,  # jobs take longer than any interval; the probes watch the poll loop
            partition_assignment_strategy=[assignor],
        )

    @property
    def _rebalance_timeout_s(self) -> float:
        """How long the others wait for this member in a rebalance.

        The broker removes a member that is late, unless it is static (KIP-345): then it keeps its partitions. So a static
        worker that is being replaced, or was removed by an autoscaler, holds up no move for the rest of its session.
        """
        session_s = self._settings.worker.session_timeout_s
        is_static = self._settings.worker.group_instance_id is not None
        return _STATIC_REBALANCE_S if is_static else session_s

    async def _wait_for_assignment(self, membership: Membership) -> None:
        """Wait until the listener was called. Raises aiokafka's KafkaError if the group refuses us."""
        now = asyncio.get_running_loop().time
        began, lines = now(), LogThrottle()
        while self._assigned_as is None:
            self._check_refusal()
            membership.check_errors()
            await asyncio.sleep(_JOIN_POLL_S)
            waited_s = now() - began
            if waited_s > _SILENCE_S and lines.failed(now()) is not None:
                log.warning(
                    "group.joining", waited_s=round(waited_s), reason=self._reason_to_wait(membership)
                )

    def _check_refusal(self) -> None:
        """Raise if the group refused this member with an error code that aiokafka does not know.

        Raises:
            InstanceFenced: another process joined under the same instance id.
            KafkaRefused: the group is full.
        """
        refusal = 0 if self._membership is None else self._membership.refusal
        if refusal == FENCED_INSTANCE_ID:
            raise InstanceFenced(
                f"another process joined group {self._settings.worker.group_id} later with worker.group_instance_id "
                f"{self._settings.worker.group_instance_id} (FENCED_INSTANCE_ID): this worker stops, the other one "
                "continues. Give each worker an id of its own"
            )
        if refusal == GROUP_MAX_SIZE_REACHED:
            raise KafkaRefused(
                f"group {self._settings.worker.group_id} has as many members as the broker's group.max.size allows: "
                "raise it, or run fewer workers"
            )

    def _reason_to_wait(self, membership: Membership) -> str:
        if not membership.knows_coordinator:
            return "the group's coordinator cannot be reached"
        limit_s = self._rebalance_timeout_s
        return (
            "the broker waits for the members of the group: for a new group group.initial.rebalance.delay.ms (3 s by "
            f"default), for a member that has not rejoined at most {limit_s:g} s"
        )

    def _note_heartbeat(self) -> None:
        self._heartbeat_at = monotonic()

    async def _leave(self) -> None:
        consumer, self._consumer, self._membership = self._consumer, None, None
        if consumer is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await consumer.stop()
        except (TimeoutError, ForeignKafkaError) as error:
            log.warning("consumer.stopped_uncleanly", reason=describe_error(error))
            with suppress(
                Exception
            ):  # `stop` did not come that far; closing raises what the client's tasks raised
                await client_of(consumer).close()

    async def _revoked(self, revoked: Collection[KafkaTopicPartition]) -> None:
        """Commit before a rebalance. Streams go on: which partitions are lost is known at the next assignment."""
        self._moves.rebalancing()
        if self._assignments is not None:
            self._assignments.rebalancing()
        if revoked and self.before_rebalance is not None:
            await self.before_rebalance()

    def _assigned(
        self,
        consumer: Consumer,
        membership: Membership,
        assignor: DeferredAssignor,
        assigned: Collection[KafkaTopicPartition],
    ) -> None:
        """Return kept partitions to the offset that is read next, before anything else; then report the assignment."""
        for topic_partition in assigned:
            if (offset := self._positions.next.get(TopicPartition(*topic_partition))) is not None:
                consumer.seek(topic_partition, offset)
            else:  # a position, so that aiokafka looks for none, and no fetch until the partition is open
                consumer.seek(topic_partition, 0)
                consumer.pause(topic_partition)
        self._assigned_as = membership.identity
        owned = frozenset(TopicPartition(*topic_partition) for topic_partition in assigned)
        kept = assignor.outcome.kept & owned
        self._positions.assigned(owned, kept)
        if self._assignments is not None:
            self._assignments.assigned(owned, kept=kept, promised=assignor.outcome.promised)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka is untyped
    """Called in aiokafka's coordination task. `assigned` must not be slow: no heartbeats are sent meanwhile."""

    def __init__(
        self,
        revoked: Callable[[Collection[KafkaTopicPartition]], Awaitable[None]],
        assigned: Callable[[Collection[KafkaTopicPartition]], None],
    ) -> None:
        self._revoked = revoked
        self._assigned = assigned

    async def on_partitions_revoked(self, revoked: Collection[KafkaTopicPartition]) -> None:
        await self._revoked(revoked)

    def on_partitions_assigned(self, assigned: Collection[KafkaTopicPartition]) -> None:
        self._assigned(assigned)
