"""Cursors: what is one, what is not, and which event one names."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamworker.gateway.cursors import MAX_OFFSET, MAX_PARTITION, Cursor, attempt8
from streamworker.gateway.feeds import InvalidCursor
from streamworker.handover import EventHead

OFFSETS = st.integers(0, MAX_OFFSET)
PARTITIONS = st.integers(0, MAX_PARTITION)
PLACES = st.tuples(PARTITIONS, OFFSETS).map(lambda place: Cursor(*place))
EVENTS = st.tuples(PARTITIONS, OFFSETS, OFFSETS, st.text().map(attempt8), st.booleans())
CURSORS = PLACES | EVENTS.map(lambda event: Cursor(*event))


@given(CURSORS)
@example(Cursor(MAX_PARTITION, MAX_OFFSET))
@example(Cursor(MAX_PARTITION, MAX_OFFSET, MAX_OFFSET, "9f2c01ab", is_end=True))
def test_cursor_that_is_written_is_read_back(cursor: Cursor) -> None:
    """Places, events and endings."""
    assert Cursor.parse(str(cursor)) == cursor
    assert cursor.is_place == str(cursor).endswith(".w")


@given(st.text(st.sampled_from("0123456789.wendabcf-+ \n"), max_size=40))
def test_cursor_has_one_spelling(text: str) -> None:
    """A text is refused, or is exactly what the cursor is written as."""
    try:
        cursor = Cursor.parse(text)
    except InvalidCursor:
        return
    assert str(cursor) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "w",
        "start",
        "7",
        "7.1",
        "7.1.",
        "7.1.W",
        "7.1.w.end",
        "7..w",
        "07.1.w",
        "7.01.w",
        "-7.1.w",
        "+7.1.w",
        " 7.1.w",
        "7.1.w\n",
        "7.1.w\0",
        "٧.1.w",
        "2147483648.1.w",
        "7.9223372036854775808.w",
        "7.99999999999999999999.w",
        "7.1.2",
        "7.1.2.9f2c01a",
        "7.1.2.9f2c01abc",
        "7.1.2.9F2C01AB",
        "7.1.2.9f2c01ab.",
        "7.1.2.9f2c01ab.END",
        "7.1.2.9f2c01ab.end.end",
        "7.1.-1.9f2c01ab",
        "7.1.9223372036854775808.9f2c01ab",
        "7.1.2.9f2c01ab,8.1.w",
        "x" * 100_000,
    ],
)
def test_cursor_that_is_malformed_is_refused_with_advice(text: str) -> None:
    """The message shows the beginning of the text, and does not grow with it."""
    with pytest.raises(InvalidCursor, match="is not a valid cursor: pass") as caught:
        Cursor.parse(text)
    assert len(str(caught.value)) < 500


def test_cursor_names_the_event_with_its_offset_attempt_number_and_kind() -> None:
    """Any difference means that the log holds something else there."""
    head = EventHead(attempt="a", seq=3, type="delta")
    ending = EventHead(attempt="a", seq=4, type="usage")
    cursor = Cursor(0, 10, 3, attempt8("a"))

    assert cursor.names(10, head)
    assert Cursor(0, 11, 4, attempt8("a"), is_end=True).names(11, ending)
    assert not cursor.names(11, head)
    assert not Cursor(0, 10, 2, attempt8("a")).names(10, head)
    assert not Cursor(0, 10, 3, attempt8("b")).names(10, head)
    assert not Cursor(0, 11, 4, attempt8("a")).names(11, ending)
    assert not Cursor(0, 10, 3, attempt8("a"), is_end=True).names(10, head)


def test_attempt8_of_any_text_is_eight_hexadecimal_digits() -> None:
    """Also of a text that UTF-8 cannot encode."""
    assert attempt8("") == "00000000"
    assert attempt8("a") == "e8b7be43"
    assert len(attempt8("\ud800")) == 8
