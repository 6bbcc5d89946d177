"""Requests to the broker about the events topic, bounded in time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from streamworker.errors import KafkaError
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.gateway.mailbox import Opening
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from streamworker.gateway.followed import FollowedPartitions
    from streamworker.gateway.job_feed import JobFeed
    from streamworker.gateway.log_observer import LogObserver
    from streamworker.kafka.scan import LogScanner

__all__ = ["LogRequests"]

T = TypeVar("T")


class LogRequests:
    """Each request raises BrokerUnavailable if it fails or takes longer than `timeout_s`."""

    def __init__(
        self,
        topic: str,
        scanner: LogScanner,
        followed: FollowedPartitions,
        *,
        timeout_s: float,
        observer: LogObserver,
    ) -> None:
        self._topic = topic
        self._scanner = scanner
        self._followed = followed
        self._timeout_s = timeout_s
        self._observer = observer

    async def acquire(self, partition: int) -> None:
        """Read a partition live, until `release` was called as often as this."""
        await self._answer(self._followed.acquire(partition))
        self._observer.followed_changed(self._followed.active)

    def release(self, partition: int) -> None:
        """Undo one `acquire`."""
        self._followed.release(partition)

    async def beginning(self, partition: int) -> int:
        """Return the offset of the first record that retention has kept, or the end."""
        return await self._answer(self._scanner.beginning(self._at(partition)))

    async def end(self, partition: int) -> int:
        """Return the offset behind the last record, of open transactions too."""
        return await self._answer(self._scanner.end(self._at(partition), committed_only=False))

    async def offset_at(self, partition: int, time_ms: int) -> int:
        """Return the first offset whose record is from `time_ms` or later, else the end."""
        return await self._answer(self._scanner.offset_at(self._at(partition), time_ms))

    async def opened(
        self, feed: JobFeed, *, timeout_s: float | None = None, is_search: bool = False
    ) -> Opening:
        """Wait until it is known what is at the place of a feed; if that fails, close the feed.

        A search that has read some records when the time is over is spent.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await feed.opened()
        except TimeoutError:
            if is_search and feed.mailbox.scanned:
                return Opening.SPENT
            feed.close()
            raise BrokerUnavailable(
                f"partition {feed.partition} of {self._topic} could not be read within {limit_s:g} s"
            ) from None
        except BaseException:
            feed.close()
            raise

    def _at(self, partition: int) -> TopicPartition:
        return TopicPartition(self._topic, partition)

    async def _answer(self, request: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await request
        except TimeoutError:
            raise BrokerUnavailable(f"no broker answered within {self._timeout_s:g} s") from None
        except KafkaError as error:
            raise BrokerUnavailable(str(error)) from error
