"""The plan of a search: from when on, how far back, and at what cost."""

from __future__ import annotations

import pytest

from streamworker.gateway.search import SearchLimits, SearchPlan

NOW = 1_800_000_000_000
LIMITS = SearchLimits(lookback_s=3600, max_records=1000, max_s=10)


@pytest.mark.parametrize(
    ("times", "bound"),
    [
        ({"id_ms": NOW - 5000}, NOW - 65_000),
        ({"id_ms": NOW - 5000, "has_append_time": True}, NOW - 10_000),
        ({"since_ms": NOW - 5000}, NOW - 65_000),
        ({"since_ms": NOW - 9000, "id_ms": NOW - 5000}, NOW - 69_000),
        ({"id_ms": NOW + 3_600_000}, NOW - 60_000),
        ({}, NOW - 3_600_000),
        ({"id_ms": 0}, 0),
    ],
)
def test_search_begins_before_the_job_can_have_started(times: dict[str, int], bound: int) -> None:
    """By the client's time, else by that in the id, else by the lookback; a time in the future counts as now."""
    assert SearchPlan(LIMITS, now_ms=NOW, **times).bound_ms == bound  # type: ignore[arg-type]


def test_search_steps_back_four_times_as_far_each_time() -> None:
    """Until the beginning of time."""
    plan = SearchPlan(LIMITS, now_ms=NOW, id_ms=NOW)
    bounds = []
    for _ in range(4):
        bounds.append((NOW - plan.bound_ms) // 1000)
        plan.step_back()
    for _ in range(20):
        plan.step_back()

    assert bounds == [60, 240, 960, 3840]
    assert plan.bound_ms == 0


def test_search_budget_is_spent_by_all_scans_together() -> None:
    """It does not become negative."""
    plan = SearchPlan(LIMITS, now_ms=NOW)
    plan.scanned(400, 4)
    assert (plan.left_records, plan.left_s) == (600, 6)
    plan.scanned(700, 7)
    assert (plan.left_records, plan.left_s) == (0, 0)
    assert (plan.cost_records, plan.cost_s) == (1100, 11)


def test_search_of_a_fresh_id_may_find_nothing() -> None:
    """A job that was submitted within the lookback may have no event yet; an older one had some."""
    assert SearchPlan(LIMITS, now_ms=NOW, id_ms=NOW - 3_600_000).is_fresh
    assert not SearchPlan(LIMITS, now_ms=NOW, id_ms=NOW - 3_600_001).is_fresh
    assert SearchPlan(LIMITS, now_ms=NOW).is_fresh


def test_search_advice_depends_on_what_the_client_could_have_given() -> None:
    """`since` helps only where no time is known."""
    assert "pass `since`" in SearchPlan(LIMITS, now_ms=NOW).advice
    assert "older than the log" in SearchPlan(LIMITS, now_ms=NOW, id_ms=NOW).advice


DAY_MS = 24 * 3_600_000


@pytest.mark.parametrize(
    ("times", "is_whole", "may_wait"),
    [
        ({"id_ms": NOW}, False, True),
        ({"id_ms": NOW - 2 * 3_600_000}, False, False),
        ({"id_ms": NOW - 2 * 3_600_000}, True, True),
        ({"id_ms": NOW - 7 * DAY_MS}, True, True),
        ({"id_ms": NOW - 7 * DAY_MS - 1}, True, False),
        ({"id_ms": 0}, True, False),
        ({"since_ms": 0}, True, True),
        ({"since_ms": NOW, "id_ms": NOW - 30 * DAY_MS}, True, True),
        ({}, False, True),
    ],
)
def test_job_without_an_event_may_wait_for_as_long_as_kafka_keeps_it(
    times: dict[str, int], is_whole: bool, may_wait: bool
) -> None:
    """A job that is older than the log, or than any record that could hold it, is not in the queue."""
    plan = SearchPlan(LIMITS, now_ms=NOW, **times)  # type: ignore[arg-type]
    assert plan.may_wait(is_whole=is_whole) is may_wait
