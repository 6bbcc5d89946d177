"""Requests to the broker: what they return, and how they fail."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from streamworker.errors import KafkaUnavailable
from streamworker.gateway.feeds import BrokerUnavailable
from streamworker.gateway.mailbox import Opening
from tests.integration.events import delta, started
from tests.unit.gateway.log_parts import Parts, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from streamworker.gateway.log_requests import LogRequests

REQUESTS: list[tuple[str, Callable[[LogRequests], Awaitable[int]]]] = [
    ("beginning", lambda requests: requests.beginning(1)),
    ("end", lambda requests: requests.end(1)),
    ("offset_at", lambda requests: requests.offset_at(1, 1_700_000_000_000)),
]


async def test_log_requests_return_offsets_of_the_partition() -> None:
    """The end counts records of open transactions too."""
    parts = Parts()
    parts.scanner.begins[1], parts.scanner.ends[1], parts.scanner.offsets[1] = 3, 9, [5]
    assert [await request(parts.requests) for _, request in REQUESTS] == [3, 9, 5]
    assert parts.scanner.times == [1_700_000_000_000]


@pytest.mark.parametrize(("name", "request_"), REQUESTS)
async def test_log_request_that_kafka_refuses_is_an_unavailable_broker(
    name: str, request_: Callable[[LogRequests], Awaitable[int]]
) -> None:
    """With Kafka's reason, and its error as the cause."""
    parts = Parts()
    parts.scanner.failures[name, 1] = error = KafkaUnavailable("no leader")
    with pytest.raises(BrokerUnavailable, match="no leader") as raised:
        await request_(parts.requests)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(("name", "request_"), REQUESTS)
async def test_log_request_without_an_answer_in_time_is_an_unavailable_broker(
    name: str, request_: Callable[[LogRequests], Awaitable[int]]
) -> None:
    """The message has the limit."""
    parts = Parts(timeout_s=0.01)
    parts.scanner.hangs = True
    with pytest.raises(BrokerUnavailable, match=r"no broker answered within 0\.01 s"):
        await request_(parts.requests)
    assert parts.scanner.requests == {name: 1}


async def test_log_requests_read_a_partition_until_it_is_released() -> None:
    """How many partitions are read is reported."""
    parts = Parts()
    await parts.requests.acquire(0)
    await parts.requests.acquire(1)
    assert parts.observer.followed == [1, 2]
    parts.requests.release(0)
    parts.requests.release(1)
    parts.assert_released()


async def test_log_requests_wait_until_a_feed_is_opened() -> None:
    """The feed stays open."""
    parts = Parts()
    parts.write(record("j", 0, started("j")))
    feed = parts.feed("j")
    assert await parts.requests.opened(feed) is Opening.FOUND
    assert parts.observer.open == 1


@pytest.mark.parametrize("is_search", [False, True])
async def test_log_requests_close_a_feed_of_which_no_record_can_be_read(*, is_search: bool) -> None:
    """The message has the partition; a search that has read nothing is an outage too."""
    parts = Parts(timeout_s=0.01)
    parts.write(record("j", 0, started("j")))
    parts.scanner.hangs = True
    feed = parts.feed("j")
    with pytest.raises(BrokerUnavailable, match=r"partition 0 of t could not be read within 0\.01 s"):
        await parts.requests.opened(feed, is_search=is_search)
    parts.assert_released()
    await parts.registry.stop()


@pytest.mark.parametrize("is_search", [False, True])
async def test_log_requests_judge_by_what_was_read_when_the_time_is_over(*, is_search: bool) -> None:
    """A search that has read records of other jobs is spent; a feed behind a cursor has to find its record."""
    parts = Parts()
    parts.write(record("x", 0, started("x")), record("j", 5, started("j")))
    feed = parts.feed("j")
    parts.scanner.hangs = True
    feed.mailbox.passed(3)
    opening = parts.requests.opened(feed, timeout_s=0.01, is_search=is_search)
    if is_search:
        assert await opening is Opening.SPENT
        assert parts.observer.open == 1
    else:
        with pytest.raises(BrokerUnavailable):
            await opening
        parts.assert_released()
    await parts.registry.stop()


async def test_log_requests_close_a_feed_whose_client_leaves() -> None:
    """Its request is cancelled while the place is searched."""
    parts = Parts()
    parts.write(record("j", 0, delta("j", 1)))
    parts.scanner.hangs = True
    waiting = asyncio.create_task(parts.requests.opened(parts.feed("j")))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    parts.assert_released()
    await parts.registry.stop()
