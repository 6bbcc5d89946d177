"""Open feeds at the place where a client goes on: behind a cursor, or at the first event of a job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from streamworker.client.ids import submitted_ms
from streamworker.gateway.feeds import CursorLost, JobNotFound
from streamworker.gateway.job_feed import JobFeed
from streamworker.gateway.mailbox import Mailbox, Opening

if TYPE_CHECKING:
    from streamworker.gateway.cursors import Cursor
    from streamworker.gateway.feed_registry import FeedRegistry
    from streamworker.gateway.history import History
    from streamworker.gateway.job_search import JobSearch
    from streamworker.gateway.known_jobs import KnownJobs
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.gateway.log_requests import LogRequests

__all__ = ["FeedOpener"]


class FeedOpener:
    """Finds what cursors name. A cursor of a replaced topic names a place in another log."""

    def __init__(
        self,
        registry: FeedRegistry,
        requests: LogRequests,
        search: JobSearch,
        history: History,
        *,
        known: KnownJobs,
        observer: LogObserver,
    ) -> None:
        self._registry = registry
        self._requests = requests
        self._search = search
        self._history = history
        self._known = known
        self._observer = observer
        self._compared_from_ms = 0
        self.replaced_ms = 0
        """When the topic was replaced, in ms since the epoch; 0 if it was not."""

    def started(self) -> None:
        """Note the time from when on a replacement of the topic is noticed."""
        self._compared_from_ms = _now_ms()

    def topic_replaced(self) -> None:
        """Distrust places of jobs that were submitted before now."""
        self.replaced_ms = _now_ms()

    async def open(self, job_id: str, cursor: Cursor | None, since_ms: int | None) -> JobFeed:
        """Open a feed behind the cursor; without one, or where its event is gone, at the job's first event.

        Raises CursorLost, JobNotFound, BrokerUnavailable.
        """
        if cursor is None:
            return await self._search.open(job_id, since_ms)
        if cursor.is_end:
            return self._over(job_id, cursor)
        if (feed := await self._resumed(job_id, cursor)) is not None:
            return feed
        try:
            feed = await self._search.open(job_id, since_ms)
        except JobNotFound:
            raise CursorLost(job_id, str(cursor)) from None
        # Behind a place, the job may have no event yet.
        if feed.mailbox.opening is Opening.EMPTY and not cursor.is_place:
            feed.close()
            raise CursorLost(job_id, str(cursor))
        return feed

    def _over(self, job_id: str, cursor: Cursor) -> JobFeed:
        """Return a feed behind the terminal event: there is nothing to deliver."""
        mailbox = Mailbox(job_id, cursor.partition, cursor.offset, committed=0)
        feed = JobFeed(self._registry, mailbox, behind=cursor)
        feed.is_over = True
        return feed

    async def _resumed(self, job_id: str, cursor: Cursor) -> JobFeed | None:
        """Open a feed behind a cursor; None if what it names is not there."""
        if cursor.partition not in self._search.partitions(job_id) or self._is_former(job_id, cursor):
            return None
        await self._requests.acquire(cursor.partition)
        try:
            if not await self._is_in_log(cursor):
                return None
            feed = self._registry.add(job_id, cursor.partition, cursor.offset, behind=cursor)
        finally:
            self._requests.release(cursor.partition)
        self._observer.replay_began("place" if cursor.is_place else "cursor")
        opening = await self._requests.opened(feed)
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
                found = await self._search.open(job_id)
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
        if known is not None and known.partition == place.partition:
            return known.offset < place.offset
        submitted = submitted_ms(job_id)
        if submitted is not None and submitted >= self._compared_from_ms:
            return False
        begin = await self._requests.beginning(place.partition)
        if place.offset <= begin:
            return False
        bound_ms = self._search.plan(job_id).bound_ms
        return await self._requests.offset_at(place.partition, bound_ms) <= begin

    def _is_former(self, job_id: str, cursor: Cursor) -> bool:
        """Whether a place may be one of the log before the topic was replaced. A cursor of an event is compared."""
        return cursor.is_place and (submitted_ms(job_id) or 0) < self.replaced_ms

    async def _is_in_log(self, cursor: Cursor) -> bool:
        """Whether the log reaches from the cursor's offset to the tail. What is in memory needs no request."""
        partition, offset = cursor.partition, cursor.offset
        tail = self._registry.position(partition)
        if offset < tail:
            # The record of an event is compared anyway.
            is_known = not cursor.is_place or self._history.at(partition, offset) is not None
            return is_known or offset >= await self._requests.beginning(partition)
        if cursor.is_place and offset == tail:
            return True
        end = await self._requests.end(partition)
        return offset <= end if cursor.is_place else offset < end


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
