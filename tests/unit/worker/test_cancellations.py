"""Cancellations that may come before their job."""

from __future__ import annotations

from streamworker.worker.cancellations import Cancellations


def test_cancel_hits_the_job_that_was_submitted_before_it() -> None:
    """Also in the same millisecond: who cancels has seen the id."""
    cancels = Cancellations()
    cancels.note("j", 100, "enough")

    assert [cancels.reason_for("j", submitted) for submitted in (99, 100)] == ["enough", "enough"]


def test_cancel_spares_a_job_that_came_after_it_under_the_same_id() -> None:
    """Ids may be used again."""
    cancels = Cancellations()
    cancels.note("j", 100, "enough")

    assert cancels.reason_for("j", 101) is None
    assert cancels.reason_for("other", 99) is None


def test_later_cancel_counts_whatever_order_they_come_in() -> None:
    """Control records of one job are read once each, but a reader may start anew."""
    cancels = Cancellations()
    cancels.note("j", 200, "second")
    cancels.note("j", 100, "first")

    assert cancels.reason_for("j", 150) == "second"


def test_cancels_are_forgotten_oldest_first() -> None:
    """Memory is bounded; noting one again makes it new."""
    cancels = Cancellations(remembered=2)
    for job_id, timestamp in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
        cancels.note(job_id, timestamp, "x")

    assert [cancels.reason_for(job_id, 0) for job_id in "abc"] == ["x", None, "x"]
