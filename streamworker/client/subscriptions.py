"""Subscriptions to the jobs of one events topic: two tails for all of them, and a replay for each that joins late."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from streamworker.client.errors import Lagged
from streamworker.handover import Handover, read_head
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.tail import TopicTail
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.handover import Delivery, EventHead
    from streamworker.kafka.clients import FetchedRecord
    from streamworker.kafka.scan import LogScanner

__all__ = ["Subscription", "TopicSubscriptions"]

REPLAY_BYTES = 1 << 20
"""Size of the events that a replay queues for its subscriber before it waits."""

_ROOM_S = 0.5
"""How long a replay waits for its subscriber before it gives up its scan, and reads on from the log later."""


class Subscription:
    """The queue of one subscriber. It is dropped when more than `limit_bytes` are queued."""

    __slots__ = (
        "_error",
        "_room",
        "_waiter",
        "handover",
        "is_dropped",
        "job_id",
        "key",
        "limit_bytes",
        "partition",
        "replay",
    )

    def __init__(self, job_id: str, partition: int, handover: Handover, limit_bytes: int) -> None:
        self.job_id = job_id
        self.key = job_id.encode()
        self.partition = partition
        self.handover = handover
        self.limit_bytes = limit_bytes
        self.is_dropped = False
        self.replay: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    async def next(self) -> Delivery | None:
        """Wait for the next event; return None after the last one. Raises Lagged, KafkaError."""
        while (delivery := self.take()) is None:
            if self._error is not None:
                raise self._error
            if self.handover.is_over:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return delivery

    def take(self) -> Delivery | None:
        """Return the next event; None if there is none now."""
        if self._error is not None:
            return None
        delivery = self.handover.take()
        if self._room is not None and not self.is_full and not self._room.done():
            self._room.set_result(None)
        return delivery

    def wake(self) -> None:
        """Wake `next` if it has something to return."""
        waiter = self._waiter
        if waiter is not None and (
            self.handover.has_ready or self.handover.is_over or self._error is not None
        ):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Drop what is queued, and raise this error in `next`."""
        self._error = error
        self.handover = Handover(tail=0, committed=0)
        self.is_dropped = True
        self.wake()

    @property
    def is_full(self) -> bool:
        """Whether a replay must wait."""
        return self.handover.ready_bytes > REPLAY_BYTES

    async def room(self) -> None:
        """Wait until `is_full` is false."""
        while self.is_full:
            self._room = asyncio.get_running_loop().create_future()
            await self._room


