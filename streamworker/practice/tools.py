"""Tool calls, whole and in fragments, as the providers split them."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CUTS: Final = ((0, 1), (1, 14), (14, None))  # a first `{`, a cut inside a string, the rest
_SPARSE_FROM: Final = 3


def tool_call(choice: int, number: int) -> dict[str, Any]:
    """Return one complete call."""
    arguments = f'{{"place":"Zürich 🐟","number":{number}}}'
    function = {"name": "look_up", "arguments": arguments}
    return {"id": f"call_{choice}_{number}", "type": "function", "function": function}


def deltas(how: str, choice: int, calls: int) -> Iterator[dict[str, Any]]:
    """Yield the deltas of this number of calls."""
    said = [list(_fragments(how, tool_call(choice, number), number)) for number in range(calls)]
    if how == "function_call":
        yield from ({"function_call": fragment} for fragment in chain.from_iterable(said))
    elif how == "interleaved":  # every delta carries a fragment of every call
        yield from ({"tool_calls": list(fragments)} for fragments in zip(*said, strict=True))
    else:
        yield from ({"tool_calls": [fragment]} for fragment in chain.from_iterable(said))


def count(how: str, calls: int) -> int:
    """Return the number of deltas of this number of calls."""
    return len(list(deltas(how, 0, min(calls, 1)))) * (1 if how == "interleaved" else calls)


def _fragments(how: str, call: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
    function: dict[str, Any] = call["function"]
    arguments: str = function["arguments"]
    parts = [{"arguments": arguments[start:end]} for start, end in _CUTS]
    match how:
        case "whole":
            yield {"index": number, **call}
        case "custom":
            custom = {"id": call["id"], "type": "custom"}
            yield {"index": number, **custom, "custom": {"name": function["name"], "input": ""}}
            yield from ({"index": number, "custom": {"input": part["arguments"]}} for part in parts)
        case "function_call":
            yield {"name": function["name"], "arguments": ""}
            yield from parts
        case "late_name":
            yield {"index": number, **call, "function": {"name": "", "arguments": ""}}
            yield from ({"index": number, "function": part} for part in parts[:-1])
            yield {"index": number, "function": {**parts[-1], "name": function["name"]}}
        case "no_arguments":
            yield {"index": number, **call, "function": {"name": function["name"]}}
            yield from ({"index": number, "function": part} for part in parts)
            yield {"index": number, "function": {"arguments": ""}}
        case _:
            first = {"index": number, **call, "function": {**function, "arguments": ""}}
            later = [{"index": number, "function": part} for part in parts]
            bend = _BENT.get(how)
            yield from (bend(fragment, call) if bend else fragment for fragment in (first, *later))


def _without(name: str, fragment: dict[str, Any]) -> dict[str, Any]:
    return {other: value for other, value in fragment.items() if other != name}


def _repeated(fragment: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], **fragment["function"]}
    return {**fragment, "id": call["id"], "type": "function", "function": function}


_BENT: Final[dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]]] = {
    # Only the id identifies the call of a fragment.
    "no_index": lambda fragment, call: _without("index", fragment) | {"id": call["id"]},
    "zero_index": lambda fragment, call: fragment | {"index": 0, "id": call["id"]},
    "no_name": lambda fragment, _: fragment | {"function": _without("name", fragment["function"])},
    "no_type": lambda fragment, _: _without("type", fragment),
    "empty_id": lambda fragment, _: {"id": "", **fragment},
    "repeated": _repeated,
    "sparse": lambda fragment, _: fragment | {"index": fragment["index"] + _SPARSE_FROM},
}
"""A function from OpenAI's fragment and its complete call to the fragment as another provider writes it."""
