"""A merged stream has the same content in the same order: only neighbouring texts are joined."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import ChunkDelta
from streamworker.practice.shapes import SHAPES
from streamworker.stream.coalesce import Coalescer
from tests.completions import started
from tests.properties.strategies import CHAT_STREAMS, CUTS, pieces_of
from tests.properties.test_coalesce import run
from tests.properties.test_completion import answer_to, body_of, models
from tests.streams import NOW, chunk, data, ended, listening, play

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


MAX_BYTES = 120
_TEXTS = st.sampled_from(["", "a", "bc", "🐟", "d" * (MAX_BYTES // 2), "e" * (MAX_BYTES + 1)])
_CALLS = st.builds(
    lambda members, name, body, text: {
        "tool_calls": [members | {body: name | {"input" if body == "custom" else "arguments": text}}]
    },
    st.sampled_from(
        [{}, {"index": 0}, {"index": 0}, {"index": 1}, {"index": 0, "id": "c1"}, {"id": "c2"}, {"id": ""}]
    ),
    st.sampled_from([{}, {}, {"name": "f"}, {"name": ""}, {"name": "g"}]),
    st.sampled_from(["function", "function", "function", "custom"]),
    _TEXTS,
)
_DELTAS = st.one_of(
    st.builds(lambda name, text: {name: text}, st.sampled_from(["content", "reasoning", "refusal"]), _TEXTS),
    st.builds(
        lambda more, text: more | {"content": text},
        st.sampled_from([{"role": "assistant"}, {"x": 1}]),
        _TEXTS,
    ),
    st.builds(lambda one, other: {"reasoning_content": one, "content": other}, _TEXTS, _TEXTS),
    _CALLS,
    st.lists(_CALLS, min_size=2, max_size=2).map(
        lambda told: {"tool_calls": [*told[0]["tool_calls"], *told[1]["tool_calls"]]}
    ),
    st.sampled_from(
        [{}, {"content": None, "tool_calls": None}, {"images": [1]}, {"content": [{"text": "a"}]}]
    ),
)
_RUNS = st.lists(_DELTAS | st.sampled_from([{"content": "a"}] * 3), max_size=4)
_CHOICES = st.builds(
    lambda delta, index, more: {"index": index, "delta": delta} | more,
    _DELTAS,
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(
        [{}] * 8
        + [{"finish_reason": "stop"}, {"logprobs": {"content": [1]}}, {"p": "P"}, {"p": "P"}, {"p": [1]}]
    ),
)
_CHUNKS = _DELTAS.map(chunk) | st.builds(
    lambda choices, more: chunk(choices=choices, **more),
    st.lists(_CHOICES, min_size=1, max_size=2),
    st.sampled_from([{}] * 8 + [{"id": "other"}, {"provider": "P"}]),
)
_ENDS = st.sampled_from([b"", b"[DONE]", b'{"error":{"message":"m"}}', b"not json"])
STREAMS = st.builds(
    lambda runs, end: data(*chain(*([one] * times for one, times in runs)), end),
    st.lists(st.tuples(_CHUNKS, st.integers(1, 3)), max_size=10),
    _ENDS,
)


def merged(news: Iterable[ChunkDelta], coalescer: Coalescer) -> Iterator[ChunkDelta]:
    """Run deltas through a coalescer as an attempt does."""
    for one in news:
        if coalescer.take(one, NOW):
            continue
        if coalescer.held is not None:
            yield coalescer.held.delta
            coalescer.drop()
        if not coalescer.take(one, NOW):
            yield one
    if coalescer.held is not None:
        yield coalescer.held.delta


def deltas_of(stream: bytes) -> list[ChunkDelta]:
    """Return the deltas of a stream."""
    return [
        ChunkDelta(event.choice, event.delta, event.finish_reason, event.logprobs, event.chunk, event.extra)
        for event in play(stream).deltas
    ]


def completion_of(news: Iterable[ChunkDelta]) -> dict[str, Any] | None:
    """Return what deltas add up to."""
    assembler = started()
    for one in news:
        assembler.add(one.choice, one.delta, one.finish_reason, one.logprobs, one.chunk, one.extra)
    return assembler.completion()


_TEXT_MEMBERS = {"content", "reasoning_content", "reasoning", "refusal", "arguments", "input"}


def split(value: Any) -> tuple[Any, list[str]]:
    """Take every text out of a value; return the rest, and the texts."""
    texts: list[str] = []

    def blank(value: Any) -> Any:
        if isinstance(value, list):
            return [blank(item) for item in value]
        if not isinstance(value, dict):
            return value
        told = {}
        for name in sorted(value):
            is_text = name in _TEXT_MEMBERS and isinstance(value[name], str)
            told[name] = "" if is_text else blank(value[name])
            if is_text:
                texts.append(value[name])
        return told

    return blank(value), texts


def joined(news: Iterable[Any]) -> list[tuple[Any, list[str]]]:
    """Join all neighbours that differ in their texts alone; merging must not change the result."""
    told: list[tuple[Any, list[str]]] = []
    for one in news:
        members = {
            name: value for name, value in msgspec.to_builtins(one).items() if name not in {"seq", "ts"}
        }
        rest, texts = split(members)
        if told and told[-1][0] == rest:
            told[-1] = (rest, [former + text for former, text in zip(told[-1][1], texts, strict=True)])
        else:
            told.append((rest, texts))
    return told


_PRACTICE = models().map(lambda model: body_of(answer_to(model)))


@given(STREAMS | CHAT_STREAMS | _PRACTICE, st.sampled_from([40, MAX_BYTES, 1 << 16]))
def test_merged_deltas_add_up_to_the_same_completion(stream: bytes, max_bytes: int) -> None:
    """A reader that assembles them gets the same result, and no delta is moved or lost."""
    deltas = deltas_of(stream)
    few = list(merged(deltas, Coalescer(merged=True, max_bytes=max_bytes)))

    assert completion_of(few) == completion_of(deltas)
    assert joined(few) == joined(deltas)


@given(STREAMS | _PRACTICE)
def test_merged_delta_of_several_fits_the_bound(stream: bytes) -> None:
    """The members beside the text count too."""
    deltas = deltas_of(stream)
    for one in merged(deltas, Coalescer(merged=True, max_bytes=MAX_BYTES)):
        if one not in deltas:
            _, texts = split(one.delta)
            assert sum(len(text.encode()) for text in texts) <= MAX_BYTES


NOT_MERGED = {
    "groq": "every chunk has another id, which is an event's news",
    "xai": "every chunk has another id, which is an event's news",
    "perplexity": "every chunk repeats an array beside the delta, and an array may add to the one before",
    "together": "every choice repeats its text beside the delta",
    "mistral": "every second text is a list of parts",
    "openrouter": "reasoning is repeated in `reasoning_details`",
    "litellm": "reasoning comes under two names",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_practice_stream_is_a_few_deltas(shape: str) -> None:
    """Sixty deltas of text and two calls become twelve at most, but for upstreams that repeat other things with them."""
    stream = body_of(answer_to(f"practice?shape={shape}&deltas=40&reasoning=20&tool_calls=2"))
    count = len(list(merged(deltas_of(stream), Coalescer(merged=True))))

    assert (count > 12) == (shape in NOT_MERGED)


@given(STREAMS | CHAT_STREAMS, CUTS, st.lists(st.sampled_from(range(3)), min_size=1, max_size=8))
def test_merged_attempt_publishes_the_stream_with_some_texts_joined(
    stream: bytes, cuts: list[int], moves: list[int]
) -> None:
    """Events are numbered without a gap; the first delta, the end and the counts are as without merging."""
    pieces = pieces_of(stream, cuts)
    plain = listening()
    merging = listening(coalescer=Coalescer(merged=True, max_bytes=MAX_BYTES))
    deltas, few = run(plain, pieces, [0]), run(merging, pieces, moves)
    end, expected = ended(merging), ended(plain)

    assert [event.seq for event in few] == list(range(1, len(few) + 1))
    assert joined(few) == joined(deltas)
    assert few[:1] == deltas[:1]
    assert (end.seq, merging.held_deltas) == (len(few) + 1, 0)
    assert (end.status, end.error, end.observed) == (expected.status, expected.error, expected.observed)
    if end.usage_source != "estimated":  # a name that is repeated with every fragment was generated once
        assert (end.usage, end.usage_source) == (expected.usage, expected.usage_source)
