"""The fair queue by example."""

from __future__ import annotations

import pytest

from streamworker.limits.fair_queue import FairQueue, TopicShares, ValueLimit, divide


def test_queue_lets_a_rare_tenant_go_before_the_many_jobs_of_another() -> None:
    """It waits for one job, not for two thousand."""
    queue: FairQueue[str] = FairQueue()
    for number in range(2000):
        queue.add(f"bulk-{number}", value="bulk")
    queue.add("rare", value="rare")

    assert [queue.pop() for _ in range(3)] == ["bulk-0", "rare", "bulk-1"]


def test_queue_gives_a_topic_that_comes_late_the_next_streams_until_it_has_its_share() -> None:
    """Its share of the streams, not only of the calls: long jobs of the other topic hold the rest."""
    queue: FairQueue[str] = FairQueue(TopicShares({"chat": 3}))
    for number in range(100):
        queue.add(f"bulk-{number}", topic="bulk")
    for _ in range(8):
        queue.pop()
    for number in range(100):
        queue.add(f"chat-{number}", topic="chat")
    for _ in range(8):
        queue.leave(topic="bulk")
        queue.pop()
        if queue.head() == "bulk-8":
            break

    assert queue.head() == "bulk-8"
    assert len(queue) == 200 - 8 - 6


def test_queue_skips_a_value_at_its_limit_until_a_stream_of_it_ends() -> None:
    """In the queues of all upstreams: the limit is the process's."""
    limit = ValueLimit(1)
    one: FairQueue[int] = FairQueue(limit=limit)
    other: FairQueue[int] = FairQueue(limit=limit)
    one.add(1, value="a")
    other.add(2, value="a")
    other.add(3, value="b")
    assert one.pop() == 1
    assert [other.pop(), other.head()] == [3, None]
    one.leave(value="a")

    assert other.pop() == 2


def test_queue_lets_a_value_that_was_at_its_limit_wait_for_the_others_turns() -> None:
    """Short jobs at the limit would otherwise always be next."""
    queue: FairQueue[int] = FairQueue(limit=ValueLimit(1))
    for number, value in enumerate("aabb"):
        queue.add(number, value=value)
    assert [queue.pop(), queue.pop()] == [0, 2]
    queue.leave(value="b")
    assert queue.head() == 3
    queue.leave(value="a")

    assert [queue.pop(), queue.pop()] == [3, 1]


def test_queue_forgets_a_value_at_its_limit_whose_jobs_were_removed() -> None:
    """The end of its stream resumes no queue."""
    queue: FairQueue[int] = FairQueue(limit=ValueLimit(1))
    queue.add(1, value="a")
    queue.add(2, value="a")
    queue.pop()
    assert queue.head() is None
    queue.remove(2)
    queue.leave(value="a")

    assert queue.head() is None


def test_queue_does_not_limit_jobs_without_a_value() -> None:
    """They are of no tenant, so no tenant's limit is theirs."""
    queue: FairQueue[int] = FairQueue(limit=ValueLimit(1))
    for number in range(3):
        queue.add(number)

    assert [queue.pop() for _ in range(3)] == [0, 1, 2]


def test_queue_without_waiting_jobs_has_no_head() -> None:
    """There is nothing to take from it."""
    queue: FairQueue[int] = FairQueue()
    assert queue.head() is None
    assert not queue.remove(1)

    with pytest.raises(IndexError, match="no job"):
        queue.pop()


def test_queue_refuses_an_item_that_waits_already() -> None:
    """It would leave twice."""
    queue: FairQueue[int] = FairQueue()
    queue.add(1)

    with pytest.raises(ValueError, match="already"):
        queue.add(1)
    assert 1 in queue


def test_shares_refuse_a_weight_below_one() -> None:
    """A topic of weight 0 would never be next."""
    with pytest.raises(ValueError, match="at least 1"):
        TopicShares({"bulk": 0})


def test_divide_leaves_room_for_one_where_a_share_would_be_none() -> None:
    """A topic that may hold no job would never be read."""
    assert divide(1024, ["bulk", "chat"], {"chat": 3}) == {"bulk": 256, "chat": 768}
    assert divide(10, ["bulk", "chat"], {"chat": 999}) == {"bulk": 1, "chat": 10}
    assert divide(1024, ["jobs"], {}) == {"jobs": 1024}
    assert divide(1024, [], {}) == {}
