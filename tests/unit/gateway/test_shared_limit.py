"""The limit that the mailboxes of one connection share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamworker.gateway.job_feed import JobFeed
from streamworker.gateway.mailbox import Mailbox
from streamworker.gateway.shared_limit import CONNECTION_BYTES, SharedLimit
from streamworker.handover import RECORD_OVERHEAD, EventHead

if TYPE_CHECKING:
    from collections.abc import Sequence

VALUE = b"v" * (1000 - RECORD_OVERHEAD)
"""A queued record of it counts 1000 bytes."""


class Owner:
    """A log without records."""

    def refill(self, feed: JobFeed) -> None: ...

    def forget(self, feed: JobFeed) -> None: ...

    def position(self, partition: int) -> int:
        return partition


def live(count: int, limit: SharedLimit) -> Sequence[JobFeed]:
    """Return live feeds that share a limit."""
    feeds = []
    for _ in range(count):
        mailbox = Mailbox("j", 0, 0, committed=0)
        mailbox.join(tail=0, committed=0)
        feeds.append(feed := JobFeed(Owner(), mailbox))
        limit.add(feed)
    return feeds


def fill(feed: JobFeed, records: int) -> int:
    """Publish records until the feed's mailbox leaves the live path; return how many it took."""
    mailbox = feed.mailbox
    mailbox.tail(0, EventHead("a", 0, "started"), VALUE)
    for seq in range(1, records):
        if not mailbox.is_live:
            return seq
        mailbox.tail(seq, EventHead("a", seq, "delta"), VALUE)
    return records


def test_shared_limit_bounds_all_mailboxes_of_a_connection_together() -> None:
    """One of them may have its 256 KiB; all of them have 1 MiB, and the record each that was one too many."""
    limit = SharedLimit()
    feeds = live(256, limit)
    for feed in feeds:
        fill(feed, 1000)

    assert 0.9 * CONNECTION_BYTES < limit.queued_bytes <= CONNECTION_BYTES + 256 * 1000
    assert max(feed.queued_bytes for feed in feeds) <= 263_000
    assert min(feed.queued_bytes for feed in feeds) >= 1000
    assert not any(feed.mailbox.is_live for feed in feeds)


def test_shared_limit_leaves_a_few_slow_subscriptions_their_own_limits() -> None:
    """It is not reached by three of them."""
    feeds = live(3, SharedLimit())
    assert {fill(feed, 1000) for feed in feeds} == {263}


def test_shared_limit_lets_a_mailbox_go_on_that_its_client_has_emptied() -> None:
    """Although the others are as full as before: no subscription waits for another one."""
    limit = SharedLimit(10_000)
    first, second = live(2, limit)
    fill(first, 100)
    fill(second, 100)
    assert not second.mailbox.wants_records
    while second.take() is not None:
        pass
    assert second.mailbox.wants_records
    assert not first.mailbox.wants_records


@pytest.mark.parametrize("how", ["discarded", "taken"])
def test_shared_limit_gives_back_what_a_feed_had(how: str) -> None:
    """When its subscription ends, and when its client takes it."""
    limit = SharedLimit(10_000)
    first, second = live(2, limit)
    fill(first, 100)
    held = limit.queued_bytes
    if how == "discarded":
        limit.remove(first)
    else:
        while first.take() is not None:
            pass

    assert (held > 7000, limit.queued_bytes) == (True, 0)
    assert fill(second, 100) > 7
    assert how == "taken" or first.mailbox.limit_reached is None