class TopicSubscriptions:
    """All subscriptions to one events topic."""

    def __init__(self, settings: KafkaSettings, topic: str, scanner: LogScanner) -> None:
        self.topic = topic
        self._scanner = scanner
        self._tail = TopicTail(settings, topic, self._read_tail, committed_only=False)
        self._committed = TopicTail(settings, topic, self._read_committed, committed_only=True)
        # Tuples are replaced and never changed: a subscription may end while records are distributed.
        self._by_key: dict[bytes, tuple[Subscription, ...]] = {}
        self._waiting: dict[
            int, set[Subscription]
        ] = {}  # by partition: those that a new position may release

    async def start(self) -> None:
        """Connect. The positions of both readers are known when this returns. Raises KafkaError."""
        await self._tail.start()
        await self._committed.start()
        for tail in (self._tail, self._committed):
            tail.crashed.add_done_callback(self._fail_all)

    async def stop(self) -> None:
        """Close the readers; subscribers get no further events. Bounded in time; never raises."""
        replays = [one.replay for ones in self._by_key.values() for one in ones if one.replay is not None]
        for replay in replays:
            replay.cancel()
        await asyncio.gather(self._tail.stop(), self._committed.stop(), *replays, return_exceptions=True)

    def position(self, job_id: str) -> int:
        """Return the tail's position in the job's partition. Events of a job that is submitted later are after it."""
        return self._tail.positions[self._home(job_id.encode())]

    def subscribe(self, job_id: str, limit_bytes: int) -> Subscription:
        """Return a subscription to events that are written from now on."""
        partition = self._home(job_id.encode())
        tail, committed = self._positions(partition)
        handover = Handover(tail=tail, committed=committed)
        return self._add(Subscription(job_id, partition, handover, limit_bytes))

    async def subscribe_late(
        self, job_id: str, limit_bytes: int, *, offset: int | None = None, since_ms: int = 0
    ) -> Subscription:
        """Return a subscription to the job's events from an offset, or from a time, on. Raises KafkaError."""
        partition = self._home(job_id.encode())
        if offset is None:
            offset = await self._scanner.offset_at(TopicPartition(self.topic, partition), since_ms)
        tail, committed = self._positions(partition)
        handover = Handover(tail=offset, committed=committed, is_replaying=True)
        subscription = self._add(Subscription(job_id, partition, handover, limit_bytes))
        subscription.replay = asyncio.create_task(
            self._replay(subscription, offset, committed, tail), name=f"replay {job_id}"
        )
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription. A second call does nothing."""
        subscription.is_dropped = True
        if subscription.replay is not None:
            subscription.replay.cancel()
        self._waiting.get(subscription.partition, set()).discard(subscription)
        left = tuple(one for one in self._by_key.get(subscription.key, ()) if one is not subscription)
        if left:
            self._by_key[subscription.key] = left
        else:
            self._by_key.pop(subscription.key, None)

    def _home(self, key: bytes) -> int:
        return partition_of(key, len(self._tail.positions))

    def _positions(self, partition: int) -> tuple[int, int]:
        return self._tail.positions[partition], self._committed.positions.get(partition, 0)

    def _add(self, subscription: Subscription) -> Subscription:
        self._by_key[subscription.key] = (*self._by_key.get(subscription.key, ()), subscription)
        return subscription

    # Records

    def _read_tail(self, partition: int, records: Sequence[FetchedRecord], _: int) -> None:
        self._distribute(partition, records, Handover.tail, ends_only=False)

    def _read_committed(self, partition: int, records: Sequence[FetchedRecord], _: int) -> None:
        self._distribute(partition, records, Handover.committed, ends_only=True)

    def _distribute(
        self,
        partition: int,
        records: Iterable[FetchedRecord],
        feed: Callable[[Handover, int, EventHead, bytes], None],
        *,
        ends_only: bool,
    ) -> None:
        by_key = self._by_key
        waiting = self._waiting.get(partition)
        touched = set(waiting) if waiting else set()
        if by_key:
            for record in records:
                if (subscribed := by_key.get(record.key)) is None:  # type: ignore[arg-type]  # None is not a key of it
                    continue
                if record.value is None or (head := read_head(record.value)) is None:
                    continue
                if ends_only and head.type != "usage":
                    continue
                for subscription in subscribed:
                    if subscription.partition == partition and not subscription.is_dropped:
                        feed(subscription.handover, record.offset, head, record.value)
                        touched.add(subscription)
        for subscription in touched:
            self._settle(subscription)

    def _settle(self, subscription: Subscription) -> None:
        """Let a subscription know both positions; drop it if too much is queued; wake its subscriber."""
        handover, partition = subscription.handover, subscription.partition
        tail, committed = self._positions(partition)
        handover.passed(tail=tail, committed=committed)
        if handover.queued_bytes > subscription.limit_bytes:
            self._drop(subscription, Lagged(subscription.job_id, subscription.limit_bytes))
            return
        if handover.is_waiting:
            self._waiting.setdefault(partition, set()).add(subscription)
        elif (waiting := self._waiting.get(partition)) is not None:
            waiting.discard(subscription)
        subscription.wake()

    def _drop(self, subscription: Subscription, error: BaseException) -> None:
        self.unsubscribe(subscription)
        subscription.fail(error)

    def _fail_all(self, crashed: asyncio.Future[None]) -> None:
        if not crashed.cancelled() and (error := crashed.exception()) is not None:
            for subscription in [one for ones in self._by_key.values() for one in ones]:
                self._drop(subscription, error)

    # Replays

    async def _replay(self, subscription: Subscription, start: int, committed: int, tail: int) -> None:
        try:
            await self._scan(subscription, start, committed, committed_only=True)
            await self._scan(subscription, max(start, committed), tail, committed_only=False)
        except Exception as error:  # noqa: BLE001 - whatever it is, the subscriber must not wait for ever
            self._drop(subscription, error)
            return
        tail, committed = self._positions(subscription.partition)
        subscription.handover.caught_up(tail=tail, committed=committed)
        subscription.replay = None
        self._settle(subscription)

    async def _scan(self, subscription: Subscription, start: int, stop: int, *, committed_only: bool) -> None:
        """Replay a range of offsets. A subscriber that takes its events slowly does not occupy one of the scans."""
        handover, partition = subscription.handover, TopicPartition(self.topic, subscription.partition)
        feed = handover.replayed_committed if committed_only else handover.replayed
        while start < stop and not handover.is_over:
            await subscription.room()
            scan = self._scanner.scan(partition, start, stop, committed_only=committed_only)
            async with aclosing(scan) as batches:
                async for records in batches:
                    start = await self._replay_batch(subscription, records, feed)
                    if start <= records[-1].offset or handover.is_over:
                        break
                else:
                    return

    async def _replay_batch(
        self,
        subscription: Subscription,
        records: Sequence[FetchedRecord],
        feed: Callable[[int, EventHead, bytes], None],
    ) -> int:
        """Pass records on; return the next offset, which is within the batch if the subscriber has no room."""
        for record in records:
            if record.key == subscription.key and (head := read_head(record.value)) is not None:
                feed(record.offset, head, record.value or b"")
                if subscription.is_full and not await _has_room_soon(subscription):
                    return record.offset + 1
        subscription.wake()
        return records[-1].offset + 1


async def _has_room_soon(subscription: Subscription) -> bool:
    """Give a subscriber that is not slow the time to take what is queued."""
    subscription.wake()
    try:
        async with asyncio.timeout(_ROOM_S):
            await subscription.room()
    except TimeoutError:
        return False
    return True
