"""Characters that a stream splits over two deltas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamworker.stream.surrogates import MAX_DEPTH, MAX_HELD, MAX_NAME, SurrogateJoiner
from tests.streams import chunk, data, play

HIGH, LOW, FISH = "\ud83d", "\udc1f", "\ud83d\udc1f"


def call(arguments: str, index: int | None = 0) -> dict[str, Any]:
    return {
        "tool_calls": [({} if index is None else {"index": index}) | {"function": {"arguments": arguments}}]
    }


def joined(*deltas: dict[str, Any], finish: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Join the deltas of one choice; `finish` is its last one."""
    joiner = SurrogateJoiner()
    for delta in deltas:
        joiner.join(0, delta, is_last=False)
    if finish is not None:
        joiner.join(0, finish, is_last=True)
        assert not joiner.held
    return [*deltas] if finish is None else [*deltas, finish]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"content": "a" + HIGH}, {"content": LOW + "b"}, [{"content": "a"}, {"content": FISH + "b"}]),
        (call("{" + HIGH), call(LOW + "}"), [call("{"), call(FISH + "}")]),
        (call(HIGH, None), call(LOW, None), [call("", None), call(FISH, None)]),
        (
            {"function_call": {"arguments": HIGH}},
            {"function_call": {"arguments": LOW}},
            [{"function_call": {"arguments": ""}}, {"function_call": {"arguments": FISH}}],
        ),
        (
            {"content": [{"type": "text", "text": HIGH}]},
            {"content": [{"type": "text", "text": LOW}]},
            [{"content": [{"type": "text", "text": ""}]}, {"content": [{"type": "text", "text": FISH}]}],
        ),
        (
            {"reasoning_details": [{"index": 3, "text": HIGH}]},
            {"reasoning_details": [{"index": 4, "text": "x"}, {"index": 3, "text": LOW}]},
            [
                {"reasoning_details": [{"index": 3, "text": ""}]},
                {"reasoning_details": [{"index": 4, "text": "x"}, {"index": 3, "text": FISH}]},
            ],
        ),
        (call(HIGH, 0), call(LOW, 1), [call("", 0), call(LOW, 1)]),
    ],
)
def test_joiner_joins_halves_wherever_text_is(
    first: dict[str, Any], second: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    """The half is kept for the same member of the same call or part."""
    assert joined(first, second) == expected


@pytest.mark.parametrize(
    ("held", "last", "expected"),
    [
        ({"content": HIGH}, {}, {"content": HIGH}),
        ({"content": HIGH}, {"content": None}, {"content": HIGH}),
        (call("x" + HIGH, 2), {}, call(HIGH, 2)),
        (call("x" + HIGH, 2), {"tool_calls": []}, call(HIGH, 2)),
        (call(HIGH, 2), {"tool_calls": 5}, {"tool_calls": 5}),
        (
            {"content": [{"type": "text", "text": HIGH}]},
            {"content": ""},
            {"content": ""},
        ),
        ({"function_call": {"arguments": HIGH}}, {}, {"function_call": {"arguments": HIGH}}),
        (
            call(HIGH, 2),
            {"tool_calls": [5, {"index": 1}, {"index": 2}]},
            {"tool_calls": [5, {"index": 1}, {"index": 2, "function": {"arguments": HIGH}}]},
        ),
        (
            {"content": [{"type": "text", "text": HIGH}]},
            {"content": [{"type": "text"}]},
            {"content": [{"type": "text", "text": HIGH}]},
        ),
        (
            {"content": [{"type": "text", "text": HIGH}]},
            {"content": [{"type": "image"}]},
            {"content": [{"type": "image"}, {"type": "text", "text": HIGH}]},
        ),
        ({"content": HIGH}, {"content": "x"}, {"content": HIGH + "x"}),
        (
            {"content": HIGH},
            {"content": [{"type": "text", "text": "x"}]},
            {"content": [{"type": "text", "text": "x"}]},
        ),
        ({"content": HIGH}, {"content": 5}, {"content": 5}),
        ({"content": [{"text": HIGH}]}, {"content": {"text": 5}}, {"content": {"text": 5}}),
        ({"content": {"text": HIGH}}, {"content": [{"text": 5}]}, {"content": [{"text": 5}]}),
        ({"content": {"text": HIGH}}, {"content": "x"}, {"content": "x"}),
    ],
)
def test_joiner_last_delta_gets_the_halves_that_stay_alone(
    held: dict[str, Any], last: dict[str, Any], expected: dict[str, Any]
) -> None:
    """They are put where their string was; nothing that is there is replaced, whatever its type."""
    assert joined(held, finish=last)[-1] == expected


def test_joiner_holds_a_bounded_number_of_halves_at_a_bounded_depth() -> None:
    """A half beyond the bounds stays where it is, and becomes U+FFFD."""
    joiner = SurrogateJoiner()
    joiner.join(0, {f"m{number}": HIGH for number in range(MAX_HELD + 5)}, is_last=False)
    assert len(joiner.held) == MAX_HELD

    deep: dict[str, Any] = {"text": HIGH}
    for _ in range(MAX_DEPTH + 1):
        deep = {"in": deep}
    joiner = SurrogateJoiner()
    joiner.join(0, deep | {"x" * 65: HIGH}, is_last=False)
    assert not joiner.held


@pytest.mark.parametrize(
    ("code", "is_half"),
    [(0xD7FF, False), (0xD800, True), (0xDBFF, True), (0xDC00, False), (0xDFFF, False), (0x1F41F, False)],
)
def test_joiner_holds_high_surrogates_only(code: int, is_half: bool) -> None:
    """They are the first half of a character; no other character can be continued."""
    [delta] = joined({"content": "a" + chr(code)})

    assert delta == {"content": "a" if is_half else "a" + chr(code)}


def test_joiner_joins_text_of_members_with_names_up_to_a_length() -> None:
    """The names are held with the halves."""
    name = "x" * MAX_NAME
    kinds = [{"type": "k" * length, "text": HIGH} for length in (MAX_NAME, MAX_NAME + 1)]
    joiner = SurrogateJoiner()
    joiner.join(0, {name: HIGH, "parts": kinds}, is_last=False)

    assert [key for _, key in joiner.held] == [
        (name,),
        ("parts", (None, 0, "k" * MAX_NAME), "text"),
        ("parts", (None, 1, None), "text"),
    ]


def test_joiner_keeps_choices_apart() -> None:
    """A half waits for its own choice."""
    joiner = SurrogateJoiner()
    one, other = {"content": HIGH}, {"content": "x"}
    joiner.join(0, one, is_last=False)
    joiner.join(1, other, is_last=True)

    assert (one, other) == ({"content": ""}, {"content": "x"})
    assert list(joiner.held.values()) == [HIGH]


def test_stream_that_ends_with_another_type_than_a_half_before_it_completes() -> None:
    """The half has no place in the last delta, and is dropped; the job does not fail for it."""
    parts = {"content": [{"type": "text", "text": "a" + HIGH}]}
    stream = data(json.dumps(chunk(parts)).encode(), chunk({"content": {"text": 5}}, "stop"), b"[DONE]")
    played = play(stream)

    assert [event.delta for event in played.deltas] == [
        {"content": [{"type": "text", "text": "a"}]},
        {"content": {"text": 5}},
    ]
    assert played.end.status == "completed"
