"""Marks on a level."""

from __future__ import annotations

import pytest

from streamworker.limits.watermarks import Watermarks


def test_marks_between_the_two_stay_as_they_are() -> None:
    """The tap closes at the high mark, opens at the low one, and does not flutter in between."""
    watermarks = Watermarks(10, 4)
    seen = []
    for step in (9, 1, 5, -5, -5, -1, 5, -9):
        (watermarks.add if step > 0 else watermarks.remove)(abs(step))
        seen.append((watermarks.level, watermarks.is_above_high))

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
    watermarks = Watermarks(4, 2)
    assert watermarks.room == 4
    watermarks.add(3)
    assert watermarks.room == 1
    watermarks.add(1)
    watermarks.remove(1)
    assert watermarks.room == 0
    watermarks.remove(1)
    assert watermarks.room == 2


@pytest.mark.parametrize(("high", "low"), [(10, 5), (9, 4), (1, 0)])
def test_marks_without_low_take_half_of_high(high: int, low: int) -> None:
    """The low mark follows from the high one."""
    assert Watermarks(high).low == low


@pytest.mark.parametrize(("high", "low"), [(0, None), (-1, None), (5, 5), (5, 6), (5, -1)])
def test_marks_that_make_no_sense_are_refused(high: int, low: int | None) -> None:
    """A low mark at the high one would flutter, a high mark of zero would never open."""
    with pytest.raises(ValueError, match="0 <= low < high"):
        Watermarks(high, low)


def test_marks_taking_out_more_than_was_put_in_is_a_bug() -> None:
    """The level is an account, and never in the red."""
    watermarks = Watermarks(5)
    watermarks.add(1)
    with pytest.raises(AssertionError):
        watermarks.remove(2)
