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
