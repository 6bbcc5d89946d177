"""The chunk reader: the text of a stream survives every provider's format."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.model import ChunkDelta, Done, StreamError
from streamworker.stream.chunks import ChunkReader
from streamworker.stream.sse import ServerSentEvent
from streamworker.stream.usage import Ledger
from tests.properties.strategies import CHUNK_LIKE, JSON, escaped


class Generated(NamedTuple):
    """A stream of chunks and what was put into it."""

    chunks: list[dict[str, Any]]
    texts: dict[int, str]
    usages: list[Any]
    extras: list[dict[str, Any]]


_TEXT = st.text(
    st.characters(codec="utf-8") | st.sampled_from('🐟🤔👩\u200d🚀\u2028\u0085"\\\n'), max_size=12
)
_NAME = st.sampled_from(["x_a", "x_b", "timings", "stop_reason", "provider", "x_groq_not"])
_UNKNOWN = st.dictionaries(_NAME, JSON.filter(lambda value: value is not None), max_size=2)
_USAGE: st.SearchStrategy[Any] = (
    st.none()
    | st.just({})
    | st.fixed_dictionaries({"completion_tokens": st.integers(1, 9), "cost": st.none()})
)
_HEAD = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["", "c", "d"]),
        "object": st.sampled_from(["", "chat.completion.chunk", "chat.completion.done"]),
        "created": st.just(0),
        "model": st.sampled_from(["", "m"]),
        "system_fingerprint": st.none() | st.just("f"),
        "obfuscation": st.just("xxxx"),
        "error": st.sampled_from([None, {}, ""]),
    },
)
_AROUND = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["assistant", "", None]),
        "reasoning": st.text(max_size=3),
        "tool_calls": st.none(),
    },
)


@st.composite
def cut_texts(draw: st.DrawFn, choices: int) -> list[tuple[int, str]]:
    """Split each choice's text anywhere, also inside of surrogate pairs, and interleave the choices."""
    pieces: dict[int, list[str]] = {}
    for choice in range(choices):
        units = draw(_TEXT).encode("utf-16-le")
        halves = [units[at : at + 2].decode("utf-16-le", "surrogatepass") for at in range(0, len(units), 2)]
        cuts = sorted(draw(st.lists(st.integers(0, len(halves)), max_size=4)))
        edges = [0, *cuts, len(halves)]
        pieces[choice] = ["".join(halves[start:end]) for start, end in pairwise(edges)]
    order = draw(st.permutations([choice for choice, parts in pieces.items() for _ in parts]))
    return [(choice, pieces[choice].pop(0)) for choice in order]


@st.composite
def streams(draw: st.DrawFn) -> Generated:
    """Draw one provider's habits and generate a stream."""
    choices = draw(st.integers(1, 3))
    cuts = draw(cut_texts(choices))
    usage_at = draw(st.sampled_from(["chunk", "choice", "x_groq"]))
    has_index = choices > 1 or draw(st.booleans())
    generated = Generated([], {}, [], [])
    for choice, text in cuts:
        generated.texts[choice] = generated.texts.get(choice, "") + text
        in_chunk, in_choice, usage = draw(_UNKNOWN), draw(_UNKNOWN), draw(_USAGE)
        if draw(st.booleans()):
            in_choice = {name: value for name, value in in_choice.items() if name not in in_chunk}
        if usage_at == "x_groq":
            in_chunk = in_chunk | {"x_groq": {"usage": usage}}
        body = draw(_AROUND) | {"content": text} if text else draw(_AROUND)
        reported = {"index": choice} if has_index else {}
        reported |= {"delta": body} | in_choice | ({"usage": usage} if usage_at == "choice" else {})
        generated.chunks.append(
            draw(_HEAD)
            | {"choices": [reported]}
            | in_chunk
            | ({"usage": usage} if usage_at == "chunk" else {})
        )
        generated.usages.append(usage)
        generated.extras.append(in_chunk | in_choice)
    generated.chunks.append(
        {"choices": [{"index": choice, "finish_reason": "stop"} for choice in range(choices)]}
    )
    return generated


