"""The events topic for all clients of one process: one tail, one committed reader, merged replays, and feeds on them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import structlog

from streamworker.client.ids import new_job_id, submitted_ms
from streamworker.errors import KafkaError
from streamworker.gateway.cursors import Cursor
from streamworker.gateway.ended_jobs import EndedJobs
from streamworker.gateway.feeds import (
    START,
    BrokerUnavailable,
    CursorLost,
    FeedEvent,
    FeedLost,
    JobNotFound,
    JobSnapshot,
    Replay,
)
from streamworker.gateway.followed import IDLE_S, FollowedPartitions
from streamworker.gateway.history import HISTORY_BYTES, History
from streamworker.gateway.home_partitions import draw_id, home_partitions
from streamworker.gateway.job_feed import JobFeed
from streamworker.gateway.log_observer import NullLogObserver
from streamworker.gateway.mailbox import MAILBOX_BYTES, Fate, Mailbox, Opening
from streamworker.gateway.replays import Replays
from streamworker.gateway.search import SearchLimits, SearchPlan
from streamworker.gateway.snapshot import SnapshotBuilder
from streamworker.handover import Kind, read_head
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.scan import LogScanner
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Sequence

    from streamworker.config import KafkaSettings
    from streamworker.gateway.history import Block
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.handover import EventHead
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import FetchedRecord

__all__ = ["KafkaEventLog", "LogOptions"]

T = TypeVar("T")

log = structlog.get_logger()

_KNOWN_JOBS = 100_000
"""The number of jobs of which the offset of the first event is remembered."""

_REPORTED_STEP = 1 << 20
"""Change of the size of the history, in bytes, that is reported."""

_STARTED, _USAGE = b'"started"', b'"usage"'
"""Texts that the values of these events have."""

_APPEND_TIME = 1
"""`timestamp_type` of a record whose timestamp the broker has set."""


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """How the events topic is read."""

    reads_all: bool = False
    """Read all partitions, not only those with subscribers."""

    home_name: str = ""
    home_count: int = 0
    """How many home partitions the gateway of this name has; 0: it makes ids for any partition."""

    former_partitions: Sequence[int] = ()
    """Former counts of the topic's partitions: jobs from that time are looked for there too."""

    limits: SearchLimits = field(default_factory=SearchLimits)
    mailbox_bytes: int = MAILBOX_BYTES
    history_bytes: int = HISTORY_BYTES
    idle_s: float = IDLE_S
    timeout_s: float = 10.0
    """How long a request to the broker may take before BrokerUnavailable is raised."""


