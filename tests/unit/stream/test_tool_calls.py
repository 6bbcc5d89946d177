"""Tool calls: which fragments belong to one call, values of any type, and the size that is counted."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.stream.tool_calls import CallBody, ToolCalls
from streamworker.wire.json import encode

FUNCTION = {"name": "f", "arguments": "{}"}


def calls_of(*fragments: dict[str, Any]) -> list[dict[str, Any]]:
    """Add each fragment as a delta of its own; return the calls."""
    calls = ToolCalls()
    for fragment in fragments:
        calls.add([fragment])
    return calls.values()


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        (0, 0, True),
        (0, "0", True),
        (0, 0.0, True),
        (1, 1.0, True),
        ("7", 7, True),
        (10**17, "1" + "0" * 17, True),
        (0, 1, False),
        (0, "1", False),
    ],
)
def test_tool_call_index_may_be_written_in_several_ways(first: Any, second: Any, is_same: bool) -> None:
    """`"0"` and 0.0 are 0: some servers write their numbers so."""
    calls = calls_of(
        {"index": first, "function": FUNCTION}, {"index": second, "function": {"arguments": "x"}}
    )

    assert len(calls) == (1 if is_same else 2)


@pytest.mark.parametrize(
    "index", [None, True, 0.5, float("nan"), float("inf"), "", "x", "-1", "٣", "²", "1" * 19, [0], {"a": 0}]
)
def test_tool_call_index_that_is_not_a_whole_number_is_ignored(index: Any) -> None:
    """The fragment continues the last call, as one without an index does."""
    calls = calls_of({"index": 4, "function": FUNCTION}, {"index": index, "function": {"arguments": "x"}})

    assert [call["function"]["arguments"] for call in calls] == ["{}x"]


@pytest.mark.parametrize("value", [None, 5, True, "", [], {}])
def test_tool_call_members_of_other_types_are_not_ids_types_or_names(value: Any) -> None:
    """The first text counts; a call without an id is named by its position."""
    strange = {"id": value, "type": value, "function": {"name": value}}
    [call] = calls_of(
        {"index": 0, **strange}, {"index": 0, "id": "a", "type": "function", "function": FUNCTION}
    )
    [nameless] = calls_of({"index": 0, **strange})

    assert call == {"id": "a", "type": "function", "function": FUNCTION}
    assert nameless == {"id": "call_0", "type": "function", "function": {"name": "", "arguments": ""}}


def test_tool_call_keeps_the_first_id_and_type() -> None:
    """Some upstreams send another id in every fragment."""
    [call] = calls_of(
        {"index": 0, "id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}},
        {"index": 0, "id": "b", "type": "function", "custom": {"input": "y"}},
    )

    assert call == {"id": "a", "type": "custom", "custom": {"name": "f", "input": "xy"}}


def test_tool_call_without_index_continues_the_call_with_its_id() -> None:
    """Fragments of two calls may alternate; an unknown id without a name continues the last call."""
    calls = calls_of(
        {"id": "a", "function": {"name": "f", "arguments": "1"}},
        {"id": "b", "function": {"name": "g", "arguments": "2"}},
        {"id": "a", "function": {"arguments": "3"}},
        {"id": "c", "function": {"arguments": "4"}},
    )

    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "13"), ("b", "24")]


def test_tool_call_body_has_every_member_and_the_text_of_objects() -> None:
    """Some servers send the arguments as an object instead of its JSON text; null members are absent."""
    body = CallBody("arguments")
    for fragment in (
        {"name": "f", "arguments": {"a": 1}},
        {"arguments": [2]},
        {"arguments": 5, "x": None, "y": 1},
    ):
        body.add(fragment)

    assert body.value() == {"name": "f", "arguments": '{"a":1}[2]', "y": 1}


def test_tool_calls_count_what_is_written_of_them() -> None:
    """The size is that of the encoded calls, each with a separator; a repeated name is written once."""
    calls = ToolCalls()
    grown = 0
    for fragment in (
        {"index": 0, "id": "call_abc", "type": "function", "function": {"name": "get_time"}},
        {
            "index": 0,
            "id": "call_abc",
            "type": "function",
            "function": {"name": "get_time", "arguments": "12"},
        },
        {"index": 1, "id": "call_def", "type": "function", "function": {"name": "x", "arguments": "🐟"}},
    ):
        grown += calls.add([fragment])

    assert grown == len(encode(calls.values())) - len("[]") + len(",")


@pytest.mark.parametrize("fragments", [None, 5, "x", {}, {"index": 0}, [], [None, 5, "x", []]])
def test_tool_calls_that_are_not_a_list_of_objects_add_nothing(fragments: Any) -> None:
    """Nothing is opened."""
    calls = ToolCalls()

    assert (calls.add(fragments), calls.values()) == (0, [])
