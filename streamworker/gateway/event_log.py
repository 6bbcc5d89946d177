"""The events topic for all clients of one process: it opens feeds and returns snapshots."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from streamworker.client.ids import new_job_id
from streamworker.gateway.cursors import Cursor
from streamworker.gateway.distributor import Distributor
from streamworker.gateway.ended_jobs import EndedJobs
from streamworker.gateway.feed_opener import FeedOpener
from streamworker.gateway.feed_registry import FeedRegistry
from streamworker.gateway.feeds import START, BrokerUnavailable, FeedEvent, JobSnapshot, Replay
from streamworker.gateway.followed import FollowedPartitions
from streamworker.gateway.history import History
from streamworker.gateway.home_partitions import draw_id, home_partitions
from streamworker.gateway.job_search import JobSearch
from streamworker.gateway.known_jobs import KnownJobs
from streamworker.gateway.log_observer import NullLogObserver
from streamworker.gateway.log_options import LogOptions
from streamworker.gateway.log_requests import LogRequests
from streamworker.gateway.snapshot import SnapshotBuilder
from streamworker.handover import Kind
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.scan import LogScanner

if TYPE_CHECKING:
    from streamworker.config import KafkaSettings
    from streamworker.gateway.job_feed import JobFeed
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.kafka.acls import RequiredAcls

__all__ = ["KafkaEventLog"]

log = structlog.get_logger()


class KafkaEventLog:
    """Implements `EventLog`. It owns the readers and what they have read, and connects the parts that use them."""

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
        self._known = KnownJobs()
        self._ended = EndedJobs()
        self._home: frozenset[int] = frozenset()
        self._followed = FollowedPartitions(
            settings, topic, self._scanner, reads_all=options.reads_all, idle_s=options.idle_s, acls=acls
        )
        self._registry = FeedRegistry(
            topic,
            self._scanner,
            self._history,
            self._followed,
            observer=self._observer,
            mailbox_bytes=options.mailbox_bytes,
        )
        self._distributor = Distributor(
            self._registry,
            self._history,
            self._followed,
            known=self._known,
            ended=self._ended,
            observer=self._observer,
        )
        self._requests = LogRequests(
            topic, self._scanner, self._followed, timeout_s=options.timeout_s, observer=self._observer
        )
        self._opener = FeedOpener(
            self._registry,
            self._requests,
            JobSearch(
                self._registry,
                self._requests,
                self._followed,
                known=self._known,
                options=options,
                observer=self._observer,
            ),
            self._history,
            known=self._known,
            observer=self._observer,
        )
        self._is_ready = False

    # Life

    @property
    def is_ready(self) -> bool:
        """Whether the log is started and its readers run."""
        return self._is_ready

    async def start(self) -> None:
        """Connect. Raises KafkaError, ConfigurationError."""
        try:
            await self._followed.start(
                on_tail=self._distributor.read_tail,
                on_committed=self._distributor.read_committed,
                on_read=self._distributor.write,
                on_lost=self._lose,
                on_paused=self._paused,
                on_replaced=self._begin_anew,
            )
        except BaseException:
            await self.stop()
            raise
        for reader in (self._followed.tail, self._followed.committed_tail):
            reader.crashed.add_done_callback(self._crashed)
        self._choose_home()
        self._opener.started()
        self._is_ready = True
        self._observer.followed_changed(self._followed.active)

    async def stop(self) -> None:
        """Close the readers; `next` of each feed raises BrokerUnavailable. Bounded in time; never raises."""
        self._is_ready = False
        await self._registry.stop()
        await self._followed.stop()
        await self._scanner.stop()

    def _choose_home(self) -> None:
        self._home = home_partitions(
            self._options.home_name, self._options.home_count, self._followed.partitions
        )

    def _crashed(self, crashed: asyncio.Future[None]) -> None:
        if not crashed.cancelled() and (error := crashed.exception()) is not None:
            self._is_ready = False
            self._registry.fail_all(error)

    def _lose(self, partition: int) -> None:
        """Give up everything of a partition whose log holds other records at offsets that were read."""
        log.warning("gateway.log_lost", topic=self.topic, partition=partition)
        self._known.drop(partition)
        self._registry.lose(partition)

    def _paused(self, partition: int) -> None:
        self._registry.drop_undecided(partition)
        self._observer.followed_changed(self._followed.active)

    def _begin_anew(self) -> None:
        """Forget the jobs of a topic that was replaced."""
        self._opener.topic_replaced()
        self._ended.clear()
        self._choose_home()

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
        await self._requests.acquire(partition)
        self._requests.release(partition)
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
        feed = await self._opener.open(job_id, parsed, since_ms)
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
        feed = await self._opener.open(job_id, place, since_ms)
        builder = SnapshotBuilder(job_id)
        try:
            await self._fold_replay(feed, builder)
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

    async def _fold_replay(self, feed: JobFeed, builder: SnapshotBuilder) -> None:
        """Take the events of the replay. Raises BrokerUnavailable where it does not go on."""
        stall_s = self._options.timeout_s
        try:
            await _fold(feed, builder, stall_s=stall_s)
        except TimeoutError:
            raise BrokerUnavailable(
                f"partition {feed.partition} of {self.topic} could not be read on for {stall_s:g} s"
            ) from None

    async def _skip_replay(self, feed: JobFeed, *, with_snapshot: bool) -> None:
        builder = SnapshotBuilder(feed.job_id)
        try:
            await self._fold_replay(feed, builder)
        except BaseException:
            feed.close()
            raise
        if not with_snapshot:
            feed.resumed_from = feed.place()
        elif builder.attempt is not None:
            feed.put_first(FeedEvent("snapshot", feed.cursor, builder.event(), builder.seq, builder.attempt))


async def _fold(
    feed: JobFeed, builder: SnapshotBuilder, *, to_end: bool = False, stall_s: float | None = None
) -> None:
    """Take the events of the replay, or all events with `to_end`. The terminal event stays in the feed.

    Raises TimeoutError where nothing arrives for `stall_s`.
    """
    mailbox = feed.mailbox
    while True:
        while (kind := mailbox.next_kind) is not None and kind is not Kind.ENDED:
            if (delivery := feed.fold()) is not None:
                builder.add(delivery)
        if kind is Kind.ENDED or (mailbox.is_live and not to_end):
            return
        async with asyncio.timeout(stall_s):
            await feed.changed()
