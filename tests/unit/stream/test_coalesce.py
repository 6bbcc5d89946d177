"""Which deltas may become one, live and merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamworker.model import ChunkDelta
from streamworker.stream.coalesce import MAX_LIVE_BYTES, MAX_MERGED_BYTES, Coalescer
from tests.streams import NOW

if TYPE_CHECKING:
    from collections.abc import Callable


def text(text: str = "a", *, member: str = "content", choice: int = 0) -> ChunkDelta:
    """Return a delta that is nothing but text."""
    return ChunkDelta(choice, {member: text})


def call(arguments: str = "a", *, body: dict[str, Any] | None = None, **members: Any) -> ChunkDelta:
    """Return a delta that is one fragment of a tool call."""
    fragment = {"index": 0, **members, "function": {**(body or {}), "arguments": arguments}}
    return ChunkDelta(0, {"tool_calls": [fragment]})


def custom(text: str = "a") -> ChunkDelta:
    """Return a delta that is one fragment of a custom tool's input."""
    return ChunkDelta(0, {"tool_calls": [{"index": 0, "custom": {"input": text}}]})


def holding(delta: ChunkDelta, **options: Any) -> Coalescer:
    """Return a coalescer that holds a delta."""
    coalescer = Coalescer(**options)
    assert coalescer.take(delta, NOW)
    return coalescer


def held_delta(coalescer: Coalescer) -> ChunkDelta:
    """Return what is held, as one delta."""
    assert coalescer.held is not None
    return coalescer.held.delta


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("member", ["content", "reasoning_content", "reasoning"])
def test_coalescer_text_that_follows_text_becomes_one_delta_of_the_first_ones_time(
    member: str, *, merged: bool
) -> None:
    """Of the same choice and member, empty text too."""
    coalescer = holding(text("a", member=member, choice=2), merged=merged)
    assert coalescer.take(text("", member=member, choice=2), NOW + 1)
    assert coalescer.take(text("🐟", member=member, choice=2), NOW + 2)

    assert held_delta(coalescer) == ChunkDelta(2, {member: "a🐟"})
    assert coalescer.held is not None
    assert (coalescer.held.since_ms, coalescer.held.parts) == (NOW, 3)


NEVER: dict[str, ChunkDelta] = {
    "no member": ChunkDelta(0, {}),
    "a role alone": ChunkDelta(0, {"role": "assistant"}),
    "nulls alone": ChunkDelta(0, {"content": None, "tool_calls": None}),
    "text in parts": ChunkDelta(0, {"content": [{"type": "text", "text": "a"}]}),
    "a finish reason": ChunkDelta(0, {"content": "a"}, "stop"),
    "logprobs": ChunkDelta(0, {"content": "a"}, logprobs={"content": []}),
    "the chunk's members": ChunkDelta(0, {"content": "a"}, chunk={"id": "c"}),
    "an array beside the delta": ChunkDelta(0, {"content": "a"}, extra={"x": [1]}),
    "no choice": ChunkDelta(None, {"content": "a"}),
    "another member": ChunkDelta(0, {"content": "a", "x": 1}),
    "two texts": ChunkDelta(0, {"reasoning": "a", "content": "b"}),
    "the same text twice": ChunkDelta(0, {"reasoning": "a", "reasoning_content": "a"}),
    "text and a call": ChunkDelta(0, {"content": "a", **call().delta}),
    "a call and text": ChunkDelta(0, {**call().delta, "content": "a"}),
    "no fragments": ChunkDelta(0, {"tool_calls": []}),
    "two fragments": ChunkDelta(0, {"tool_calls": call().delta["tool_calls"] * 2}),
    "a fragment that is not an object": ChunkDelta(0, {"tool_calls": [5]}),
    "a fragment without text": ChunkDelta(0, {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}),
    "a fragment with another member": call(extra_content={}),
    "a fragment with an unusable index": call(index=0.5),
    "a fragment with a name and no id": call(body={"name": "f"}),
    "a body with another member": call(body={"strict": True}),
    "audio": ChunkDelta(0, {"audio": {"data": "YQ=="}}),
    "much text": text("a" * (MAX_MERGED_BYTES + 1)),
    "arguments with a name, which may be appended": call("a", id="c1", body={"name": "f"}),
    "much beside a text": ChunkDelta(0, {"content": "a"}, extra={"x": "a" * MAX_MERGED_BYTES}),
}
MERGED_ONLY: dict[str, Callable[[str], ChunkDelta]] = {
    "a refusal": lambda said: text(said, member="refusal"),
    "text beside a role": lambda said: ChunkDelta(0, {"role": "assistant", "content": said}),
    "text beside nulls": lambda said: ChunkDelta(0, {"role": None, "content": said, "tool_calls": None}),
    "text beside an empty one": lambda said: ChunkDelta(0, {"content": "", "reasoning": said}),
    "text beside one that is empty later": lambda said: ChunkDelta(0, {"reasoning": said, "content": ""}),
    "text beside no calls": lambda said: ChunkDelta(0, {"tool_calls": [], "content": said}),
    "equal members beside the delta": lambda said: ChunkDelta(0, {"content": said}, extra={"provider": "P"}),
    "arguments": call,
    "arguments with an id": lambda said: call(said, id="c1", type="function"),
    "arguments with an empty id": lambda said: call(said, id=""),
    "arguments beside a role": lambda said: ChunkDelta(
        0, {"role": "assistant", "content": None, **call(said).delta}
    ),
    "a custom tool's input": custom,
}


