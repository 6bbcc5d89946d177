"""The calls per period that an upstream accepts, learned from refusals that ask for a long wait."""

from __future__ import annotations

import pytest

from streamworker.limits.call_budget import (
    FORGOTTEN_PERIODS,
    LEAST_ADVISED_S,
    MARGIN,
    MAX_CALLS,
    MAX_PERIOD_S,
    SPAN_S,
    CallBudget,
)
from tests.unit.limits.servers import PerMinute, run


def spend(budget: CallBudget, count: int, now: float = 0.0) -> None:
    for _ in range(count):
        assert budget.wait_s(now) == 0
        budget.enter(now)


def learned(limit: int = 3, period_s: float = 60) -> CallBudget:
    """Return a budget that was learned at time 0, and whose period ends at `period_s`."""
    budget = CallBudget()
    spend(budget, limit + 1)
    budget.refused(0, 0, period_s)
    return budget


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("stream_s", [0.05, 0.4, 5])
def test_limit_per_minute_that_names_its_waits_is_exceeded_by_the_first_burst_alone(
    stream_s: float, delay_s: float
) -> None:
    """Every later period makes as many calls as the upstream accepts, or tries one more."""
    outcome = run(PerMinute(is_exact=True), jobs=600, round_trip_s=0.005, stream_s=stream_s, delay_s=delay_s)

    assert outcome.calls <= 600 + 31 + 10
    assert outcome.seconds <= 600 + 60


def test_budget_is_unlimited_until_a_refusal() -> None:
    """Nothing is known about an upstream that accepts every call."""
    budget = CallBudget()
    spend(budget, 1000)

    assert not budget.is_known(0)


@pytest.mark.parametrize("advised_s", [None, 0.0, LEAST_ADVISED_S - 0.01])
def test_budget_learns_nothing_from_a_short_wait(advised_s: float | None) -> None:
    """A server with too many open streams asks for a second or so."""
    budget = CallBudget()
    spend(budget, 10)
    budget.refused(0, 0, advised_s)

    assert not budget.is_known(0)
    assert budget.wait_s(0) == 0


def test_budget_is_the_calls_that_were_accepted_before_the_refusal() -> None:
    """The upstream accepts the next ones when the first of them is a period old."""
    budget = learned(3, 60)

    assert budget.is_known(0)
    assert budget.wait_s(1) == pytest.approx(60 * MARGIN - 1)
    spend(budget, 3, 60 * MARGIN)
    assert budget.wait_s(60 * MARGIN) == pytest.approx(60 * MARGIN)


def test_budget_later_refusals_of_the_same_burst_correct_it() -> None:
    """A call counts as accepted until it is refused, and the refusals of a burst arrive one after another."""
    budget = CallBudget()
    for tenth in range(10):
        budget.enter(tenth / 10)
    for tenth in (9, 8, 7):
        budget.refused(tenth / 10, 1, 59)

    spend(budget, 7, 62)
    assert budget.wait_s(62) > 50


def test_budget_period_of_a_steady_load_begins_with_its_oldest_call() -> None:
    """Calls become free one by one, at the distances at which they were made."""
    budget = CallBudget()
    for second in range(0, 50, 10):
        spend(budget, 1, second)
    budget.enter(45)
    budget.refused(45, 45, 15)  # the call of second 0 is free at second 60

    assert budget.wait_s(59) == pytest.approx(MARGIN * 60 - 59)
    spend(budget, 1, MARGIN * 60)
    assert budget.wait_s(MARGIN * 60) == pytest.approx(10)


def test_budget_counts_only_the_calls_of_its_period() -> None:
    """Another client uses a part of the limit: only the calls that the upstream still counts were accepted."""
    budget = learned(5, 10)
    spend(budget, 3, 11)
    spend(budget, 2, 16)
    budget.enter(21)
    budget.refused(21, 21, 5)

    assert budget.wait_s(22) == pytest.approx(16 + MARGIN * 10 - 22)


def test_budget_without_an_accepted_call_is_unknown() -> None:
    """Another client uses the limit: nothing shows how many calls are accepted."""
    budget = CallBudget()
    budget.enter(0)
    budget.refused(0, 0, 60)

    assert not budget.is_known(0)


def test_budget_that_was_spent_grows_by_more_each_period() -> None:
    """A limit that was raised, or that was learned while others used it, is found within a few periods."""
    budget = learned(3, 10)
    now, made = 10 * MARGIN, []
    for _ in range(6):
        count = 0
        while budget.wait_s(now) == 0:
            budget.enter(now)
            count += 1
        made.append(count)
        now += 10 * MARGIN

    assert made == [3, 4, 6, 10, 18, 34]


def test_budget_that_is_not_used_up_does_not_grow() -> None:
    """A quiet period shows nothing."""
    budget = learned(3, 10)
    for period in range(1, 8):
        spend(budget, 2, 11 * period)
    spend(budget, 1, 77)

    assert budget.wait_s(77) > 0


def test_budget_is_forgotten_after_many_periods_without_a_refusal() -> None:
    """The limit of an upstream that was quiet for long may be another one."""
    budget = learned(3, 60)
    last = 60 + FORGOTTEN_PERIODS * 60

    assert budget.is_known(last)
    assert not budget.is_known(last + 1)
    assert budget.wait_s(last + 1) == 0


def test_budget_period_is_bounded() -> None:
    """A quota per day is not waited for with calls in hand: the pause asks again."""
    budget = learned(3, 86_400)

    assert budget.wait_s(0) <= MARGIN * MAX_PERIOD_S


def test_budget_remembers_a_bounded_number_of_calls_of_a_minute() -> None:
    """An upstream without a limit may take thousands of calls per second."""
    budget = CallBudget()
    for _ in range(MAX_CALLS + 10):
        budget.enter(0)
    assert len(budget._calls) == MAX_CALLS
    budget.enter(2 * SPAN_S)

    assert len(budget._calls) == 1


def test_budget_refusal_of_a_call_that_began_long_ago_changes_nothing_else() -> None:
    """Its entry is gone with its period."""
    budget = CallBudget()
    spend(budget, 4)
    spend(budget, 2, 100)
    budget.refused(0, 100, 60)

    assert budget.wait_s(100) == pytest.approx(MARGIN * 60)


def test_budget_period_of_a_later_refusal_is_bounded_too() -> None:
    """An upstream that asks for a day, once the limit is known, must not stop its calls for a day."""
    budget = learned()
    budget.refused(1, 1, 86_400)

    assert budget.wait_s(1) <= MARGIN * MAX_PERIOD_S


def test_budget_whose_calls_are_all_gone_still_allows_one() -> None:
    """A known limit, and another client that uses all of it: without a call in hand nothing would be learned again."""
    budget = learned(3, 60)
    budget.enter(200)
    budget.refused(200, 200, 60)

    assert budget.wait_s(200) == 0
    budget.enter(200)
    assert budget.wait_s(200) == pytest.approx(60 * MARGIN)


def test_budget_learns_a_longer_period_from_a_later_refusal() -> None:
    """The first wait was the rest of a period; the calls before it are counted for the longer one."""
    budget = learned(3, 10)
    budget.refused(1, 1, 60)

    assert budget.wait_s(1) == pytest.approx(60 * MARGIN - 1)
