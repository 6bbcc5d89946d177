"""So much per minute, so many at once."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.core.throttle import RECOVERY_S, SPAN_S, Concurrency, Throttle


def test_throttle_lets_its_limit_go_at_once_and_the_rest_when_the_minute_is_over() -> None:
    """Each call frees its place a minute after it went."""
    throttle = Throttle(2)
    for now in (0.0, 10.0):
        assert throttle.wait_s(1, now) == 0
        throttle.take(1, now)

    assert throttle.wait_s(1, 20) == SPAN_S - 20
    assert throttle.wait_s(1, SPAN_S) == 0
    throttle.take(1, SPAN_S)
    assert throttle.wait_s(1, SPAN_S) == 10


def test_throttle_waits_for_as_much_as_is_needed() -> None:
    """A large amount waits until enough of the others are a minute old."""
    throttle = Throttle(100)
    for now in (0, 1, 2):
        throttle.take(30, now)

    assert throttle.wait_s(10, 3) == 0
    assert throttle.wait_s(50, 3) == SPAN_S + 1 - 3


def test_throttle_more_than_the_whole_limit_goes_alone() -> None:
    """Or it would never go."""
    throttle = Throttle(100)
    assert throttle.wait_s(1000, 0) == 0
    throttle.take(1000, 0)

    assert throttle.wait_s(1, 0) == SPAN_S


def test_throttle_settled_counts_what_it_came_to() -> None:
    """Less makes room at once; more is paid for by who comes next."""
    throttle = Throttle(100)
    taken = throttle.take(80, 0)
    assert throttle.wait_s(50, 0) > 0
    throttle.settle(taken, 20)
    assert throttle.wait_s(50, 0) == 0
    throttle.settle(taken, 300)

    assert throttle.wait_s(1, 0) == SPAN_S


def test_throttle_settled_after_its_minute_changes_nothing() -> None:
    """A stream may last longer than a minute; what went then is history."""
    throttle = Throttle(100)
    taken = throttle.take(80, 0)
    assert throttle.wait_s(100, SPAN_S) == 0
    throttle.settle(taken, 1000)

    assert throttle.wait_s(100, SPAN_S) == 0


@given(
    limit=st.integers(1, 20),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), min_size=1, max_size=60),
)
def test_throttle_never_lets_more_than_its_limit_go_in_any_minute(
    limit: int, steps: list[tuple[float, int]]
) -> None:
    """Not on average: in any window that ends with a call."""
    throttle, now = Throttle(limit), 0.0
    went: list[tuple[float, int]] = []
    for gap, wanted in steps:
        amount = min(wanted, limit)
        now += gap
        now += throttle.wait_s(amount, now)
        assert throttle.wait_s(amount, now) <= 1e-6
        throttle.take(amount, now)
        went.append((now, amount))
        assert sum(a for at, a in went if at > now - 60) <= limit


def test_concurrency_is_its_ceiling_until_the_upstream_refuses() -> None:
    """What fits, fits; above the ceiling only the end of a stream helps."""
    concurrency = Concurrency(10)

    assert concurrency.limit(0) == 10
    assert concurrency.wait_s(9, 0) == 0
    assert concurrency.wait_s(10, 0) == inf


def test_concurrency_refused_falls_below_what_was_open_and_recovers_in_time() -> None:
    """Multiplicative decrease, additive increase."""
    concurrency = Concurrency(300)
    concurrency.refused(1, 100, 1)
    assert concurrency.limit(1) == 70
    assert concurrency.limit(2) == 100
    assert concurrency.wait_s(101, 2) == pytest.approx(2 / 30)

    assert concurrency.limit(1 + RECOVERY_S) == 300


def test_concurrency_refusals_of_one_moment_count_once() -> None:
    """Calls that were on their way when we cut say nothing new."""
    concurrency = Concurrency(300)
    for _ in range(50):
        concurrency.refused(0.5, 100, 1)
    assert concurrency.limit(1) == 70
    concurrency.refused(1.2, 70, 1.5)
    assert concurrency.limit(1.5) == 85
    concurrency.refused(1.6, 80, 2)

    assert concurrency.limit(2) == 56


def test_concurrency_never_falls_below_one() -> None:
    """Somebody has to find out whether the upstream takes calls again."""
    concurrency = Concurrency(4)
    for now in range(1, 100):
        concurrency.refused(now, 1, now)
        assert concurrency.limit(now) >= 1
