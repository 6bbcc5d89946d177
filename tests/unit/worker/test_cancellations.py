"""Cancel records that arrive before their jobs."""

from __future__ import annotations

import pytest

from streamworker.worker.cancellations import Cancellations, submitted_ms
from tests.streams import make_job

UUID7 = "018bcfe5-687b-7000-8000-000000000000"
AT = 0x018BCFE5687B


def reason(cancels: Cancellations, submitted: int, job_id: str = "j") -> str | None:
    return cancels.reason_for(make_job(job_id=job_id, timestamp=submitted))


def test_cancel_reaches_a_job_that_was_submitted_before_it() -> None:
    """A cancel record in the same millisecond counts too."""
    cancels = Cancellations()
    cancels.note("j", 100, "enough")

    assert [reason(cancels, submitted) for submitted in (99, 100)] == ["enough", "enough"]


def test_cancel_from_a_clock_that_is_behind_reaches_its_job() -> None:
    """The job's record may have a later timestamp than the record that cancels it."""
    cancels = Cancellations()
    cancels.note("j", 100_000, "enough")
    assert reason(cancels, 105_000) == "enough"
    cancels.note("k", 100_000, "enough")

    assert reason(cancels, 105_001, "k") is None


def test_cancel_spares_a_later_job_with_the_id_of_a_cancelled_one() -> None:
    """Ids may be used again, also within the tolerance."""
    cancels = Cancellations()
    assert reason(cancels, 50) is None
    cancels.note("j", 100, "enough")
    assert reason(cancels, 50) == "enough"

    assert reason(cancels, 101) is None
    assert reason(cancels, 99, "other") is None


@pytest.mark.parametrize(
    ("job_id", "submitted"),
    [
        (UUID7, AT),
        (f"tenant.{UUID7.upper()}", AT),
        ("018bcfe5-687b-4000-8000-000000000000", 7),
        (f"{UUID7}x", 7),
        (f"a{UUID7}", 7),
    ],
)
def test_submission_time_is_that_of_a_uuidv7(job_id: str, submitted: int) -> None:
    """The time of another id is that of its record."""
    assert submitted_ms(make_job(job_id=job_id, timestamp=7)) == submitted


def test_cancel_with_the_latest_timestamp_counts_in_any_order() -> None:
    """Cancel records of one job may be read in any order."""
    cancels = Cancellations()
    cancels.note("j", 200, "second")
    cancels.note("j", 100, "first")

    assert reason(cancels, 150) == "second"


def test_cancels_beyond_the_bound_drop_the_oldest() -> None:
    """Memory is bounded; a repeated cancel record counts as new."""
    cancels = Cancellations(remembered=2)
    for job_id, timestamp in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        cancels.note(job_id, timestamp, "x")

    assert [reason(cancels, 0, job_id) for job_id in "abc"] == ["x", None, "x"]
