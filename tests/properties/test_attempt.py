"""The attempt: numbers without gaps, one terminal event, and the same events under every cut of the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamworker.model import ErrorCode, JobError, Status, TopicPartition, UsageEvent
from streamworker.stream.attempt import TRANSITIONS, Attempt, Input, InvalidTransition, State
from streamworker.wire.event import EventWriter, read_event
from tests.properties.strategies import CHAT_STREAMS, CUTS, STREAMS, pieces_of
from tests.streams import NOW, bytewise, chunk, data, ended, listening, make_attempt, play

if TYPE_CHECKING:
    from streamworker.model import DeltaEvent

TOO_LARGE = JobError(ErrorCode.TOO_LARGE, "too large")


def without_bytes(end: UsageEvent) -> UsageEvent:
    """Remove the number of received bytes: whether bytes after the end are counted depends on the cut."""
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
    """Whatever an upstream sends, the published records are UTF-8 JSON with the common members."""
    deltas, end = play(pieces_of(stream, cuts))
    events: list[DeltaEvent | UsageEvent] = [*deltas, end]
    for event in events:
        value = EventWriter().write(event, TopicPartition("events", 0), b"job-1").value
        assert value is not None
        assert read_event(value)["seq"] == event.seq


@given(CHAT_STREAMS | STREAMS, CUTS, st.sampled_from([40, 100, 1 << 20]))
def test_attempt_does_not_depend_on_the_cut(stream: bytes, cuts: list[int], limit: int) -> None:
    """Deltas, terminal event and usage are the same however the bytes are cut."""
    whole = play(stream, max_event_bytes=limit)
    for pieces in (pieces_of(stream, cuts), bytewise(stream)):
        played = play(pieces, max_event_bytes=limit)
        assert played.deltas == whole.deltas
        assert without_bytes(played.end) == without_bytes(whole.end)


@given(CHAT_STREAMS, CUTS, st.integers(0, 8))
def test_attempt_event_that_cannot_be_published_gives_its_number_back(
    stream: bytes, cuts: list[int], refused: int
) -> None:
    """The terminal event takes the `seq` of the event that could not be published, wherever that is."""
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
        if not attempt.is_listening:
            break
    if attempt.is_listening:
        for event in attempt.close(NOW):
            assert event.seq == refused + 1
            attempt.fail(TOO_LARGE)
    end = ended(attempt)
    seen = [event for event in published if event.choice is not None]

    assert published == whole.deltas[:refused]
    assert (end.seq, end.error) == (refused + 1, TOO_LARGE)
    assert end.status is (Status.INTERRUPTED if seen else Status.FAILED)
    assert end.observed.deltas == len(seen)


def apply(attempt: Attempt, input_: Input) -> None:
    match input_:
        case Input.DELTA:
            list(attempt.receive(data(chunk({"content": "a"})), NOW))
        case Input.DONE:
            list(attempt.receive(data(b"[DONE]"), NOW))
        case Input.BREAK:
            attempt.fail(TOO_LARGE)
        case Input.CANCEL:
            attempt.cancel("enough")
        case Input.WIND_UP:
            attempt.wind_up("enough")
        case Input.REFUSE:
            attempt.refuse(TOO_LARGE)
        case other:
            getattr(attempt, other.name.lower())()


@given(st.lists(st.sampled_from(Input), max_size=25))
def test_attempt_any_sequence_of_inputs_follows_the_table(inputs: list[Input]) -> None:
    """A row leads to its state, a missing row raises and changes nothing, and numbers have no gap."""
    attempt = make_attempt()
    attempt.started()
    published = tries = 0
    for input_ in inputs:
        if not attempt.is_listening and input_ in {
            Input.DELTA,
            Input.DONE,
        }:  # the caller checks `is_listening`
            continue
        state, status = attempt.state, attempt.status
        row = TRANSITIONS[state].get(input_)
        if row is None:
            with pytest.raises(InvalidTransition):
                apply(attempt, input_)
            assert (attempt.state, attempt.status) == (state, status)
            continue
        apply(attempt, input_)
        published += input_ is Input.DELTA and state is not State.WINDING_UP
        tries += input_ is Input.CALL
        assert (attempt.state, attempt.status) == (row.to, row.status or status)
    if attempt.is_ended:
        end = attempt.terminal(NOW)
        assert (end.seq, end.observed.deltas, end.tries) == (published + 1, published, tries)
