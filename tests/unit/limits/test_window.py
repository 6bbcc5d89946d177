"""The sliding window of a per-minute limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamworker.limits.window import SPAN_S, SlidingWindow


def test_window_admits_its_limit_at_once_and_the_rest_after_a_minute() -> None:
    """Each call frees its place a minute after it began."""
    throttle = SlidingWindow(2)
    for now in (0.0, 10.0):
        assert throttle.wait_s(1, now) == 0
        throttle.take(1, now)

    assert throttle.wait_s(1, 20) == SPAN_S - 20
    assert throttle.wait_s(1, SPAN_S) == 0
    throttle.take(1, SPAN_S)
    assert throttle.wait_s(1, SPAN_S) == 10


def test_window_waits_until_the_amount_fits() -> None:
    """A large amount waits until enough earlier calls are a minute old."""
    throttle = SlidingWindow(100)
    for now in (0, 1, 2):
        throttle.take(30, now)

    assert throttle.wait_s(10, 3) == 0
    assert throttle.wait_s(50, 3) == SPAN_S + 1 - 3


def test_window_amount_above_the_limit_is_admitted_alone() -> None:
    """It would otherwise never be admitted."""
    throttle = SlidingWindow(100)
    assert throttle.wait_s(1000, 0) == 0
    throttle.take(1000, 0)

    assert throttle.wait_s(1, 0) == SPAN_S


def test_window_settled_counts_the_actual_amount() -> None:
    """A smaller amount makes room at once; a larger one delays later calls."""
    throttle = SlidingWindow(100)
    taken = throttle.take(80, 0)
    assert throttle.wait_s(50, 0) > 0
    throttle.settle(taken, 20)
    assert throttle.wait_s(50, 0) == 0
    throttle.settle(taken, 300)

    assert throttle.wait_s(1, 0) == SPAN_S


def test_window_settled_after_its_minute_changes_nothing() -> None:
    """A stream may last longer than a minute."""
    throttle = SlidingWindow(100)
    taken = throttle.take(80, 0)
    assert throttle.wait_s(100, SPAN_S) == 0
    throttle.settle(taken, 1000)

    assert throttle.wait_s(100, SPAN_S) == 0


@given(
    limit=st.integers(1, 20),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), min_size=1, max_size=60),
)
def test_window_never_admits_more_than_its_limit_in_any_minute(
    limit: int, steps: list[tuple[float, int]]
) -> None:
    """Checked for every window that ends with a call."""
    throttle, now = SlidingWindow(limit), 0.0
    went: list[tuple[float, int]] = []
    for gap, wanted in steps:
        amount = min(wanted, limit)
        now += gap
        now += throttle.wait_s(amount, now)
        assert throttle.wait_s(amount, now) <= 1e-6
        throttle.take(amount, now)
        went.append((now, amount))
        assert sum(a for at, a in went if at > now - 60) <= limit


def test_window_settled_after_its_minute_leaves_later_reservations_alone() -> None:
    """The past amount was subtracted already: a second time would admit more than the limit."""
    throttle = SlidingWindow(100)
    past = throttle.take(100, 0)
    assert throttle.wait_s(100, SPAN_S) == 0
    throttle.take(100, SPAN_S)
    throttle.settle(past, 0)

    assert throttle.wait_s(1, SPAN_S) == SPAN_S


def test_window_is_empty_after_a_minute_whatever_the_rounding_of_its_sum() -> None:
    """0.1 + 0.2 + 0.3 - 0.1 - 0.2 - 0.3 is greater than 0 in floating point: the whole limit would never fit again."""
    throttle = SlidingWindow(1)
    for amount in (0.1, 0.2, 0.3):
        throttle.take(amount, 0)

    assert throttle.wait_s(1, SPAN_S) == 0
