"""Which job ids of a partition's last records are known."""

from __future__ import annotations

from streamworker.progress.dedup import RecentIds


def test_id_is_known_for_as_many_offsets_as_records_and_not_longer() -> None:
    """The record three offsets later is a duplicate, the one after it is not."""
    ids = RecentIds(3)
    ids.remember("a", 10)
    ids.remember("b", 12)
    assert ids.earlier("a", 13) == 10
    assert ids.earlier("a", 14) is None


def test_id_that_comes_again_is_known_from_its_last_offset_on() -> None:
    """A producer that sends a job again and again starts it once."""
    ids = RecentIds(3)
    for offset in (0, 2, 4):
        ids.remember("a", offset)
    assert ids.earlier("a", 6) == 4


def test_record_delivered_again_is_not_a_duplicate_of_itself_or_of_a_later_record() -> None:
    """A job that was given back is run, although its duplicate was skipped meanwhile."""
    ids = RecentIds(10)
    ids.remember("a", 5)
    ids.remember("a", 7)
    assert ids.earlier("a", 5) is None
    ids.remember("a", 5)
    assert ids.earlier("a", 7) is None
    assert ids.earlier("a", 8) == 7


def test_ids_with_a_window_of_zero_records_are_not_stored() -> None:
    """The setting 0 turns the memory off."""
    ids = RecentIds(0)
    ids.remember("a", 0)
    assert ids.earlier("a", 1) is None
    assert len(ids) == 0


def test_ids_are_bounded_by_the_number_of_records() -> None:
    """Memory does not grow with the log."""
    ids = RecentIds(100)
    for offset in range(1000):
        ids.remember("x" * 150 + str(offset), offset)
    assert len(ids) == 100
    for offset in range(900, 1000):  # read again
        ids.remember(f"other {offset}", offset)
    assert len(ids) <= 100


def test_id_of_a_record_before_the_window_is_not_stored() -> None:
    """An old record that is delivered once more must not push out an id that still counts."""
    ids = RecentIds(3)
    for offset, job_id in ((10, "a"), (11, "b"), (12, "c"), (5, "old"), (9, "older than the window")):
        ids.remember(job_id, offset)
    assert len(ids) == 3
    assert [ids.earlier(job_id, 13) for job_id in ("a", "b", "c", "old")] == [10, 11, 12, None]


def test_id_outside_of_the_window_is_forgotten_in_a_log_with_gaps() -> None:
    """Transaction markers and compaction leave gaps, so the window may hold fewer records than offsets."""
    ids = RecentIds(3)
    ids.remember("a", 10)
    ids.remember("b", 12)
    assert len(ids) == 2
    ids.remember("c", 13)
    assert len(ids) == 2
    ids.remember("d", 100)
    assert len(ids) == 1


def test_ids_are_forgotten_in_the_order_of_their_last_offsets() -> None:
    """An id that came again lives on, and a record that is delivered again is not younger for that."""
    again, redelivered = RecentIds(2), RecentIds(2)
    for offset, job_id in ((0, "a"), (1, "b"), (2, "a"), (3, "c")):
        again.remember(job_id, offset)
    for offset, job_id in ((10, "a"), (11, "b"), (10, "a"), (12, "c")):
        redelivered.remember(job_id, offset)
    assert again.earlier("a", 4) == 2
    assert redelivered.earlier("b", 13) == 11