@pytest.mark.parametrize(
    ("delta", "merged"),
    [
        *((delta, merged) for delta in NEVER.values() for merged in (False, True)),
        *((make("a"), False) for make in MERGED_ONLY.values()),
    ],
    ids=[*(f"{name}-{how}" for name in NEVER for how in ("live", "merged")), *MERGED_ONLY],
)
def test_coalescer_delta_with_more_than_one_text_is_not_held(delta: ChunkDelta, *, merged: bool) -> None:
    """The held delta stays as it is."""
    assert not Coalescer(merged=merged).take(delta, NOW)
    coalescer = holding(text("b"), merged=merged)
    assert not coalescer.take(delta, NOW)
    assert held_delta(coalescer) == text("b")


@pytest.mark.parametrize("make", MERGED_ONLY.values(), ids=MERGED_ONLY)
def test_coalescer_merged_delta_is_the_repeated_one_with_both_texts(
    make: Callable[[str], ChunkDelta],
) -> None:
    """Everything but the text stands once in the merged delta."""
    coalescer = holding(make("a"), merged=True)
    assert held_delta(coalescer) == make("a")
    assert coalescer.take(make("b"), NOW + 1)
    assert held_delta(coalescer) == make("ab")


OTHERS: dict[str, tuple[ChunkDelta, ChunkDelta]] = {
    "another choice": (text(), text(choice=1)),
    "another member": (text(), text(member="reasoning")),
    "a call after text": (text(), call()),
    "text after a call": (call(), text()),
    "another index": (call(), call(index=1)),
    "another id": (call(id="c1"), call(id="c2")),
    "an id that is new": (call(), call(id="c1")),
    "another kind of call": (call(), custom()),
    "a role that is new": (text(), ChunkDelta(0, {"role": "assistant", "content": "a"})),
    "other members beside the delta": (
        ChunkDelta(0, {"content": "a"}, extra={"x": 1}),
        ChunkDelta(0, {"content": "a"}, extra={"x": 2}),
    ),
    "no members beside the delta": (ChunkDelta(0, {"content": "a"}, extra={"x": 1}), text()),
}


@pytest.mark.parametrize(("first", "second"), OTHERS.values(), ids=OTHERS)
def test_coalescer_delta_of_another_kind_begins_a_hold_of_its_own(
    first: ChunkDelta, second: ChunkDelta
) -> None:
    """Once what was held has been published."""
    coalescer = holding(first, merged=True)
    assert not coalescer.take(second, NOW)
    coalescer.drop()
    assert coalescer.take(second, NOW + 5)
    assert coalescer.held is not None
    assert (coalescer.held.delta, coalescer.held.since_ms) == (second, NOW + 5)


def test_coalescer_holds_no_more_than_its_bound() -> None:
    """Live, text that just fits does, one byte more does not; characters count by their bytes."""
    coalescer = holding(text("a" * (MAX_LIVE_BYTES - 4)))
    assert coalescer.take(text("🐟"), NOW)
    assert not coalescer.take(text("c"), NOW)


def test_coalescer_merged_hold_counts_what_stands_beside_its_text() -> None:
    """The record that it becomes has to fit its limit too."""
    delta = ChunkDelta(0, {"role": "assistant", "content": "a" * 100}, extra={"x": "b" * 100})
    beside = len('[[{"role":"assistant"}],{"x":""}]') + 100

    assert not Coalescer(merged=True, max_bytes=beside + 99).take(delta, NOW)
    coalescer = holding(delta, merged=True, max_bytes=beside + 200)
    assert coalescer.take(delta, NOW)
    assert not coalescer.take(delta, NOW)


@pytest.mark.timeout(10)
def test_coalescer_many_small_parts_take_linear_time() -> None:
    """A hold of several megabytes in parts of one byte would take minutes if each part copied it."""
    coalescer = Coalescer(merged=True, max_bytes=1 << 30)
    for _ in range(1_000_000):
        coalescer.take(text("a"), NOW)
    assert held_delta(coalescer).delta["content"] == "a" * 1_000_000


def test_coalescer_half_of_a_character_is_kept_as_it_is() -> None:
    """The encoder of the event decides what becomes of it."""
    coalescer = holding(text("\ud83d"))
    assert coalescer.take(text("\udc1f"), NOW)
    assert held_delta(coalescer).delta == {"content": "\ud83d\udc1f"}
