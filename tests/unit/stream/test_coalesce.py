"""Which deltas may become one."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.model import ChunkDelta
from streamworker.stream.coalesce import MAX_HELD_CHARS, Coalescer
from tests.streams import NOW


def text(text: str = "a", *, member: str = "content", choice: int = 0) -> ChunkDelta:
    return ChunkDelta(choice, {member: text})


def ownership(news: ChunkDelta) -> Coalescer:
    coalescer = Coalescer()
    assert coalescer.take(news, NOW)
    return coalescer


@pytest.mark.parametrize("member", ["content", "reasoning_content", "reasoning"])
def test_coalescer_text_that_follows_text_becomes_one_delta_of_the_first_ones_time(member: str) -> None:
    """Of the same choice and member, empty text too."""
    coalescer = ownership(text("a", member=member, choice=2))
    assert coalescer.take(text("", member=member, choice=2), NOW + 1)
    assert coalescer.take(text("🐟", member=member, choice=2), NOW + 2)

    assert coalescer.held is not None
    assert coalescer.held.news == ChunkDelta(2, {member: "a🐟"})
    assert (coalescer.held.since_ms, coalescer.held.parts) == (NOW, 3)


OTHERS: dict[str, ChunkDelta] = {
    "no member": ChunkDelta(0, {}),
    "two members": ChunkDelta(0, {"role": "assistant", "content": "a"}),
    "a role": ChunkDelta(0, {"role": "assistant"}),
    "a refusal": ChunkDelta(0, {"refusal": "no"}),
    "a tool call": ChunkDelta(0, {"tool_calls": [{"index": 0}]}),
    "no text": ChunkDelta(0, {"content": None}),
    "text in parts": ChunkDelta(0, {"content": [{"type": "text", "text": "a"}]}),
    "a finish reason": ChunkDelta(0, {"content": "a"}, "stop"),
    "logprobs": ChunkDelta(0, {"content": "a"}, logprobs={"content": []}),
    "the chunk's members": ChunkDelta(0, {"content": "a"}, chunk={"id": "c"}),
    "unknown members": ChunkDelta(0, {"content": "a"}, extra={"x": 1}),
    "no choice": ChunkDelta(None, {"content": "a"}),
    "much text": text("a" * (MAX_HELD_CHARS + 1)),
}


@pytest.mark.parametrize("news", OTHERS.values(), ids=OTHERS)
def test_coalescer_whatever_is_more_than_text_is_not_held_nor_merged(news: ChunkDelta) -> None:
    """It changes nothing about what is held."""
    assert not Coalescer().take(news, NOW)
    coalescer = ownership(text("b"))
    before = coalescer.held
    assert not coalescer.take(news, NOW)
    assert coalescer.held is before
    assert before is not None
    assert before.text == "b"


@pytest.mark.parametrize("other", [{"choice": 1}, {"member": "reasoning"}, {"text": "a" * MAX_HELD_CHARS}])
def test_coalescer_text_of_another_kind_begins_a_hold_of_its_own(other: dict[str, Any]) -> None:
    """Another choice, another member, more than fits: once what was held has left."""
    news = text(**other)
    coalescer = ownership(text())
    assert not coalescer.take(news, NOW)
    coalescer.drop()
    assert coalescer.take(news, NOW + 5)
    assert coalescer.held is not None
    assert (coalescer.held.news, coalescer.held.since_ms) == (news, NOW + 5)


def test_coalescer_holds_no_more_than_its_bound() -> None:
    """Text that just fits does, one character more does not."""
    coalescer = ownership(text("a" * (MAX_HELD_CHARS - 1)))
    assert coalescer.take(text("b"), NOW)
    assert not coalescer.take(text("c"), NOW)