def read_all(generated: Generated, ledger: Ledger) -> list[list[ChunkDelta]]:
    reader = ChunkReader(ledger)
    reported = []
    for chunk in generated.chunks:
        item = reader.read(ServerSentEvent("message", escaped(chunk)))
        assert all(type(item) is ChunkDelta for item in item), item
        reported.append([item for item in item if isinstance(item, ChunkDelta)])
    assert reader.is_finished
    return reported


@settings(max_examples=100)  # its examples are large
@given(streams())
def test_reader_content_of_each_choice_adds_up_to_what_was_said(generated: Generated) -> None:
    """Byte for byte, in any format, for any chunking."""
    joined: dict[int | None, str] = {}
    for item in (item for items in read_all(generated, Ledger()) for item in items):
        joined[item.choice] = joined.get(item.choice, "") + (item.delta.get("content") or "")
    joined.pop(None, None)
    clean = {
        choice: text.encode("utf-16", "surrogatepass").decode("utf-16")
        for choice, text in generated.texts.items()
    }

    assert joined == clean


@settings(max_examples=100)  # its examples are large
@given(streams())
def test_reader_unknown_members_all_end_up_in_extra(generated: Generated) -> None:
    """No unknown member of chunk or choice is lost, and none is invented."""
    for reported, expected in zip(read_all(generated, Ledger()), [*generated.extras, {}], strict=True):
        joined: dict[str, Any] = {}
        for item in reported:
            joined |= item.extra or {}
        assert joined == expected


@settings(max_examples=100)  # its examples are large
@given(streams())
def test_reader_usage_is_the_last_report_and_never_a_sum(generated: Generated) -> None:
    """Empty reports erase nothing; without a report there is none."""
    ledger = Ledger()
    read_all(generated, ledger)
    reports = [usage for usage in generated.usages if usage]

    assert ledger.settle(completed=True)[0] == (reports[-1] if reports else None)


@settings(max_examples=100)  # its examples are large
@given(streams())
def test_reader_reports_the_chunks_own_members_when_they_change(generated: Generated) -> None:
    """The reported members together give those of every chunk."""
    names = ("id", "object", "created", "model", "system_fingerprint", "service_tier")
    known: dict[str, Any] = {"never": "reported"}
    for reported, chunk in zip(read_all(generated, Ledger()), generated.chunks, strict=True):
        for item in reported:
            known = known if item.chunk is msgspec.UNSET else item.chunk
        assert known == {name: chunk[name] for name in names if name in chunk}


@given(st.lists(st.tuples(st.sampled_from(["message", "error", "x"]), CHUNK_LIKE), max_size=6))
def test_reader_any_json_gives_items_and_never_raises(events: list[tuple[str, Any]]) -> None:
    """Deltas, the end, or an error; all of it can be encoded as UTF-8."""
    ledger = Ledger()
    reader = ChunkReader(ledger)
    for event_type, payload in events:
        for item in reader.read(ServerSentEvent(event_type, escaped(payload))):
            assert isinstance(item, (ChunkDelta, Done, StreamError))
            assert json.loads(msgspec.json.encode(item)) == msgspec.to_builtins(item)
            if isinstance(item, ChunkDelta):
                ledger.count_delta(item.delta)
    assert msgspec.json.encode([ledger.observed, ledger.settle(completed=False), reader.finish_reasons])


@given(st.binary(max_size=60), st.sampled_from(["message", "error"]))
def test_reader_any_bytes_give_items_and_never_raise(payload: bytes, event_type: str) -> None:
    """A payload that is not JSON is an error, a sentinel, or nothing."""
    for item in ChunkReader(Ledger()).read(ServerSentEvent(event_type, payload)):
        assert isinstance(item, (ChunkDelta, Done, StreamError))
