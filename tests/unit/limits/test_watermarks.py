"""High and low watermarks."""

from __future__ import annotations

import pytest

from streamworker.limits.watermarks import Watermarks


def test_watermarks_keep_their_state_between_the_marks() -> None:
    """The state changes at the high and at the low mark and does not oscillate between them."""
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


def test_watermarks_room_is_what_fits_below_high() -> None:
    """There is no room above high, until the level falls to the low mark."""
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
def test_watermarks_default_low_is_half_of_high(high: int, low: int) -> None:
    """The low mark follows from the high one."""
    assert Watermarks(high).low == low


@pytest.mark.parametrize(("high", "low"), [(0, None), (-1, None), (5, 5), (5, 6), (5, -1)])
def test_watermarks_with_invalid_marks_raise(high: int, low: int | None) -> None:
    """A low mark at the high one would oscillate; a high mark of zero would never be left."""
    with pytest.raises(ValueError, match="0 <= low < high"):
        Watermarks(high, low)


def test_watermarks_removing_more_than_was_added_is_a_bug() -> None:
    """The level is never negative."""
    watermarks = Watermarks(5)
    watermarks.add(1)
    with pytest.raises(AssertionError):
        watermarks.remove(2)
