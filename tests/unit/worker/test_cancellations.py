"""Cancel records that arrive before their jobs."""

from __future__ import annotations

from streamworker.worker.cancellations import Cancellations


def test_cancel_reaches_a_job_that_was_submitted_before_it() -> None:
    """A cancel record in the same millisecond counts too."""
    cancels = Cancellations()
    cancels.note("j", 100, "enough")

    assert [cancels.reason_for("j", submitted) for submitted in (99, 100)] == ["enough", "enough"]


def test_cancel_spares_a_later_job_with_the_same_id() -> None:
    """Ids may be used again."""
    cancels = Cancellations()
    cancels.note("j", 100, "enough")

    assert cancels.reason_for("j", 101) is None
    assert cancels.reason_for("other", 99) is None


def test_cancel_with_the_latest_timestamp_counts_in_any_order() -> None:
    """Cancel records of one job may be read in any order."""
    cancels = Cancellations()
    cancels.note("j", 200, "second")
    cancels.note("j", 100, "first")

    assert cancels.reason_for("j", 150) == "second"


def test_cancels_beyond_the_bound_drop_the_oldest() -> None:
    """Memory is bounded; a repeated cancel record counts as new."""
    cancels = Cancellations(remembered=2)
    for job_id, timestamp in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        cancels.note(job_id, timestamp, "x")

    assert [cancels.reason_for(job_id, 0) for job_id in "abc"] == ["x", None, "x"]
