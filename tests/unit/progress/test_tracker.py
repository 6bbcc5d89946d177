"""Which offset may be committed, and which jobs are not run again."""

from __future__ import annotations

import pytest

from streamworker.progress.tracker import OffsetTracker


def test_position_of_new_tracker_is_the_committed_offset() -> None:
    """Without records the position does not move."""
    tracker = OffsetTracker(5)

    assert (tracker.position, tracker.finished_beyond, tracker.incomplete) == (5, frozenset(), 0)


def test_position_waits_for_the_lowest_incomplete_offset() -> None:
    """Later offsets may finish first; the position moves when the lowest does, past all of them."""
    tracker = OffsetTracker(0)
    assert [tracker.begin(offset) for offset in range(4)] == [True] * 4
    tracker.finish(2)
    tracker.finish(1)
    assert (tracker.position, tracker.finished_beyond) == (0, frozenset({1, 2}))
    tracker.finish(0)
    assert (tracker.position, tracker.finished_beyond, tracker.incomplete) == (3, frozenset(), 1)


def test_position_with_none_incomplete_is_behind_the_highest_succeeded() -> None:
    """Gaps from compaction and markers need no code."""
    tracker = OffsetTracker(10)
    for offset in (12, 15):
        tracker.begin(offset)
    assert tracker.position == 10
    tracker.finish(12)
    assert tracker.position == 15
    tracker.finish(15)
    assert tracker.position == 16


def test_begin_of_open_or_finished_offset_returns_false() -> None:
    """A record that is delivered twice is accepted once."""
    tracker = OffsetTracker(0)
    assert tracker.begin(0)
    assert not tracker.begin(0)
    tracker.finish(0)
    assert not tracker.begin(0)
    assert tracker.incomplete == 0


def test_begin_offset_finished_in_an_earlier_run_moves_on_without_running_it() -> None:
    """An offset that the metadata lists as finished is not run again, and counts only when its record is
    seen."""
    tracker = OffsetTracker(3, finished={1, 3, 5})
    assert tracker.is_finished(5)
    assert not tracker.is_finished(4)
    assert tracker.finished_beyond == {3, 5}
    assert not tracker.begin(3)
    assert (tracker.position, tracker.finished_beyond) == (4, frozenset({5}))
    assert tracker.begin(4)
    assert not tracker.begin(5)
    assert tracker.position == 4
    tracker.finish(4)
    assert (tracker.position, tracker.finished_beyond) == (6, frozenset())


def test_position_is_not_moved_by_finished_offsets_not_seen_yet() -> None:
    """An offset known as finished says nothing about earlier records that are not delivered yet."""
    tracker = OffsetTracker(0, finished={1, 7})
    tracker.begin(0)
    tracker.finish(0)

    assert (tracker.position, tracker.finished_beyond) == (1, frozenset({1, 7}))


def test_finish_offset_that_is_not_open_is_a_bug() -> None:
    """Only open offsets can be finished, and only once."""
    tracker = OffsetTracker(0)
    tracker.begin(0)
    tracker.finish(0)
    for offset in (0, 1):
        with pytest.raises(KeyError):
            tracker.finish(offset)
    assert tracker.position == 1


def test_returned_offset_stays_incomplete_and_is_accepted_once_more() -> None:
    """The position may not pass a job that did not begin, and a rewind must not skip it."""
    tracker = OffsetTracker(0)
    for offset in range(4):
        tracker.begin(offset)
    tracker.finish(0)
    tracker.give_back([3, 1])
    tracker.finish(2)
    assert (tracker.position, tracker.incomplete) == (1, 0)
    assert [tracker.begin(offset) for offset in (1, 2, 3)] == [True, False, True]
    assert [tracker.begin(offset) for offset in (1, 3)] == [False, False]
    assert tracker.incomplete == 2
    tracker.finish(3)
    tracker.finish(1)

    assert tracker.position == 4


def test_returned_offset_is_not_passed_while_an_earlier_one_is_accepted_again() -> None:
    """Its record is read later; later offsets had ended before."""
    tracker = OffsetTracker(0)
    for offset in range(5):
        tracker.begin(offset)
    for offset in (0, 2, 4):
        tracker.finish(offset)
    tracker.give_back([1, 3])
    assert tracker.begin(1)
    tracker.finish(1)

    assert (tracker.position, tracker.finished_beyond) == (3, frozenset({4}))


def test_returned_offset_whose_record_was_deleted_is_passed() -> None:
    """Records are read again in order, so a later one shows that the log has deleted it."""
    tracker = OffsetTracker(0)
    for offset in range(3):
        tracker.begin(offset)
    tracker.give_back([0, 1])
    assert tracker.begin(1)
    tracker.finish(1)
    tracker.finish(2)

    assert tracker.position == 3


def test_position_advances_over_offsets_without_records_only_while_nothing_is_open() -> None:
    """Transaction markers and aborted records lie there; an open record lies before them."""
    tracker = OffsetTracker(5, finished=[9])
    tracker.advance(8)
    assert tracker.position == 8
    tracker.advance(3)
    assert tracker.position == 8

    tracker.begin(8)
    tracker.advance(20)
    assert tracker.position == 8

    tracker.finish(8)
    assert tracker.position == 9
    tracker.advance(20)
    assert tracker.position == 20
    assert tracker.finished_beyond == frozenset()
    assert tracker.begin(19) is False


def test_after_returns_the_position_that_finishing_will_give() -> None:
    """Nothing changes before `finish`: the broker may refuse the commit."""
    tracker = OffsetTracker(0)
    for offset in (0, 1, 2, 5):
        tracker.begin(offset)
    tracker.finish(1)

    assert tracker.after([]) == (0, frozenset({1}))
    assert tracker.after([2]) == (0, frozenset({1, 2}))
    assert tracker.after([0]) == (2, frozenset())
    assert tracker.after([0, 5]) == (2, frozenset({5}))
    assert tracker.after([0, 2, 5]) == (6, frozenset())
    assert (tracker.position, tracker.finished_beyond, tracker.incomplete) == (0, frozenset({1}), 3)


def test_after_passes_offsets_without_records_below_the_lowest_open_one() -> None:
    """The first finished record shows that no record lies before the lowest open one."""
    tracker = OffsetTracker(0)
    tracker.begin(1)
    tracker.begin(2)

    assert tracker.after([2]) == (1, frozenset({2}))
    tracker.finish(2)
    assert (tracker.position, tracker.finished_beyond) == (1, frozenset({2}))


def test_after_without_open_offsets_is_the_present_position() -> None:
    """A commit without ends changes no position."""
    assert OffsetTracker(3, finished={5}).after([]) == (3, frozenset({5}))
