"""The open feeds of one process, and the replays that they wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.gateway.feeds import BrokerUnavailable, FeedLost
from streamworker.gateway.job_feed import JobFeed
from streamworker.gateway.mailbox import Mailbox
from streamworker.gateway.replays import Replays

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamworker.gateway.cursors import Cursor
    from streamworker.gateway.followed import FollowedPartitions
    from streamworker.gateway.history import History
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.kafka.scan import LogScanner

__all__ = ["FeedRegistry"]


class FeedRegistry:
    """Implements `FeedOwner`. A feed is in it from `add` until `forget`, and holds its partition meanwhile."""

    def __init__(
        self,
        topic: str,
        scanner: LogScanner,
        history: History,
        followed: FollowedPartitions,
        *,
        observer: LogObserver,
        mailbox_bytes: int,
    ) -> None:
        self._history = history
        self._followed = followed
        self._observer = observer
        self._mailbox_bytes = mailbox_bytes
        self.replays = Replays(
            scanner,
            topic,
            history,
            followed,
            on_served=self._served,
            on_failed=self._fail,
            observer=observer,
        )
        self.by_key: dict[bytes, tuple[JobFeed, ...]] = {}
        """The feeds of each job. Tuples are replaced and never changed: a feed may be closed while records are distributed."""
        self._feeds: dict[Mailbox, JobFeed] = {}
        self.waiting: dict[int, dict[JobFeed, None]] = {}
        """The feeds of each partition that a new position of a reader may release: pass a copy of them to `settle`."""

    async def stop(self) -> None:
        """Close all feeds; `next` of each raises BrokerUnavailable. Bounded in time; never raises."""
        for feed in list(self._feeds.values()):
            feed.fail(BrokerUnavailable("the gateway is stopping"))
            self.forget(feed)
        await self.replays.stop()

    # Feeds

    def add(
        self,
        job_id: str,
        partition: int,
        position: int,
        *,
        behind: Cursor | None = None,
        scan_limit: int | None = None,
    ) -> JobFeed:
        """Return a new feed whose replay begins at `position`. The partition must be acquired by the caller."""
        self._followed.hold(partition)
        mailbox = Mailbox(
            job_id,
            partition,
            position,
            committed=self._followed.committed_position(partition),
            cursor=None if behind is None or behind.is_place else behind,
            scan_limit=scan_limit,
            limit_bytes=self._mailbox_bytes,
        )
        feed = JobFeed(self, mailbox, behind=behind)
        self.by_key[mailbox.key] = (*self.by_key.get(mailbox.key, ()), feed)
        self._feeds[mailbox] = feed
        self._observer.subscribed(1)
        self._advance(feed)
        return feed

    def forget(self, feed: JobFeed) -> None:
        """Release what a feed holds. Repeated calls do nothing."""
        mailbox = feed.mailbox
        mailbox.is_closed = True
        if self._feeds.pop(mailbox, None) is None:
            return
        self.replays.discard(mailbox)
        self.waiting.get(mailbox.partition, {}).pop(feed, None)
        left = tuple(one for one in self.by_key[mailbox.key] if one is not feed)
        if left:
            self.by_key[mailbox.key] = left
        else:
            del self.by_key[mailbox.key]
        self._followed.release(mailbox.partition)
        self._observer.subscribed(-1)

    def refill(self, feed: JobFeed) -> None:
        """Continue the replay of a feed whose mailbox has room again."""
        self._advance(feed)

    def position(self, partition: int) -> int:
        """Return the position of the tail."""
        return self._followed.tail_position(partition)

    def fail_all(self, error: BaseException) -> None:
        """Close all feeds; `next` of each raises the error."""
        self._fail(list(self._feeds), error)

    def lose(self, partition: int) -> None:
        """Close the feeds of a partition whose log holds other records at offsets that were read, and drop its history."""
        self._history.drop(partition)
        self.replays.cancel(partition)
        for mailbox in [one for one in self._feeds if one.partition == partition]:
            self._fail([mailbox], FeedLost(mailbox.job_id))

    def drop_undecided(self, partition: int) -> None:
        """Drop what the committed reader has not passed: when the partition is read again, it begins later."""
        self.replays.cancel(partition)
        self._history.drop_undecided(partition, self._followed.committed_position(partition))

    def _fail(self, mailboxes: Sequence[Mailbox], error: BaseException) -> None:
        for mailbox in mailboxes:
            if (feed := self._feeds.get(mailbox)) is not None:
                feed.fail(error)
                self.forget(feed)

    # Progress

    def settle(self, partition: int, feeds: Iterable[JobFeed]) -> None:
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

    def _served(self, mailbox: Mailbox) -> None:
        if (feed := self._feeds.get(mailbox)) is not None:
            self._advance(feed)

    def _advance(self, feed: JobFeed) -> None:
        """Replay what is in memory; go live at the tail's position, else wait for records from Kafka."""
        mailbox = feed.mailbox
        tail = self._followed.tail_position(mailbox.partition)
        committed = self._followed.committed_position(mailbox.partition)
        self._history.replay(mailbox, committed)
        if not mailbox.wants_records:
            self.replays.discard(mailbox)
        elif mailbox.position < tail or mailbox.needs_its_record:
            self.replays.add(mailbox)
        else:
            self.replays.discard(mailbox)
            mailbox.join(tail=tail, committed=committed)
        self._note_waiting(feed)
        feed.wake()

    def _note_waiting(self, feed: JobFeed) -> None:
        mailbox = feed.mailbox
        if mailbox.is_waiting and not mailbox.is_closed:
            self.waiting.setdefault(mailbox.partition, {})[feed] = None
        elif (waiting := self.waiting.get(mailbox.partition)) is not None:
            waiting.pop(feed, None)
