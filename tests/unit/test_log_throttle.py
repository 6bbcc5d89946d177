"""Failures that repeat: the first is said, the others are counted."""

from __future__ import annotations

from streamworker.log_throttle import QUIET_S, LogThrottle


def test_repeats_says_the_first_and_then_one_per_quiet_time_with_what_was_kept_back() -> None:
    """Ten failures a second for half a minute: four lines, and none is forgotten."""
    suppressed = LogThrottle()
    said = [(at / 10, kept) for at in range(305) if (kept := suppressed.failed(at / 10)) is not None]

    assert said == [(0, 0), (QUIET_S, 99), (2 * QUIET_S, 99), (3 * QUIET_S, 99)]
    assert suppressed.failures == 305


def test_repeats_that_are_rare_are_all_said() -> None:
    """Nothing is kept back where nothing repeats itself quickly."""
    suppressed = LogThrottle()

    assert [suppressed.failed(at * QUIET_S) for at in range(3)] == [0, 0, 0]
