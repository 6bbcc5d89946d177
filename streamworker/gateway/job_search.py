"""Search for the first event of a job: where the tail has seen it, else by the time of the job's submission."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from streamworker.client.ids import submitted_ms
from streamworker.gateway.feeds import JobNotFound
from streamworker.gateway.mailbox import Opening
from streamworker.gateway.search import SearchPlan
from streamworker.kafka.partitioner import partition_of

if TYPE_CHECKING:
    from streamworker.gateway.feed_registry import FeedRegistry
    from streamworker.gateway.followed import FollowedPartitions
    from streamworker.gateway.job_feed import JobFeed
    from streamworker.gateway.known_jobs import KnownJobs
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.gateway.log_options import LogOptions
    from streamworker.gateway.log_requests import LogRequests

__all__ = ["JobSearch"]


class JobSearch:
    """Opens feeds at the first events of jobs."""

    def __init__(
        self,
        registry: FeedRegistry,
        requests: LogRequests,
        followed: FollowedPartitions,
        *,
        known: KnownJobs,
        options: LogOptions,
        observer: LogObserver,
    ) -> None:
        self._registry = registry
        self._requests = requests
        self._followed = followed
        self._known = known
        self._options = options
        self._observer = observer

    def partitions(self, job_id: str) -> tuple[int, ...]:
        """Return the partitions in which the job's events may be, the present one first."""
        key = job_id.encode()
        counts = (self._followed.partitions, *self._options.former_partitions)
        return tuple(dict.fromkeys(partition_of(key, count) for count in counts))

    def plan(self, job_id: str, since_ms: int | None = None) -> SearchPlan:
        """Return the plan of a search in one partition. `since_ms` is a time that the client gave, in ms since the epoch."""
        return SearchPlan(
            self._options.limits,
            now_ms=time.time_ns() // 1_000_000,
            id_ms=submitted_ms(job_id),
            since_ms=since_ms,
            has_append_time=self._followed.has_append_time,
        )

    async def open(self, job_id: str, since_ms: int | None = None) -> JobFeed:
        """Open a feed at the job's first event, or where that will be. Raises JobNotFound, BrokerUnavailable."""
        if (feed := await self._open_known(job_id)) is not None:
            return feed
        empty: JobFeed | None = None
        failure: JobNotFound | None = None
        try:
            for partition in self.partitions(job_id):
                try:
                    feed = await self._search(job_id, partition, since_ms)
                except JobNotFound as error:
                    failure = failure or error
                    continue
                if feed.mailbox.opening is Opening.FOUND:
                    _close(empty)
                    return feed
                if empty is None:
                    empty = feed
                else:
                    feed.close()
        except BaseException:
            _close(empty)
            raise
        if empty is not None:
            return empty
        assert failure is not None
        raise failure

    async def _open_known(self, job_id: str) -> JobFeed | None:
        """Open a feed at the `started` that the tail has returned, if it did and remembers it."""
        key = job_id.encode()
        known = self._known.get(key)
        if known is None:
            return None
        await self._requests.acquire(known.partition)
        feed = self._registry.add(job_id, known.partition, known.offset)
        self._requests.release(known.partition)
        self._observer.replay_began("known")
        if await self._requests.opened(feed) is Opening.FOUND:
            return feed
        feed.close()
        self._known.forget(key)
        return None

    async def _search(self, job_id: str, partition: int, since_ms: int | None) -> JobFeed:
        """Open a feed at the job's first event in a partition, or at its end if the job may have no event yet."""
        plan = self.plan(job_id, since_ms)
        self._observer.replay_began("search")
        await self._requests.acquire(partition)
        try:
            while True:
                start = await self._requests.offset_at(partition, plan.bound_ms)
                feed, opening = await self._search_from(job_id, partition, start, plan)
                if opening is Opening.FOUND:
                    return self._report(plan, "found", feed)
                begin = await self._beginning_or_close(feed)
                if opening is Opening.EMPTY and plan.may_wait(is_whole=start > begin or begin == 0):
                    return self._report(plan, "empty", feed)
                feed.close()
                if opening is not Opening.UNOPENED or start <= begin:
                    self._report(plan, "not_found", feed)
                    raise JobNotFound(job_id, plan.bound_ms, plan.advice)
                plan.step_back()
        finally:
            self._requests.release(partition)

    async def _search_from(
        self, job_id: str, partition: int, start: int, plan: SearchPlan
    ) -> tuple[JobFeed, Opening]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        feed = self._registry.add(job_id, partition, start, scan_limit=plan.left_records)
        opening = await self._requests.opened(feed, timeout_s=plan.left_s, is_search=True)
        plan.scanned(feed.mailbox.scanned, loop.time() - began)
        return feed, opening

    async def _beginning_or_close(self, feed: JobFeed) -> int:
        try:
            return await self._requests.beginning(feed.partition)
        except BaseException:
            feed.close()
            raise

    def _report(self, plan: SearchPlan, outcome: str, feed: JobFeed) -> JobFeed:
        self._observer.searched(outcome, plan.cost_records, plan.cost_s)
        return feed


def _close(feed: JobFeed | None) -> None:
    if feed is not None:
        feed.close()
