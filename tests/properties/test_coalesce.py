"""Merged or not, a stream says the same in the same order, whenever what is held leaves."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from streamworker.stream.coalesce import MAX_LIVE_BYTES, Coalescer
from tests.properties.strategies import CHAT_STREAMS, CUTS, pieces_of
from tests.streams import NOW, chunk, data, ended, listening

if TYPE_CHECKING:
    from streamworker.model import DeltaEvent
    from streamworker.stream.attempt import Attempt

_TEXTS = st.sampled_from(["", "a", "bc", "🐟", "d" * (MAX_LIVE_BYTES - 3), "e" * (MAX_LIVE_BYTES + 1)])
_DELTAS = st.one_of(
    st.builds(lambda text: {"content": text}, _TEXTS),
    st.builds(lambda name, text: {name: text}, st.sampled_from(["reasoning", "reasoning_content"]), _TEXTS),
    st.sampled_from(
        [{}, {"role": "assistant", "content": "a"}, {"tool_calls": [{"index": 0}]}, {"content": None}]
    ),
)
_CHOICES = st.builds(
    lambda delta, index, more: {"delta": delta, "index": index} | more,
    _DELTAS,
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([{}] * 6 + [{"finish_reason": "stop"}, {"logprobs": {}}, {"x": 1}]),
)
_PLAIN = _TEXTS.map(lambda text: chunk({"content": text}))
_ODD = st.builds(
    lambda choices, more: chunk(choices=choices, **more),
    st.lists(_CHOICES, min_size=1, max_size=2),
    st.sampled_from([{}] * 6 + [{"id": "other"}, {"y": 1}, {"usage": {"completion_tokens": 3}}]),
)
_RUNS = st.lists(_PLAIN, max_size=6) | st.lists(_ODD, max_size=2)
_ENDS = st.sampled_from([b"", b"[DONE]", b'{"error":{"message":"m"}}', b"not json"])
_TEXT_STREAMS = st.builds(lambda runs, end: data(*chain(*runs), end), st.lists(_RUNS, max_size=6), _ENDS)

_NOTHING, _FLUSH, _ABANDON = range(3)


def text_of(event: DeltaEvent) -> tuple[int, str] | None:
    """Choice and member of an event that may be merged, by the documented rules."""
    value: dict[str, Any] = msgspec.to_builtins(event)
    is_bare = value.keys() == {
        "type",
        "v",
        "job_id",
        "attempt",
        "seq",
        "ts",
        "choice",
        "delta",
        "finish_reason",
    }
    if not is_bare or event.finish_reason is not None or event.choice is None or len(event.delta) != 1:
        return None
    [(name, text)] = event.delta.items()
    is_text = name in {"content", "reasoning_content", "reasoning"} and isinstance(text, str)
    return (event.choice, name) if is_text else None


def run(attempt: Attempt, pieces: list[bytes], moves: list[int]) -> list[DeltaEvent]:
    """Feed a stream, one millisecond per piece, and publish the held text between the pieces, or fail to."""
    events: list[DeltaEvent] = []
    for at, piece in enumerate(pieces):
        events += attempt.receive(piece, NOW + at)
        if not attempt.is_listening:
            return events
        move = moves[at % len(moves)]
        if move == _FLUSH:
            events += attempt.flush()
        elif move == _ABANDON:  # interrupted before it could be published
            next(attempt.flush(), None)
    return [*events, *attempt.close(NOW + len(pieces))]


def joined(events: list[DeltaEvent]) -> list[DeltaEvent]:
    """Join all neighbours that may be merged: the rest must not change. Without `seq`."""
    told: list[DeltaEvent] = []
    for event in events:
        kind = text_of(event)
        if kind is not None and told and text_of(told[-1]) == kind:
            told[-1].delta = {kind[1]: told[-1].delta[kind[1]] + event.delta[kind[1]]}
        else:
            told.append(msgspec.structs.replace(event, seq=0))
    return told


@given(_TEXT_STREAMS | CHAT_STREAMS, CUTS, st.lists(st.sampled_from(range(3)), min_size=1, max_size=8))
def test_coalesced_stream_is_the_stream_with_some_texts_joined(
    stream: bytes, cuts: list[int], moves: list[int]
) -> None:
    """Nothing is missing, added, moved or touched that is more than text; the first delta and the account are the same."""
    pieces = pieces_of(stream, cuts)
    plain, merging = listening(), listening(coalescer=Coalescer())
    deltas = run(plain, pieces, [_NOTHING])
    merged = run(merging, pieces, moves)

    assert [event.seq for event in merged] == list(range(1, len(merged) + 1))
    assert joined(merged) == joined(deltas)
    assert merged[:1] == deltas[:1]
    end = ended(merging)
    assert end == msgspec.structs.replace(ended(plain), seq=len(merged) + 1)
    assert merging.held_deltas == 0
