"""Marks on a level."""

from __future__ import annotations

import pytest

from streamworker.core.admission import Marks


def test_marks_between_the_two_stay_as_they_are() -> None:
    """The tap closes at the high mark, opens at the low one, and does not flutter in between."""
    marks = Marks(10, 4)
    seen = []
    for step in (9, 1, 5, -5, -5, -1, 5, -9):
        (marks.add if step > 0 else marks.remove)(abs(step))
        seen.append((marks.level, marks.is_closed))

    assert seen == [
        (9, False),
        (10, True),
        (15, True),
        (10, True),
        (5, True),
        (4, False),
        (9, False),
        (0, False),
    ]


def test_marks_room_is_what_fits_below_high_and_nothing_while_closed() -> None:
    """Room shrinks to the high mark and comes back at the low one."""
    marks = Marks(4, 2)
    assert marks.room == 4
    marks.add(3)
    assert marks.room == 1
    marks.add(1)
    marks.remove(1)
    assert marks.room == 0
    marks.remove(1)
    assert marks.room == 2


@pytest.mark.parametrize(("high", "low"), [(10, 5), (9, 4), (1, 0)])
def test_marks_without_low_take_half_of_high(high: int, low: int) -> None:
    """The low mark follows from the high one."""
    assert Marks(high).low == low


@pytest.mark.parametrize(("high", "low"), [(0, None), (-1, None), (5, 5), (5, 6), (5, -1)])
def test_marks_that_make_no_sense_are_refused(high: int, low: int | None) -> None:
    """A low mark at the high one would flutter, a high mark of zero would never open."""
    with pytest.raises(ValueError, match="0 <= low < high"):
        Marks(high, low)


def test_marks_taking_out_more_than_was_put_in_is_a_bug() -> None:
    """The level is an account, and never in the red."""
    marks = Marks(5)
    marks.add(1)
    with pytest.raises(AssertionError):
        marks.remove(2)
