"""So many streams at once."""

from __future__ import annotations

from math import inf

import pytest

from streamworker.limits.adaptive_limit import RECOVERY_S, AdaptiveLimit


def test_concurrency_is_its_ceiling_until_the_upstream_refuses() -> None:
    """What fits, fits; above the ceiling only the end of a stream helps."""
    concurrency = AdaptiveLimit(10)

    assert concurrency.limit(0) == 10
    assert concurrency.wait_s(9, 0) == 0
    assert concurrency.wait_s(10, 0) == inf


def test_concurrency_refused_falls_below_what_was_open_and_recovers_in_time() -> None:
    """Multiplicative decrease, additive increase."""
    concurrency = AdaptiveLimit(300)
    concurrency.refused(1, 100, 1)
    assert concurrency.limit(1) == 70
    assert concurrency.limit(2) == 100
    assert concurrency.wait_s(101, 2) == pytest.approx(2 / 30)

    assert concurrency.limit(1 + RECOVERY_S) == 300


def test_concurrency_refusals_of_one_moment_count_once() -> None:
    """Calls that were on their way when we cut say nothing new."""
    concurrency = AdaptiveLimit(300)
    for _ in range(50):
        concurrency.refused(0.5, 100, 1)
    assert concurrency.limit(1) == 70
    concurrency.refused(1.2, 70, 1.5)
    assert concurrency.limit(1.5) == 85
    concurrency.refused(1.6, 80, 2)

    assert concurrency.limit(2) == 56


def test_concurrency_never_falls_below_one() -> None:
    """Somebody has to find out whether the upstream takes calls again."""
    concurrency = AdaptiveLimit(4)
    for now in range(1, 100):
        concurrency.refused(now, 1, now)
        assert concurrency.limit(now) >= 1
