"""Split characters: whatever an upstream sends, no text is lost that has a place, and none is invented."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamworker.stream.surrogates import SurrogateJoiner
from tests.streams import chunk, data, play

HIGH, LOW = "\ud83d", "\udc1f"

LEAVES = st.sampled_from(["a" + HIGH, HIGH, LOW, "a", None, 1])


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects of hardly more than one name, so that the deltas of a stream have strings at the same places."""
    marks = {"y": values, "index": st.integers(0, 1), "type": st.sampled_from("tu")}
    return st.fixed_dictionaries({"x": values}, optional=marks)


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return objects(values) | st.lists(objects(values) | values, max_size=2)


DELTAS = objects(LEAVES | nested(LEAVES) | nested(nested(LEAVES)))


def text_of(value: Any) -> str:
    """Return all text of a value, without that of names."""
    if isinstance(value, str):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return "".join(map(text_of, parts))


@given(st.lists(DELTAS, max_size=4), DELTAS)
def test_joiner_moves_halves_and_nothing_else(deltas: list[dict[str, Any]], last: dict[str, Any]) -> None:
    """Other text is unchanged; a half is dropped only where its string's place has another type at the end."""
    joiner = SurrogateJoiner()
    before = copy.deepcopy([*deltas, last])
    for delta in deltas:
        joiner.join(0, delta, is_last=False)
    joiner.join(0, last, is_last=True)
    after = "".join(map(text_of, [*deltas, last]))
    whole = "".join(map(text_of, before))

    assert joiner.held == {}
    assert after.count("a") == whole.count("a")
    assert after.count(LOW) == whole.count(LOW)
    assert after.count(HIGH) <= whole.count(HIGH)


@given(st.lists(DELTAS, min_size=1, max_size=4))
def test_stream_of_any_deltas_with_halves_completes(deltas: list[dict[str, Any]]) -> None:
    """No shape ends a job but by the protocol."""
    chunks = [chunk(delta, "stop" if at == len(deltas) - 1 else None) for at, delta in enumerate(deltas)]
    encoded = [json.dumps(one).encode() for one in chunks]

    assert play(data(chunk({"content": "hi"}), *encoded, b"[DONE]")).end.status == "completed"
