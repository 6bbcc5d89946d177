"""One choice is put together by rules that hold for every provider; each known fault of other assemblers has a case."""

from __future__ import annotations

import base64
import gc
import time
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.stream.completion import CompletionAssembler, second_of
from streamworker.stream.reasoning_details import ReasoningDetails
from streamworker.wire.json import encode
from tests.completions import STARTED, completed, of_chunks, of_deltas, read_back, started
from tests.streams import NOW, chunk

if TYPE_CHECKING:
    from collections.abc import Callable

Deltas = list[dict[str, Any]]


def fragment(arguments: str | None = None, *, name: str | None = None, **members: Any) -> dict[str, Any]:
    """Return a delta with one fragment of a tool call."""
    function = {"name": name, "arguments": arguments}
    function = {key: value for key, value in function.items() if value is not None}
    return {"tool_calls": [members | ({"function": function} if function else {})]}


def call(name: str, arguments: str, identifier: str = "c1", **members: Any) -> dict[str, Any]:
    """Return a whole tool call."""
    return {
        "id": identifier,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    } | members


# Members of the message besides `role`, `content` and `refusal` as they are where no delta brought them.
MESSAGES: dict[str, tuple[Deltas, dict[str, Any]]] = {
    "no members": ([{}], {}),
    "text": (
        [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "🐟b"}],
        {"content": "a🐟b"},
    ),
    "empty text is not null": ([{"content": ""}], {"content": ""}),
    "null is not text": ([{"content": None}, {"content": "a"}, {"content": None}], {"content": "a"}),
    "a role in every delta": ([{"role": "assistant", "content": "a"}] * 3, {"content": "aaa"}),
    "the first role that is not empty": (
        [{"role": ""}, {"role": None}, {"role": "model"}],
        {"role": "model"},
    ),
    "a character cut in two": ([{"content": "a\ud83d"}, {"content": "\udc1fb"}], {"content": "a🐟b"}),
    "half a character": ([{"content": "a\ud83d"}], {"content": "a�"}),
    "refusal": ([{"refusal": "n"}, {"refusal": "o"}], {"refusal": "no"}),
    "text of parts": (
        [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "c"}],
        {"content": "abc"},
    ),
    "thinking of parts": (
        [
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "h"}]}]},
            {"content": [{"type": "thinking", "thinking": "m"}, {"type": "text", "text": "a"}]},
        ],
        {"content": "a", "reasoning_content": "hm"},
    ),
    "parts of other kinds": ([{"content": [{"type": "image_url"}, "x", None, {"text": 5}]}], {}),
    "reasoning_content": (
        [{"reasoning_content": "h"}, {"reasoning_content": "m"}],
        {"reasoning_content": "hm"},
    ),
    "reasoning": ([{"reasoning": "h"}, {"reasoning": "m"}], {"reasoning_content": "hm"}),
    "the same reasoning under two names": (
        [{"reasoning_content": "h", "reasoning": "h"}] * 2,
        {"reasoning_content": "hh"},
    ),
    "an empty name beside a full one": (
        [{"reasoning_content": "", "reasoning": "hm"}],
        {"reasoning_content": "hm"},
    ),
    "empty reasoning is absent": ([{"reasoning_content": "", "content": "a"}], {"content": "a"}),
    "audio": (
        [
            {"audio": {"id": "x", "transcript": "o"}},
            {"audio": {"data": base64.b64encode(b"ab").decode()}},
            {"audio": {"data": base64.b64encode(b"cde").decode(), "transcript": "h"}},
            {"audio": {"expires_at": 7}},
        ],
        {
            "audio": {
                "id": "x",
                "expires_at": 7,
                "data": base64.b64encode(b"abcde").decode(),
                "transcript": "oh",
            }
        },
    ),
    "audio cut between any characters": (
        [{"audio": {"id": "x", "expires_at": 7, "data": piece}} for piece in "YWJjZGU="],
        {"audio": {"id": "x", "expires_at": 7, "data": "YWJjZGU=", "transcript": ""}},
    ),
    "audio without its last characters": (
        [{"audio": {"data": "YWJj"}}, {"audio": {"data": "ZGU"}}],
        {"audio": {"id": "", "expires_at": 0, "data": "YWJjZGU=", "transcript": ""}},
    ),
    "audio that is not base64": (
        [{"audio": {"data": "é"}}, {"audio": {"data": 5, "transcript": None}}, {"audio": 5}],
        {"audio": {"id": "", "expires_at": 0, "data": "", "transcript": ""}},
    ),
    "function_call": (
        [{"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}}],
        {"function_call": {"name": "f", "arguments": "{}"}},
    ),
    "annotations without index": (
        [
            {"annotations": [{"type": "url_citation", "n": 1}]},
            {"annotations": [{"type": "url_citation", "n": 2}]},
        ],
        {"annotations": [{"type": "url_citation", "n": 1}, {"type": "url_citation", "n": 2}]},
    ),
    "a running list": ([{"images": [1]}, {"images": [1, 2]}, {"images": [1, 2]}], {"images": [1, 2]}),
    "a list whose number begins like the former one": (
        [{"images": [1]}, {"images": [12]}],
        {"images": [1, 12]},
    ),
    "an empty list": ([{"images": [1]}, {"images": []}], {"images": [1]}),
    "the last value of another member": ([{"x": "a"}, {"x": "b"}, {"x": None}], {"x": "b"}),
    "a list after another value": ([{"x": "a"}, {"x": [1]}, {"x": {"y": 1}}], {"x": {"y": 1}}),
    "known members of unusable types": (
        [{"role": 5, "content": 5, "refusal": 5, "tool_calls": {}, "function_call": "f", "reasoning": 5}],
        {},
    ),
}


@pytest.mark.parametrize(("deltas", "expected"), MESSAGES.values(), ids=MESSAGES)
def test_assembler_message_follows_the_rule_of_each_member(deltas: Deltas, expected: dict[str, Any]) -> None:
    """A message is its deltas' members, joined; what no delta brought is null or absent."""
    assert of_deltas(*deltas) == {"role": "assistant", "content": None, "refusal": None} | expected


CALLS: dict[str, tuple[Deltas, list[dict[str, Any]]]] = {
    "one call in fragments": (
        [
            fragment("", index=0, id="c1", type="function", name="f"),
            fragment('{"a"', index=0),
            fragment(":1}", index=0),
        ],
        [call("f", '{"a":1}')],
    ),
    "two calls that alternate": (
        [
            fragment("", index=0, id="c1", name="f"),
            fragment("", index=1, id="c2", name="g"),
            fragment("{", index=0),
            fragment("[", index=1),
            fragment("}", index=0),
            fragment("]", index=1),
        ],
        [call("f", "{}"), call("g", "[]", "c2")],
    ),
    "two calls in each delta": (
        [
            {
                "tool_calls": [
                    {"index": at, "id": f"c{at + 1}", "function": {"name": name}}
                    for at, name in enumerate("fg")
                ]
            },
            {"tool_calls": [{"index": at, "function": {"arguments": "{}"}} for at in (1, 0)]},
        ],
        [call("f", "{}"), call("g", "{}", "c2")],
    ),
    "one index twice in one delta": (
        [
            {
                "tool_calls": [
                    {"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{"}},
                    {"index": 0, "function": {"arguments": "}"}},
                ]
            }
        ],
        [call("f", "{}")],
    ),
    "id and name repeated": (
        [fragment(part, index=0, id="c1", name="f") for part in "{}"],
        [call("f", "{}")],
    ),
    "index always 0 with another id and name": (
        [fragment("{}", index=0, id="c1", name="f"), fragment("[]", index=0, id="c2", name="g")],
        [call("f", "{}"), call("g", "[]", "c2")],
    ),
    "index always 0 and the same function twice": (
        [
            fragment("{", index=0, id="c1", name="f"),
            fragment("}", index=0),
            fragment("[", index=0, id="c2", name="f"),
            fragment("]", index=0),
        ],
        [call("f", "{}"), call("f", "[]", "c2")],
    ),
    "index always 0, and ids differ": (
        [
            fragment("", index=0, id="c1", name="f"),
            fragment("{}", index=0, id="c1"),
            fragment("", index=0, id="c2", name="f"),
            fragment("[]", index=0, id="c2"),
        ],
        [call("f", "{}"), call("f", "[]", "c2")],
    ),
    "a second id of one call": (
        [
            fragment("", index=0, id="c1", name="f"),
            fragment("{}", index=0, id="c2"),
            fragment("", index=0, id="c2"),
        ],
        [call("f", "{}")],
    ),
    "a random id in every fragment": (
        [fragment(part, index=0, id=f"c{n}", name="f" if n == 1 else None) for n, part in enumerate("{}", 1)],
        [call("f", "{}")],
    ),
    "a random id in every fragment, without index": (
        [fragment(part, id=f"c{n}", name="f" if n == 1 else "") for n, part in enumerate("{}", 1)],
        [call("f", "{}")],
    ),
    "no index, and ids differ": (
        [
            fragment("{", id="c1", name="f"),
            fragment("[", id="c2", name="g"),
            fragment("}", id="c1"),
            fragment("]", id="c2"),
        ],
        [call("f", "{}"), call("g", "[]", "c2")],
    ),
    "no index, and later fragments without id": (
        [fragment("{", id="c1", name="f"), fragment("}"), fragment("[", id="c2", name="g"), fragment("]")],
        [call("f", "{}"), call("g", "[]", "c2")],
    ),
    "index null": (
        [fragment("{", index=None, id="c1", name="f"), fragment("}", index=None, id=None)],
        [call("f", "{}")],
    ),
    "neither index nor id, whole calls": (
        [fragment("{}", name="f"), fragment("[]", name="f")],
        [call("f", "{}", "call_0"), call("f", "[]", "call_1")],
    ),
    "neither index nor id, and the name comes late": (
        [fragment("{"), fragment("}", name="f"), fragment("", name="")],
        [call("f", "{}", "call_0")],
    ),
    "index 0 and no id at all": (
        [fragment("{", index=0, name="f"), fragment("}", index=0)],
        [call("f", "{}", "call_0")],
    ),
    "a late id beside the name again": (
        [fragment("{", index=0, name="f"), fragment("}", index=0, id="c1", name="f")],
        [call("f", "{}")],
    ),
    "the index as text": (
        [fragment("{", index="0", id="c1", name="f"), fragment("}", index=0)],
        [call("f", "{}")],
    ),
    "the index as a float": (
        [fragment("{", index=0, id="c1", name="f"), fragment("}", index=0.0)],
        [call("f", "{}")],
    ),
    "a first index of 3": (
        [fragment("{", index=3, id="c1", name="f"), fragment("}", index=3)],
        [call("f", "{}")],
    ),
    "calls stand in the order of their opening": (
        [fragment("{}", index=7, id="c1", name="f"), fragment("[]", index=2, id="c2", name="g")],
        [call("f", "{}"), call("g", "[]", "c2")],
    ),
    "empty id and name later": (
        [fragment("{", index=0, id="c1", name="f"), fragment("}", index=0, id="", name="")],
        [call("f", "{}")],
    ),
    "a name in pieces": (
        [fragment(index=0, id="c1", name="look_"), fragment("{}", index=0, name="up")],
        [call("look_up", "{}")],
    ),
    "no name": ([fragment("{}", index=0, id="c1")], [call("", "{}")]),
    "an unfinished call": ([fragment('{"a":', index=0, id="c1", name="f")], [call("f", '{"a":')]),
    "arguments as an object": (
        [{"tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}]}],
        [call("f", '{"a":1}')],
    ),
    "members without a rule": (
        [
            fragment("{}", index=0, id="c1", name="f", extra_content={"google": {"thought_signature": "s"}}),
            {"tool_calls": [{"index": 0, "x": None, "function": {"strict": True}}]},
        ],
        [
            call("f", "{}", extra_content={"google": {"thought_signature": "s"}})
            | {"function": {"name": "f", "arguments": "{}", "strict": True}}
        ],
    ),
    "a custom tool": (
        [
            {
                "tool_calls": [
                    {"index": 0, "id": "c1", "type": "custom", "custom": {"name": "f", "input": ""}}
                ]
            },
            {"tool_calls": [{"index": 0, "custom": {"input": "a"}}]},
            {"tool_calls": [{"index": 0, "custom": {"input": "b"}}]},
        ],
        [{"id": "c1", "type": "custom", "custom": {"name": "f", "input": "ab"}}],
    ),
    "a custom tool without type": (
        [{"tool_calls": [{"index": 0, "id": "c1", "custom": {"name": "f", "input": "a"}}]}],
        [{"id": "c1", "type": "custom", "custom": {"name": "f", "input": "a"}}],
    ),
    "a type of the upstream's own": (
        [fragment("{}", index=0, id="c1", type="builtin_function", name="$web")],
        [call("$web", "{}", type="builtin_function")],
    ),
    "a call without body": ([fragment(index=0, id="c1")], [call("", "")]),
}


@pytest.mark.parametrize(("deltas", "expected"), CALLS.values(), ids=CALLS)
def test_assembler_tool_calls_are_separated_by_index_id_and_name(
    deltas: Deltas, expected: list[dict[str, Any]]
) -> None:
    """No fragment goes to a call that it does not belong to, and none is lost."""
    assert of_deltas(*deltas)["tool_calls"] == expected


def test_assembler_tool_calls_that_are_not_objects_are_ignored() -> None:
    """An array without fragments makes no call."""
    assert "tool_calls" not in of_deltas({"tool_calls": []}, {"tool_calls": [None, 5, "f", []]})


def detail(
    text: str | None = None, kind: str = "text", index: int | None = 0, **members: Any
) -> dict[str, Any]:
    """Return one entry of `reasoning_details`."""
    texts = {} if text is None else {kind if kind != "encrypted" else "data": text}
    return {"type": f"reasoning.{kind}", **texts, "index": index, **members}


DETAILS: dict[str, tuple[list[list[Any]], list[Any]]] = {
    "text in fragments": ([[detail("a")], [detail("b")]], [detail("ab")]),
    "a summary in fragments": (
        [[detail("a", "summary")], [detail("b", "summary")]],
        [detail("ab", "summary")],
    ),
    "encrypted data in fragments": (
        [[detail("a", "encrypted")], [detail("b", "encrypted")]],
        [detail("ab", "encrypted")],
    ),
    "the signature comes last": (
        [[detail("a")], [detail("b", signature=None)], [detail(signature="s")]],
        [detail("ab", signature="s")],
    ),
    "index 0 throughout": (
        [
            [detail("a", "summary")],
            [detail("b", "summary")],
            [detail("e", "encrypted")],
            [detail("c", "summary")],
        ],
        [detail("ab", "summary"), detail("e", "encrypted"), detail("c", "summary")],
    ),
    "another index": ([[detail("a")], [detail("b", index=1)]], [detail("a"), detail("b", index=1)]),
    "a signed block and the next one": (
        [[detail("a")], [detail(signature="s")], [detail("b")], [detail(signature="t")]],
        [detail("a", signature="s"), detail("b", signature="t")],
    ),
    "the same signature in every fragment": (
        [[detail("a", signature="s")], [detail("b", signature="s")]],
        [detail("ab", signature="s")],
    ),
    "another id": (
        [[detail("a", "encrypted", id="x")], [detail("b", "encrypted", id="y")]],
        [detail("a", "encrypted", id="x"), detail("b", "encrypted", id="y")],
    ),
    "an id in the first fragment only": (
        [[detail("a", id="x")], [detail("b")], [detail("c", id=None)]],
        [detail("abc", id="x")],
    ),
    "an id in a later fragment": ([[detail("a")], [detail("b", id="x")]], [detail("ab", id="x")]),
    "the same id in every fragment": (
        [[detail("a", id="x")], [detail("b", id="x")]],
        [detail("ab", id="x")],
    ),
    "two fragments of one entry in one delta": ([[detail("a"), detail("b")]], [detail("ab")]),
    "a signature behind a signature, without more text": (
        [[detail("a", signature="s")], [detail(signature="t")], [detail("b", signature="t")]],
        [detail("ab", signature="t")],
    ),
    "text without a signature behind a signed entry": (
        [[detail("a", signature="s")], [detail("b", signature=None)]],
        [detail("a", signature="s"), detail("b")],
    ),
    "another format in a later fragment": (
        [[detail("a", format="x")], [detail("b", format="y")]],
        [detail("ab", format="y")],
    ),
    "no index": ([[detail("a", index=None)], [detail("b", index=None)]], [detail("ab") | {"index": None}]),
    "no index, two in one delta": (
        [[{"type": "t", "text": "a"}, {"type": "t", "text": "b"}]],
        [{"type": "t", "text": "a"}, {"type": "t", "text": "b"}],
    ),
    "no type": ([[{"text": "a"}], [{"text": "b"}]], [{"text": "a"}, {"text": "b"}]),
    "not objects": ([["a"], [detail("b"), 5]], ["a", detail("b"), 5]),
}


@pytest.mark.parametrize(("deltas", "expected"), DETAILS.values(), ids=DETAILS)
def test_assembler_reasoning_details_are_merged_within_one_entry_only(
    deltas: list[list[Any]], expected: list[Any]
) -> None:
    """A signature is checked against the whole text of its entry."""
    message = of_deltas(*({"reasoning_details": details} for details in deltas))
    expected = [_without_null(entry) for entry in expected]

    assert message["reasoning_details"] == expected


def _without_null(entry: Any) -> Any:
    return {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else entry


def test_reasoning_details_count_at_least_what_is_written_of_complete_entries() -> None:
    """Those that are not objects too: an upstream must not use up memory with them."""
    details = ReasoningDetails()
    grown = details.add(["x" * 100, detail("y" * 100), 5])

    assert grown >= len(encode(details.values())) - 20


def test_assembler_reasoning_details_count_as_reasoning_where_no_other_member_does() -> None:
    """Text and summaries do, encrypted data does not."""
    alone = of_deltas({"reasoning_details": [detail("a"), detail("b", "summary"), detail("c", "encrypted")]})
    beside = of_deltas({"reasoning": "x", "reasoning_details": [detail("a")]})

    assert (alone["reasoning_content"], beside["reasoning_content"]) == ("ab", "x")


def test_assembler_completion_without_chunk_members_has_the_defaults_of_the_job() -> None:
    """Id, model and time are the attempt's where the upstream names none."""
    assembler = started()
    assembler.add(0, {"content": "a"})

    assert completed(assembler) == {
        "id": "chatcmpl-a-1",
        "object": "chat.completion",
        "created": NOW // 1000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        "usage": None,
    }


CHUNKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "the first id and model that are not empty": (
        [{"id": "", "model": ""}, {"id": "x", "model": "y"}, {"id": "z", "model": "z"}],
        {"id": "x", "model": "y"},
    ),
    "an id and a model of unusable types": ([{"id": 5, "model": None}], {"id": "chatcmpl-a-1", "model": "m"}),
    "the first positive created": ([{"created": 0}, {"created": 5}, {"created": 6}], {"created": 5}),
    "created as a float": ([{"created": 5.7}], {"created": 5}),
    "created of unusable values": (
        [{"created": value} for value in (None, -1, True, "5", float("inf"), 10**400)],
        {"created": NOW // 1000},
    ),
    "the last fingerprint and tier that are not null": (
        [
            {"system_fingerprint": "a", "service_tier": "x"},
            {"system_fingerprint": "b"},
            {"service_tier": None},
        ],
        {"system_fingerprint": "b", "service_tier": "x"},
    ),
    "the object is a completion": ([{"object": "chat.completion.chunk"}], {"object": "chat.completion"}),
}


@pytest.mark.parametrize(("chunks", "expected"), CHUNKS.values(), ids=CHUNKS)
def test_assembler_members_of_the_chunk_become_the_completions(
    chunks: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    """Each by its own rule."""
    assembler = started()
    for told in chunks:
        assembler.add(0, {}, chunk=told)
    completion = completed(assembler)

    assert {name: completion[name] for name in expected} == expected


def test_assembler_fingerprint_and_tier_that_never_came_are_absent() -> None:
    """Null is not a value."""
    completion = of_chunks(chunk({"content": "a"}, system_fingerprint=None, service_tier=None))

    assert completion.keys().isdisjoint({"system_fingerprint", "service_tier"})


def test_assembler_unknown_members_stand_on_the_object_or_the_choice() -> None:
    """On the object where the event has no choice or the member is known to be the chunk's, else on the choice."""
    assembler = started()
    assembler.add(0, {"content": "a"}, extra={"provider": "P", "stop_reason": 5, "matched": None})
    assembler.add(1, {}, extra={"citations": ["x"], "token_ids": [1]})
    assembler.add(1, {}, extra={"citations": ["x", "y"], "token_ids": [2]})
    assembler.add(None, {}, extra={"prompt_filter_results": [1], "anything": 1, "choices": 5, "usage": 5})
    completion = completed(assembler)
    first, second = completion["choices"]

    assert (completion["provider"], completion["citations"], completion["anything"]) == ("P", ["x", "y"], 1)
    assert completion["prompt_filter_results"] == [1]
    assert completion["usage"] is None
    assert first["stop_reason"] == 5
    assert "matched" not in first
    assert second["token_ids"] == [1, 2]


def test_assembler_unknown_members_replace_nothing_that_is_assembled() -> None:
    """Some upstreams send the whole message beside the last delta."""
    assembler = started()
    assembler.add(0, {"content": "a"}, extra={"message": {"content": "b"}, "index": 5, "finish_reason": "x"})

    assert completed(assembler)["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "a", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }


def test_assembler_choices_stand_in_the_order_of_their_indices() -> None:
    """Each choice of an event is kept under its index."""
    assembler = started()
    for index in (2, 0, 10**9, -1):
        assembler.add(index, {"content": str(index)})
    choices = completed(assembler)["choices"]

    assert [choice["index"] for choice in choices] == [-1, 0, 2, 10**9]
    assert [choice["message"]["content"] for choice in choices] == ["-1", "0", "2", "1000000000"]


def test_assembler_logprobs_are_joined_even_where_they_repeat() -> None:
    """A token that comes twice has its log probability twice; null is not a list."""
    assembler = started()
    token = {"token": "a"}
    brought: list[Any] = [{"content": [token], "refusal": None}, {"content": [token]}, None, {}, 5, []]
    for logprobs in brought:
        assembler.add(0, {"content": "a"}, logprobs=logprobs)
    assembler.add(1, {"content": "a"})
    first, second = completed(assembler)["choices"]

    assert first["logprobs"] == {"content": [token, token], "refusal": None}
    assert second["logprobs"] is None


def test_assembler_finish_reasons_are_the_terminal_events() -> None:
    """Until it comes, the deltas' last ones; a choice that it does not name is unfinished."""
    assembler = started()
    assembler.add(0, {"content": "a"}, "stop")
    assembler.add(0, {})
    assembler.add(1, {"content": "b"})
    assembler.add(1, {"content": "b"}, "stop")
    before = [choice["finish_reason"] for choice in completed(assembler)["choices"]]
    assembler.end(finish_reasons={"0": "length"}, usage=None, usage_source="none")
    after = [choice["finish_reason"] for choice in completed(assembler)["choices"]]

    assert (before, after) == (["stop", "stop"], ["length", None])


USAGES: dict[str, tuple[Any, str, Any]] = {
    "without total": (
        {"prompt_tokens": 2, "completion_tokens": 3},
        "upstream",
        {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    ),
    "total null": (
        {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": None},
        "upstream_partial",
        {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    ),
    "a total of the upstream's own": (
        {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 354},
        "upstream",
        {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 354},
    ),
    "a summand that is not a number": (
        {"prompt_tokens": 2, "completion_tokens": "3"},
        "upstream",
        {"prompt_tokens": 2, "completion_tokens": "3"},
    ),
    "one summand": ({"completion_tokens": 3}, "upstream", {"completion_tokens": 3}),
    "estimated": ({"completion_tokens": 3}, "estimated", None),
    "unknown": (None, "none", None),
    "unreadable": ([], "upstream", None),
}


@pytest.mark.parametrize(("usage", "source", "expected"), USAGES.values(), ids=USAGES)
def test_assembler_usage_is_the_upstreams_report(usage: Any, source: str, expected: Any) -> None:
    """With the total that the report lacks; an estimate is not a report."""
    assembler = started()
    assembler.add(0, {"content": "a"})
    assembler.end(finish_reasons={}, usage=usage, usage_source=source)

    assert completed(assembler)["usage"] == expected


def test_assembler_reads_the_terminal_event_as_it_is_given_its_members() -> None:
    """`read` is for decoded events, `end` for those that have the members at hand."""
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    read, ended = started(), started()
    for assembler in (read, ended):
        assembler.add(0, {"content": "a"})
    read.read(
        {"type": "usage", "finish_reasons": {"0": "length"}, "usage": usage, "usage_source": "upstream"}
    )
    ended.end(finish_reasons={"0": "length"}, usage=usage, usage_source="upstream")

    assert completed(read) == completed(ended)
    assert completed(read)["usage"] == usage
    assert completed(read)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("created", "second"),
    [
        (1, 1),
        (1.9, 1),
        ((1 << 53) - 1, (1 << 53) - 1),
        (1 << 53, 0),
        (0, 0),
        (0.9, 0),
        (-1, 0),
        (float("nan"), 0),
        (float("inf"), 0),
        (True, 0),
        ("1", 0),
        (None, 0),
    ],
)
def test_second_of_reads_a_number_that_every_json_reader_keeps(created: Any, second: int) -> None:
    """Upstreams may send any value; the job's own time is used instead of 0."""
    assert second_of(created) == second


def test_assembler_counts_the_id_and_the_model_of_the_chunk() -> None:
    """They are bounded with the rest of the completion."""
    for chunk_ in ({"id": "x" * 150}, {"model": "x" * 150}):
        within, beyond = started(limit_bytes=400), started(limit_bytes=200)
        for assembler in (within, beyond):
            assembler.add(0, {"content": "a" * 100}, chunk=chunk_)
        assert (within.omitted, beyond.omitted) == ([], ["completion"])


def test_assembler_job_without_delta_has_no_completion() -> None:
    """An event without a choice is not a delta."""
    assembler = started()
    assembler.add(None, {}, extra={"prompt_filter_results": []}, chunk={"id": "x"})
    assembler.end(finish_reasons={}, usage=None, usage_source="none")

    assert assembler.completion() is None
    assert assembler.omitted == []


def test_assembler_new_attempt_forgets_the_former_one() -> None:
    """A `started` event voids the events before it, and the list of omitted parts."""
    assembler = started(limit_bytes=200)
    assembler.add(0, {"content": "a" * 300})
    assert assembler.omitted == ["completion"]
    assembler.read(STARTED | {"attempt": "a-2", "model": "n", "ts": 5000})
    assembler.read({"type": "delta", "choice": 0, "delta": {"content": "b"}, "finish_reason": None})
    completion = completed(assembler)

    assert assembler.omitted == []
    assert (completion["id"], completion["model"], completion["created"]) == ("chatcmpl-a-2", "n", 5)
    assert completion["choices"][0]["message"]["content"] == "b"


def test_assembler_reader_without_started_or_with_unreadable_members_gets_a_completion() -> None:
    """Events of a later version, and of none, are read as far as they can be."""
    events: list[dict[str, Any]] = [
        {"type": "started", "attempt": 5, "model": None, "ts": "now"},
        {"type": "news"},
        {},
        {"type": "delta", "choice": [0], "delta": {"content": "a"}},
        {"type": "delta", "choice": 0, "delta": None},
        {
            "type": "delta",
            "choice": 0,
            "delta": {"content": "b"},
            "finish_reason": 5,
            "extra": [],
            "chunk": "x",
        },
        {"type": "usage", "finish_reasons": None, "usage": 5, "usage_source": None},
    ]
    completion = completed(read_back(events))

    assert completion["choices"][0]["message"]["content"] == "b"


def test_assembler_completion_may_be_asked_for_while_the_stream_runs() -> None:
    """Each returned completion has the deltas added so far, and does not change afterwards."""
    assembler = started()
    assembler.add(0, {"content": "a", "x": [1]})
    first = completed(assembler)
    assembler.add(0, {"content": "b", "x": [2]})

    assert first["choices"][0]["message"]["content"] == "a"
    assert first["choices"][0]["message"]["x"] == [1]
    assert completed(assembler)["choices"][0]["message"]["x"] == [1, 2]


def test_assembler_raw_values_encode_to_the_same_json() -> None:
    """A caller that only encodes the result does not need them decoded."""
    assembler = started()
    assembler.add(
        0, {"x": [{"y": 1}], "reasoning_details": [detail("a")]}, logprobs={"content": [1]}, extra={"z": 1}
    )
    assembler.add(0, fragment("{}", id="c1", name="f", more=5))

    assert msgspec.json.decode(encode(assembler.completion(msgspec.Raw))) == assembler.completion()


def test_assembler_over_its_limit_drops_logprobs_and_then_everything() -> None:
    """Earlier and later ones are dropped; the choices are still whole without log probabilities."""
    assembler = started(limit_bytes=1_000)
    for _ in range(3):
        assembler.add(0, {"content": "a" * 100}, logprobs={"content": ["b" * 300]})
    first = completed(assembler)["choices"][0]

    assert assembler.omitted == ["logprobs"]
    assert first["logprobs"] is None
    assert first["message"]["content"] == "a" * 300
    assembler.add(0, {}, logprobs={"content": ["b"]})
    assert completed(assembler)["choices"][0]["logprobs"] is None
    for _ in range(8):
        assembler.add(0, {"content": "a" * 100})
    assert assembler.omitted == ["logprobs", "completion"]
    assert assembler.completion() is None
    assert not assembler.omit_next()


def test_assembler_without_logprobs_omits_the_completion_at_once() -> None:
    """Nothing is named that was never there."""
    assembler = started(limit_bytes=1_000)
    assembler.add(0, {"role": "assistant", "content": "a" * 2_000}, logprobs=None)

    assert assembler.omitted == ["completion"]


def test_assembler_caller_may_omit_what_does_not_fit_its_record() -> None:
    """One part at a time, until nothing is left."""
    assembler = started()
    assembler.add(0, {"content": "a"}, logprobs={"content": [1]})

    assert assembler.omit_next()
    assert completed(assembler)["choices"][0]["logprobs"] is None
    assert assembler.omit_next()
    assert (assembler.completion(), assembler.omitted) == (None, ["logprobs", "completion"])
    assert not assembler.omit_next()
    assembler.add(0, {"content": "b"}, logprobs={"content": [1]})
    assert assembler.completion() is None


def test_assembler_job_without_delta_has_nothing_to_omit() -> None:
    """A record that is too large for other reasons does not get smaller."""
    assembler = started()
    assembler.add(None, {}, extra={"prompt_filter_results": [1]})

    assert not assembler.omit_next()
    assert assembler.omitted == []


def test_assembler_members_before_the_first_delta_are_bounded_too() -> None:
    """A chunk without choices may be large."""
    assembler = started(limit_bytes=1_000)
    assembler.add(None, {}, extra={"prompt_filter_results": ["a" * 2_000]})
    assembler.add(0, {"content": "a"})

    assert assembler.omitted == ["completion"]
    assert assembler.completion() is None


MANY = 20_000
PIECE = "a" * 200
FRAGMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda _: {"content": PIECE},
    "text beside a role": lambda _: {"role": "assistant", "content": PIECE},
    "parts": lambda _: {
        "content": [{"type": "text", "text": PIECE}, {"type": "thinking", "thinking": PIECE}]
    },
    "arguments": lambda _: fragment(PIECE, index=0),
    "names": lambda n: fragment(index=0, name=f"{PIECE}{n}"),
    "ids": lambda n: fragment(PIECE, index=0, id=str(n)),
    "calls": lambda n: fragment(PIECE, index=n, id=str(n), name="f"),
    "calls of huge indices": lambda n: fragment(PIECE, index=10**9 + n * 10**6),
    "calls without index": lambda _: fragment(PIECE, name="f"),
    "annotations": lambda n: {"annotations": [f"{PIECE}{n}"]},
    "details": lambda _: {"reasoning_details": [detail(PIECE)]},
    "details of many entries": lambda n: {"reasoning_details": [detail(PIECE, index=n)]},
    "audio": lambda _: {"audio": {"data": PIECE + "YWI=", "transcript": PIECE}},
    "audio cut anywhere": lambda _: {"audio": {"data": PIECE + "a"}},
}


def cpu_s(make: Callable[[int], dict[str, Any]], count: int) -> float:
    """Return the processor time of a completion of `count` fragments, without that of the garbage collector."""
    assembler = started(limit_bytes=1 << 30)
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        for number in range(count):
            assembler.add(0, make(number))
        assert assembler.completion() is not None
        return time.process_time() - began
    finally:
        gc.enable()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", FRAGMENTS.values(), ids=FRAGMENTS)
def test_assembler_fragments_cost_the_same_however_many_came_before(
    make: Callable[[int], dict[str, Any]],
) -> None:
    """Ten times as many take ten times as long, and somewhat more on a busy machine; with quadratic cost a hundred times."""
    few = min(cpu_s(make, MANY // 10) for _ in range(3))

    assert cpu_s(make, MANY) < 40 * few


LIMIT = 100_000
HOARDS: dict[str, tuple[float, Callable[[int], dict[str, Any]]]] = {
    "text": (1.3, lambda _: {"content": "abcd"}),
    "arguments": (1.3, lambda _: fragment("abcd", index=0)),
    "annotations": (1.5, lambda n: {"annotations": [{"n": n}]}),
    "empty arrays": (1.5, lambda _: {"x": [[]]}),
    "members": (14, lambda n: {f"member {n}": 1}),
    "calls": (14, lambda n: fragment("", index=10**9 * n, id="c", name="f")),
    "details": (4, lambda n: {"reasoning_details": [detail("a", index=n)]}),
}


@pytest.mark.parametrize(("factor", "make"), HOARDS.values(), ids=HOARDS)
def test_assembler_keeps_little_more_than_its_limit(
    factor: float, make: Callable[[int], dict[str, Any]]
) -> None:
    """Text and arrays take the memory that they take in the result; many small objects take some times as much."""
    assembler = started(limit_bytes=LIMIT)
    tracemalloc.start()
    try:
        number = 0
        while not assembler.omitted:
            assembler.add(0, make(number))
            number += 1
        peak = tracemalloc.get_traced_memory()[1]
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert peak < factor * LIMIT
    assert kept < LIMIT / 10


def test_assembler_logprobs_are_kept_as_small_as_they_are_written() -> None:
    """As Python objects they would take ten times as much."""
    top = [{"token": "abc", "logprob": -0.25, "bytes": [97, 98, 99]} for _ in range(20)]
    logprobs = {"content": [{"token": "abc", "logprob": -0.25, "bytes": [97, 98, 99], "top_logprobs": top}]}
    assembler = CompletionAssembler(limit_bytes=1_000_000)
    tracemalloc.start()
    try:
        while not assembler.omitted:
            assembler.add(0, {"content": "abc"}, logprobs=logprobs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 1_300_000


def test_assembler_base64_of_pieces_is_the_base64_of_the_whole() -> None:
    """Pieces may be padded each, or be cut anywhere."""
    sound = bytes(range(256)) * 3
    cuts = [0, 1, 2, 7, 100, 101, 333, 768]
    padded = [base64.b64encode(sound[start:end]).decode() for start, end in pairwise(cuts)]
    whole = base64.b64encode(sound).decode()
    torn = [whole[start:end] for start, end in pairwise([*cuts, len(whole)])]

    for pieces in (padded, torn):
        assert of_deltas(*({"audio": {"data": piece}} for piece in pieces))["audio"]["data"] == whole
