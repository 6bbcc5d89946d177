"""What is known of a message while it is carried out."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from streamworker.gateway.websocket_work import Work


@pytest.fixture
async def work() -> Work:
    """The work of a message that becomes a subscription."""
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    return Work(task, subscribes=True)


async def test_work_is_a_subscription_from_the_opening_of_its_feed_until_its_end(work: Work) -> None:
    """A submit is none until it has succeeded: the client cannot end it."""
    feed, subscription = cast("Any", object()), cast("Any", object())
    assert not work.is_subscription
    work.open("3.10.w")
    assert (work.is_subscription, work.cursor, work.feed) == (True, "3.10.w", None)
    work.follow(feed, subscription)
    assert (work.is_subscription, work.cursor) == (True, None)
    assert work.feed is feed
    assert work.subscription is subscription
    work.end()
    assert (work.is_subscription, work.feed, work.subscription) == (False, None, None)


async def test_work_that_was_unsubscribed_is_so_until_its_end_was_reported(work: Work) -> None:
    """While the feed is being opened, too; `end` follows once."""
    work.open(None)
    work.is_unsubscribed = True
    assert work.is_subscription
    work.end()
    assert not work.is_unsubscribed