class KafkaEventLog:
    """Implements `EventLog`."""

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        options: LogOptions | None = None,
        *,
        observer: LogObserver | None = None,
        acls: RequiredAcls | None = None,
    ) -> None:
        self.topic = topic
        self._options = options = options or LogOptions()
        self._observer: LogObserver = observer or NullLogObserver()
        self._scanner = LogScanner(settings, acls)
        self._history = History(options.history_bytes)
        self._followed = FollowedPartitions(
            settings,
            topic,
            self._scanner,
            on_tail=self._read_tail,
            on_committed=self._read_committed,
            on_lost=self._lose,
            on_paused=self._forget_undecided,
            on_replaced=self._begin_anew,
            reads_all=options.reads_all,
            idle_s=options.idle_s,
            acls=acls,
        )
        self._replays = Replays(
            self._scanner,
            topic,
            self._history,
            self._followed,
            on_served=self._served,
            on_failed=self._failed,
            observer=self._observer,
        )
        # Tuples are replaced and never changed: a feed may be closed while records are distributed.
        self._by_key: dict[bytes, tuple[JobFeed, ...]] = {}
        self._feeds: dict[Mailbox, JobFeed] = {}
        self._waiting: dict[int, dict[JobFeed, None]] = {}  # those that a new position may release
        self._known: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # partition and offset of `started`
        self._ended = EndedJobs()
        self._has_append_time = False
        self._reported_size = 0
        self._home: frozenset[int] = frozenset()
        self._replaced_ms = 0
        self._compared_from_ms = 0
        """From when on a replacement of the topic is noticed, in ms since the epoch."""
        self._is_ready = False
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    @property
    def is_ready(self) -> bool:
        """Whether the log is started and its readers run."""
        return self._is_ready

    async def start(self) -> None:
        """Connect. Raises KafkaError, ConfigurationError."""
        try:
            await self._followed.start()
        except BaseException:
            await self.stop()
            raise
        for reader in (self._followed.tail, self._followed.committed_tail):
            reader.crashed.add_done_callback(self._crashed)
        self._choose_home()
        self._compared_from_ms = time.time_ns() // 1_000_000
        self._is_ready = True
        self._observer.followed_changed(self._followed.active)

    async def stop(self) -> None:
        """Close the readers; `next` of each feed raises BrokerUnavailable. Bounded in time; never raises."""
        self._is_ready = False
        for feed in list(self._feeds.values()):
            feed.fail(BrokerUnavailable("the gateway is stopping"))
            self.forget(feed)
        for task in self._tasks:
            task.cancel()
        await self._replays.stop()
        await self._followed.stop()
        await self._scanner.stop()

    def _choose_home(self) -> None:
        self._home = home_partitions(
            self._options.home_name, self._options.home_count, self._followed.partitions
        )

    def _crashed(self, crashed: asyncio.Future[None]) -> None:
        if not crashed.cancelled() and (error := crashed.exception()) is not None:
            self._is_ready = False
            self._failed(list(self._feeds), error)

    # Jobs

    def partition(self, job_id: str) -> int:
        """Return the partition of the job's events."""
        return partition_of(job_id.encode(), self._followed.partitions)

    def new_id(self, tenant: str = "") -> str:
        """Return a new job id in a home partition."""
        prefix = f"{tenant}." if tenant else ""
        count = self._followed.partitions
        return draw_id(lambda: prefix + new_job_id(), lambda key: partition_of(key, count), self._home, count)

    async def place(self, job_id: str) -> str:
        """Return a cursor from which the events of a job are read that is produced later. Raises BrokerUnavailable."""
        partition = self.partition(job_id)
        await self._acquire(partition)
        self._followed.release(partition)
        return str(Cursor(partition, self._followed.tail_position(partition)))

    async def open(
        self,
        job_id: str,
        *,
        cursor: str | None = None,
        since_ms: int | None = None,
        replay: Replay = Replay.EVENTS,
    ) -> JobFeed:
        """Open a feed. Raises InvalidCursor, CursorLost, JobNotFound, BrokerUnavailable."""
        parsed = Cursor.parse(cursor) if cursor is not None else None
        if parsed is not None and parsed.is_end:
            return self._over(job_id, parsed)
        feed = await self._located(job_id, parsed, since_ms)
        # Behind a place a client has had no event: a snapshot loses none, while nothing in its place would.
        is_behind_place = parsed is not None and parsed.is_place and replay is Replay.SNAPSHOT
        if replay is not Replay.EVENTS and (feed.resumed_from == START or is_behind_place):
            await self._skip_replay(feed, with_snapshot=replay is Replay.SNAPSHOT)
        return feed

    async def snapshot(
        self, job_id: str, *, cursor: str | None = None, since_ms: int | None = None, wait_s: float = 0.0
    ) -> JobSnapshot:
        """Return the job's state. Raises as `open` does."""
        loop = asyncio.get_running_loop()
        place = Cursor.parse(cursor) if cursor is not None else None
        if (ended := self._ended.get(job_id.encode(), loop.time())) is not None:
            return ended
        if place is not None and not place.is_place:
            place = None  # a snapshot needs all events of the job
        feed = await self._located(job_id, place, since_ms)
        builder = SnapshotBuilder(job_id)
        try:
            await _fold(feed, builder)
            if wait_s > 0 and feed.mailbox.next_kind is None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await _fold(feed, builder, to_end=True)
            if (ending := feed.fold()) is not None:
                builder.add(ending)
        finally:
            feed.close()
        snapshot = builder.job(feed.cursor)
        if snapshot.has_ended:
            self._ended.add(job_id.encode(), snapshot, loop.time())
        return snapshot

    async def _skip_replay(self, feed: JobFeed, *, with_snapshot: bool) -> None:
        builder = SnapshotBuilder(feed.job_id)
        try:
            await _fold(feed, builder)
        except BaseException:
            feed.close()
            raise
        if not with_snapshot:
            feed.resumed_from = feed.place()
        elif builder.attempt is not None:
            feed.put_first(FeedEvent("snapshot", feed.cursor, builder.event(), builder.seq, builder.attempt))

    # The place at which a feed begins

    async def _located(self, job_id: str, cursor: Cursor | None, since_ms: int | None) -> JobFeed:
        """Open a feed behind the cursor; without one, or where its event is gone, at the job's first event."""
        if cursor is None:
            return await self._searched(job_id, since_ms)
        if (feed := await self._resumed(job_id, cursor)) is not None:
            return feed
        try:
            feed = await self._searched(job_id, since_ms)
        except JobNotFound:
            raise CursorLost(job_id, str(cursor)) from None
        # Behind a place, the job may have no event yet.
        if feed.mailbox.opening is Opening.EMPTY and not cursor.is_place:
            feed.close()
            raise CursorLost(job_id, str(cursor))
        return feed

    async def _resumed(self, job_id: str, cursor: Cursor) -> JobFeed | None:
        """Open a feed behind a cursor; None if what it names is not there."""
        if cursor.partition not in self._partitions(job_id) or self._is_of_former_topic(job_id, cursor):
            return None
        await self._acquire(cursor.partition)
        try:
            if not await self._is_in_log(cursor):
                return None
            feed = self._subscribed(job_id, cursor.partition, cursor.offset, behind=cursor)
        finally:
            self._followed.release(cursor.partition)
        self._observer.replay_began("place" if cursor.is_place else "cursor")
        opening = await self._opened(feed, self._options.timeout_s)
        if opening is Opening.FOUND:
            return feed
        if opening is Opening.EMPTY:
            return feed if not cursor.is_place else await self._waiting_behind(job_id, cursor, feed)
        feed.close()
        return None

    async def _waiting_behind(self, job_id: str, place: Cursor, feed: JobFeed) -> JobFeed:
        """Return a feed behind a place where the job has no event; at the job's first event if that is before the place."""
        try:
            if await self._may_be_late(job_id, place):
                found = await self._searched(job_id, None)
                if found.mailbox.opening is Opening.FOUND:
                    feed.close()
                    return found
                found.close()
        except JobNotFound:
            pass
        except BaseException:
            feed.close()
            raise
        return feed

    async def _may_be_late(self, job_id: str, place: Cursor) -> bool:
        """Whether the job's events may be before a place behind which there are none.

        Of a job that this process has read, that is known. Otherwise the place may be one of a topic that was replaced
        before this process began to compare the topic's id: then all records are younger than the job. Nothing else is
        searched, because clients pass places so that the wait of a queued job is not searched again and again.
        """
        known = self._known.get(job_id.encode())
        if known is not None and known[0] == place.partition:
            return known[1] < place.offset
        submitted = submitted_ms(job_id)
        if submitted is not None and submitted >= self._compared_from_ms:
            return False
        at = TopicPartition(self.topic, place.partition)
        begin = await self._asked(self._scanner.beginning(at))
        if place.offset <= begin:
            return False
        return await self._asked(self._scanner.offset_at(at, self._plan(job_id, None).bound_ms)) <= begin

    def _is_of_former_topic(self, job_id: str, cursor: Cursor) -> bool:
        """Whether a place may be one of the log before the topic was replaced. A cursor of an event is compared."""
        return cursor.is_place and (submitted_ms(job_id) or 0) < self._replaced_ms

    async def _is_in_log(self, cursor: Cursor) -> bool:
        """Whether the log reaches from the cursor's offset to the tail. What is in memory needs no request."""
        partition, offset = cursor.partition, cursor.offset
        tail = self._followed.tail_position(partition)
        at = TopicPartition(self.topic, partition)
        if offset < tail:
            # The record of an event is compared anyway.
            is_known = not cursor.is_place or self._history.at(partition, offset) is not None
            return is_known or offset >= await self._asked(self._scanner.beginning(at))
        if cursor.is_place and offset == tail:
            return True
        end = await self._asked(self._scanner.end(at, committed_only=False))
        return offset <= end if cursor.is_place else offset < end

    async def _searched(self, job_id: str, since_ms: int | None) -> JobFeed:
        """Open a feed at the job's first event. Raises JobNotFound, BrokerUnavailable."""
        if (feed := await self._known_before(job_id)) is not None:
            return feed
        failure: JobNotFound | None = None
        empty: JobFeed | None = None
        for partition in self._partitions(job_id):
            try:
                feed = await self._search(job_id, partition, since_ms)
            except JobNotFound as error:
                failure = failure or error
                continue
            if feed.mailbox.opening is Opening.FOUND or empty is None:
                empty, former = feed, empty
                if former is not None:
                    former.close()
            if feed.mailbox.opening is Opening.FOUND:
                return feed
            if feed is not empty:
                feed.close()
        if empty is not None:
            return empty
        assert failure is not None
        raise failure

    async def _known_before(self, job_id: str) -> JobFeed | None:
        """Open a feed at the `started` that the tail has returned, if it did and remembers it."""
        key = job_id.encode()
        known = self._known.get(key)
        if known is None:
            return None
        partition, offset = known
        await self._acquire(partition)
        feed = self._subscribed(job_id, partition, offset)
        self._followed.release(partition)
        self._observer.replay_began("known")
        if await self._opened(feed, self._options.timeout_s) is Opening.FOUND:
            return feed
        feed.close()
        self._known.pop(key, None)
        return None

    async def _search(self, job_id: str, partition: int, since_ms: int | None) -> JobFeed:
        """Open a feed at the job's first event in a partition, or at its end if the job may have no event yet."""
        plan = self._plan(job_id, since_ms)
        at = TopicPartition(self.topic, partition)
        self._observer.replay_began("search")
        await self._acquire(partition)
        try:
            while True:
                start = await self._asked(self._scanner.offset_at(at, plan.bound_ms))
                feed, opening = await self._search_from(job_id, partition, start, plan)
                if opening is Opening.FOUND:
                    return self._report_search(plan, "found", feed)
                begin = await self._asked_or_close(self._scanner.beginning(at), feed)
                if opening is Opening.EMPTY and plan.may_wait(is_whole=start > begin or begin == 0):
                    return self._report_search(plan, "empty", feed)
                feed.close()
                if opening is not Opening.UNOPENED or start <= begin:
                    self._report_search(plan, "not_found", feed)
                    raise JobNotFound(job_id, plan.bound_ms, plan.advice)
                plan.step_back()
        finally:
            self._followed.release(partition)

    def _plan(self, job_id: str, since_ms: int | None) -> SearchPlan:
        return SearchPlan(
            self._options.limits,
            now_ms=time.time_ns() // 1_000_000,
            id_ms=submitted_ms(job_id),
            since_ms=since_ms,
            has_append_time=self._has_append_time,
        )

    async def _search_from(
        self, job_id: str, partition: int, start: int, plan: SearchPlan
    ) -> tuple[JobFeed, Opening]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        feed = self._subscribed(job_id, partition, start, scan_limit=plan.left_records)
        opening = await self._opened(feed, plan.left_s, is_search=True)
        plan.scanned(feed.mailbox.scanned, loop.time() - began)
        return feed, opening

    def _report_search(self, plan: SearchPlan, outcome: str, feed: JobFeed) -> JobFeed:
        self._observer.searched(outcome, plan.cost_records, plan.cost_s)
        return feed

    async def _opened(self, feed: JobFeed, timeout_s: float, *, is_search: bool = False) -> Opening:
        """Wait until it is known what is at the place. Raises BrokerUnavailable if no record can be read."""
        try:
            async with asyncio.timeout(timeout_s):
                return await feed.opened()
        except TimeoutError:
            if is_search and feed.mailbox.scanned:
                return Opening.SPENT
            feed.close()
            raise BrokerUnavailable(
                f"partition {feed.mailbox.partition} of {self.topic} could not be read within {timeout_s:g} s"
            ) from None
        except BaseException:
            feed.close()
            raise

    async def _asked_or_close(self, request: Awaitable[int], feed: JobFeed) -> int:
        try:
            return await self._asked(request)
        except BaseException:
            feed.close()
            raise

    async def _asked(self, request: Awaitable[T]) -> T:
        """Await a request to the broker. Raises BrokerUnavailable."""
        try:
            async with asyncio.timeout(self._options.timeout_s):
                return await request
        except TimeoutError:
            limit_s = self._options.timeout_s
            raise BrokerUnavailable(f"no broker answered within {limit_s:g} s") from None
        except KafkaError as error:
            raise BrokerUnavailable(str(error)) from error

    def _partitions(self, job_id: str) -> tuple[int, ...]:
        """Return the partitions in which the job's events may be, the present one first."""
        key = job_id.encode()
        counts = (self._followed.partitions, *self._options.former_partitions)
        return tuple(dict.fromkeys(partition_of(key, count) for count in counts))

    # Subscriptions

    async def _acquire(self, partition: int) -> None:
        await self._asked(self._followed.acquire(partition))
        self._observer.followed_changed(self._followed.active)

    def _subscribed(
        self,
        job_id: str,
        partition: int,
        position: int,
        *,
        behind: Cursor | None = None,
        scan_limit: int | None = None,
    ) -> JobFeed:
        """Register a feed whose replay begins at `position`. The partition must be acquired by the caller."""
        self._followed.hold(partition)
        mailbox = Mailbox(
            job_id,
            partition,
            position,
            committed=self._followed.committed_position(partition),
            cursor=None if behind is None or behind.is_place else behind,
            scan_limit=scan_limit,
            limit_bytes=self._options.mailbox_bytes,
        )
        feed = JobFeed(self, mailbox, behind=behind)
        self._by_key[mailbox.key] = (*self._by_key.get(mailbox.key, ()), feed)
        self._feeds[mailbox] = feed
        self._observer.subscribed(1)
        self._advance(feed)
        return feed

    def _over(self, job_id: str, cursor: Cursor) -> JobFeed:
        """Return a feed behind the terminal event: there is nothing to deliver."""
        mailbox = Mailbox(job_id, cursor.partition, cursor.offset, committed=0)
        feed = JobFeed(self, mailbox, behind=cursor)
        feed.is_over = True
        return feed

    def forget(self, feed: JobFeed) -> None:
        """Release what a feed holds. Repeated calls do nothing."""
        mailbox = feed.mailbox
        mailbox.is_closed = True
        if self._feeds.pop(mailbox, None) is None:
            return
        self._replays.discard(mailbox)
        self._waiting.get(mailbox.partition, {}).pop(feed, None)
        left = tuple(one for one in self._by_key[mailbox.key] if one is not feed)
        if left:
            self._by_key[mailbox.key] = left
        else:
            del self._by_key[mailbox.key]
        self._followed.release(mailbox.partition)
        self._observer.subscribed(-1)

    def position(self, partition: int) -> int:
        """Return the position of the tail."""
        return self._followed.tail_position(partition)

    # Replays

    def refill(self, feed: JobFeed) -> None:
        """Continue the replay of a feed whose mailbox has room again."""
        self._advance(feed)

    def _advance(self, feed: JobFeed) -> None:
        """Replay what is in memory; go live at the tail's position, else wait for records from Kafka."""
        mailbox = feed.mailbox
        tail = self._followed.tail_position(mailbox.partition)
        committed = self._followed.committed_position(mailbox.partition)
        self._history.replay(mailbox, committed)
        if not mailbox.wants_records:
            self._replays.discard(mailbox)
        elif mailbox.position < tail or mailbox.needs_its_record:
            self._replays.add(mailbox)
        else:
            self._replays.discard(mailbox)
            mailbox.join(tail=tail, committed=committed)
        self._note_waiting(feed)
        feed.wake()

    def _served(self, mailbox: Mailbox) -> None:
        if (feed := self._feeds.get(mailbox)) is not None:
            self._advance(feed)

    def _failed(self, mailboxes: Sequence[Mailbox], error: BaseException) -> None:
        for mailbox in mailboxes:
            if (feed := self._feeds.get(mailbox)) is not None:
                feed.fail(error)
                self.forget(feed)

    def _lose(self, partition: int) -> None:
        """Give up everything of a partition whose log holds other records at offsets that were read."""
        log.warning("gateway.log_lost", topic=self.topic, partition=partition)
        self._history.drop(partition)
        self._replays.cancel(partition)
        self._known = OrderedDict((key, at) for key, at in self._known.items() if at[0] != partition)
        for mailbox in [one for one in self._feeds if one.partition == partition]:
            self._failed([mailbox], FeedLost(mailbox.job_id))

    def _begin_anew(self) -> None:
        """Forget the jobs of a topic that was replaced. A cursor of before it names a place in another log."""
        self._replaced_ms = time.time_ns() // 1_000_000
        self._ended = EndedJobs()
        self._choose_home()

    def _forget_undecided(self, partition: int) -> None:
        """Forget what the committed reader has not passed: when the partition is read again, it begins later."""
        self._replays.cancel(partition)
        self._history.drop_undecided(partition, self._followed.committed_position(partition))
        self._observer.followed_changed(self._followed.active)

    # Live

    def _read_tail(self, partition: int, records: Sequence[FetchedRecord], begin: int, end: int) -> None:
        block = self._history.extend(partition, begin, end, records)
        waiting = self._waiting.get(partition)
        touched: dict[JobFeed, None] = dict(waiting) if waiting else {}
        self._distribute(block, records, touched)
        if records:
            self._has_append_time = records[-1].timestamp_type == _APPEND_TIME
        self._settle(partition, touched)
        self._replays.serve(block)
        if abs(self._history.size - self._reported_size) > _REPORTED_STEP:
            self._reported_size = self._history.size
            self._observer.history_changed(self._reported_size)

    def _distribute(
        self, block: Block, records: Sequence[FetchedRecord], touched: dict[JobFeed, None]
    ) -> None:
        """Pass records of the tail to the live feeds of their jobs; add those that have to take them to `touched`."""
        by_key, partition = self._by_key, block.partition
        for record in records:
            if (value := record.value) is None:
                continue
            if value.find(_STARTED) >= 0:  # `in` takes twice the time: it raises and drops a TypeError first
                self._remember(partition, record)
            if (feeds := by_key.get(record.key)) is not None and (head := read_head(value)) is not None:  # type: ignore[arg-type]  # None is not a key of it
                cursor, offset = None, record.offset
                for feed in feeds:
                    if feed.partition != partition:
                        continue
                    if (direct := feed.direct) is not None and direct.passes(offset, head):
                        cursor = feed.pushed(offset, head, value, cursor)
                    elif feed.mailbox.is_live:
                        touched[feed] = None
                        self._queue(block, feed, offset, head, value)

    def _queue(self, block: Block, feed: JobFeed, offset: int, head: EventHead, value: bytes) -> None:
        """Pass a record of the tail to the mailbox of a live feed. What follows must not overtake it."""
        feed.direct = None
        feed.mailbox.tail(offset, head, value)
        if head.type == "usage":
            committed = self._followed.committed_position(block.partition)
            # The committed reader may be ahead of the tail: it has reported this ending before.
            if block.fate(offset, value, committed) is Fate.FINAL:
                feed.mailbox.committed(offset, head, value)

    def _read_committed(self, partition: int, records: Sequence[FetchedRecord], _: int, __: int) -> None:
        by_key = self._by_key
        tail = self._followed.tail_position(partition)
        waiting = self._waiting.get(partition)
        touched: dict[JobFeed, None] = dict(waiting) if waiting else {}
        for record in records:
            value = record.value
            if value is None or value.find(_USAGE) < 0:
                continue
            self._history.note_committed(partition, record.offset)
            if (feeds := by_key.get(record.key)) is not None and (head := read_head(value)) is not None:  # type: ignore[arg-type]  # None is not a key of it
                for feed in feeds:
                    mailbox = feed.mailbox
                    # The rest of the log, behind the tail's or the replay's position, is judged when it is read.
                    passed = tail if mailbox.is_live else mailbox.position
                    if mailbox.partition == partition and record.offset < passed:
                        mailbox.committed(record.offset, head, value)
                        touched[feed] = None
        self._settle(partition, touched)

    def _settle(self, partition: int, feeds: Iterable[JobFeed]) -> None:
        """Let feeds know the positions of both readers, and wake their clients."""
        tail, committed = (
            self._followed.tail_position(partition),
            self._followed.committed_position(partition),
        )
        for feed in feeds:
            mailbox = feed.mailbox
            if not mailbox.is_live and not mailbox.is_closed and mailbox.has_left:
                mailbox.has_left = False
                self._observer.mailbox_overflowed()
                self._observer.replay_began("slow")
            mailbox.readers_passed(tail=tail, committed=committed)
            self._note_waiting(feed)
            if mailbox.wants_records:
                self._advance(feed)
            else:
                feed.wake()

    def _note_waiting(self, feed: JobFeed) -> None:
        mailbox = feed.mailbox
        if mailbox.is_waiting and not mailbox.is_closed:
            self._waiting.setdefault(mailbox.partition, {})[feed] = None
        elif (waiting := self._waiting.get(mailbox.partition)) is not None:
            waiting.pop(feed, None)

    def _remember(self, partition: int, record: FetchedRecord) -> None:
        """Remember where a job begins."""
        key, head = record.key, read_head(record.value)
        if key is None or head is None or head.type != "started":
            return
        self._ended.forget(key)
        if key not in self._known:
            self._known[key] = (partition, record.offset)
            while len(self._known) > _KNOWN_JOBS:
                self._known.popitem(last=False)


async def _fold(feed: JobFeed, builder: SnapshotBuilder, *, to_end: bool = False) -> None:
    """Take the events of the replay, or all events with `to_end`. The terminal event stays in the feed."""
    mailbox = feed.mailbox
    while True:
        while (kind := mailbox.next_kind) is not None and kind is not Kind.ENDED:
            if (delivery := feed.fold()) is not None:
                builder.add(delivery)
        if kind is Kind.ENDED or (mailbox.is_live and not to_end):
            return
        await feed.changed()
