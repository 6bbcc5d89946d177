"""The attempt: numbers without gaps, one end, and the same story under every cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamworker.codec.event import EventWriter, read_event
from streamworker.core.attempt import LIFE, Attempt, Happening, Impossible, State
from streamworker.model import ErrorCode, JobError, Partition, Status, UsageEvent
from tests.properties.strategies import CHAT_STREAMS, CUTS, STREAMS, pieces_of
from tests.streams import NOW, bytewise, chunk, data, listening, make_attempt, play

if TYPE_CHECKING:
    from streamworker.model import DeltaEvent

TOO_LARGE = JobError(ErrorCode.TOO_LARGE, "too large")


def without_bytes(end: UsageEvent) -> UsageEvent:
    """Leave out how much was received: of what follows the end it depends on how it came."""
    return msgspec.structs.replace(end, observed=msgspec.structs.replace(end.observed, bytes=0))


@given(CHAT_STREAMS | STREAMS, CUTS)
def test_attempt_any_bytes_give_numbered_events_and_one_end(stream: bytes, cuts: list[int]) -> None:
    """seq runs without a gap, the terminal one counts the events before it, and the status fits what was published."""
    deltas, end = play(pieces_of(stream, cuts))
    published = [event for event in deltas if event.choice is not None]

    assert [event.seq for event in deltas] == list(range(1, len(deltas) + 1))
    assert end.seq == len(deltas) + 1
    assert end.observed.deltas == len(published)
    assert end.status in {Status.COMPLETED, Status.INTERRUPTED if published else Status.FAILED}
    assert (end.error is None) is (end.status is Status.COMPLETED)
    assert (end.timing.first_delta is None) is (not published)


@given(CHAT_STREAMS | STREAMS, CUTS)
def test_attempt_any_bytes_give_events_that_can_be_written_and_read(stream: bytes, cuts: list[int]) -> None:
    """Whatever an upstream sends, what we publish is UTF-8 JSON with the common members."""
    deltas, end = play(pieces_of(stream, cuts))
    events: list[DeltaEvent | UsageEvent] = [*deltas, end]
    for event in events:
        value = EventWriter().write(event, Partition("events", 0), b"job-1").value
        assert value is not None
        assert read_event(value)["seq"] == event.seq


@given(CHAT_STREAMS | STREAMS, CUTS, st.sampled_from([40, 100, 1 << 20]))
def test_attempt_story_does_not_depend_on_the_cut(stream: bytes, cuts: list[int], limit: int) -> None:
    """Events, end and account are the same however the bytes came."""
    whole = play(stream, max_event_bytes=limit)
    for pieces in (pieces_of(stream, cuts), bytewise(stream)):
        played = play(pieces, max_event_bytes=limit)
        assert played.deltas == whole.deltas
        assert without_bytes(played.end) == without_bytes(whole.end)


@given(CHAT_STREAMS, CUTS, st.integers(0, 8))
def test_attempt_event_that_cannot_be_published_gives_its_number_back(
    stream: bytes, cuts: list[int], refused: int
) -> None:
    """The terminal event takes the number of the event that was refused, wherever that was."""
    whole = play(stream)
    assume(refused < len(whole.deltas))
    attempt = listening()
    published: list[DeltaEvent] = []
    for piece in pieces_of(stream, cuts):
        for event in attempt.receive(piece, NOW + 10):
            if len(published) == refused:
                attempt.fail(TOO_LARGE)
            else:
                published.append(event)
        if attempt.is_ended:
            break
    if not attempt.is_ended:
        for event in attempt.close(NOW):
            assert event.seq == refused + 1
            attempt.fail(TOO_LARGE)
    end = attempt.terminal(NOW)
    seen = [event for event in published if event.choice is not None]

    assert published == whole.deltas[:refused]
    assert (end.seq, end.error) == (refused + 1, TOO_LARGE)
    assert end.status is (Status.INTERRUPTED if seen else Status.FAILED)
    assert end.observed.deltas == len(seen)


def happen(attempt: Attempt, happening: Happening) -> None:
    match happening:
        case Happening.DELTA:
            list(attempt.receive(data(chunk({"content": "a"})), NOW))
        case Happening.DONE:
            list(attempt.receive(data(b"[DONE]"), NOW))
        case Happening.BREAK:
            attempt.fail(TOO_LARGE)
        case Happening.CANCEL:
            attempt.cancel("enough")
        case Happening.WIND_UP:
            attempt.wind_up("enough")
        case Happening.REFUSE:
            attempt.refuse(TOO_LARGE)
        case other:
            getattr(attempt, other.name.lower())()


@given(st.lists(st.sampled_from(Happening), max_size=25))
def test_attempt_any_course_of_happenings_follows_the_table(course: list[Happening]) -> None:
    """A row leads where it says, a missing row raises and changes nothing; numbers never have a gap."""
    attempt = make_attempt()
    attempt.started()
    published = tries = 0
    for happening in course:
        if attempt.is_ended and happening is Happening.DELTA:  # its caller asks first
            continue
        state, status = attempt.state, attempt.status
        row = LIFE[state].get(happening)
        if row is None:
            with pytest.raises(Impossible):
                happen(attempt, happening)
            assert (attempt.state, attempt.status) == (state, status)
            continue
        happen(attempt, happening)
        published += happening is Happening.DELTA and state is not State.WINDING_UP
        tries += happening is Happening.CALL
        assert (attempt.state, attempt.status) == (row.to, row.status or status)
    if attempt.is_ended:
        end = attempt.terminal(NOW)
        assert (end.seq, end.observed.deltas, end.tries) == (published + 1, published, tries)
