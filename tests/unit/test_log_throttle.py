"""LogThrottle and OutageLog: which failures are logged, and with which fields."""

from __future__ import annotations

from structlog.testing import capture_logs

from streamworker.log_throttle import QUIET_S, LogThrottle, OutageLog


def test_throttle_with_frequent_failures_logs_one_per_interval_with_the_number_suppressed() -> None:
    """Ten failures a second for half a minute give four lines, and every failure is counted."""
    throttle = LogThrottle()
    logged = [(at / 10, fields) for at in range(305) if (fields := throttle.failed(at / 10)) is not None]

    assert logged == [(0, {}), *((n * QUIET_S, {"suppressed": 99}) for n in (1, 2, 3))]
    assert throttle.failures == 305


def test_throttle_with_rare_failures_logs_all() -> None:
    """Failures that are an interval apart are all logged, without a number."""
    throttle = LogThrottle()

    assert [throttle.failed(at * QUIET_S) for at in range(3)] == [{}, {}, {}]


def test_outage_log_with_an_interval_of_its_own_logs_less_often() -> None:
    """`interval_s` replaces the default for every kind of failure."""
    outage_log = OutageLog("x.recovered", interval_s=100)
    with capture_logs() as logs:
        for second in range(101):
            outage_log.failed("x.failed", second)

    assert [line.get("suppressed") for line in logs] == [None, 99]
    assert outage_log.failures == 101
