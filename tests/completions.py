"""Whole completions for tests: assembled from a stream, from its events, or from deltas given one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.stream.completion import CompletionAssembler
from tests.streams import NOW, Played, data, play

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LIMIT = 1_000_000
STARTED = {"type": "started", "attempt": "a-1", "model": "m", "ts": NOW}


def started(limit_bytes: int = LIMIT) -> CompletionAssembler:
    """Return an assembler whose attempt has begun, with the ids that `tests.streams` gives."""
    assembler = CompletionAssembler(limit_bytes=limit_bytes)
    assembler.start(attempt="a-1", model="m", started_ms=NOW)
    return assembler


def fed_live(played: Played, limit_bytes: int = LIMIT) -> CompletionAssembler:
    """Feed the members of delta events, as the worker does."""
    assembler = started(limit_bytes)
    for event in played.deltas:
        assembler.add(
            event.choice, event.delta, event.finish_reason, event.logprobs, event.chunk, event.extra
        )
    end = played.end
    assembler.end(finish_reasons=end.finish_reasons, usage=end.usage, usage_source=end.usage_source)
    return assembler


def events_of(played: Played) -> list[dict[str, Any]]:
    """Return an attempt's events as a reader of the topic decodes them."""
    return [
        STARTED,
        *(msgspec.json.decode(msgspec.json.encode(event)) for event in (*played.deltas, played.end)),
    ]


def read_back(events: Iterable[dict[str, Any]], limit_bytes: int = LIMIT) -> CompletionAssembler:
    """Feed decoded events, as a reader of the topic does."""
    assembler = CompletionAssembler(limit_bytes=limit_bytes)
    for event in events:
        assembler.read(event)
    return assembler


def completed(assembler: CompletionAssembler) -> dict[str, Any]:
    """Return the completion, which there has to be."""
    completion = assembler.completion()
    assert completion is not None
    return completion


def of_deltas(*deltas: dict[str, Any]) -> dict[str, Any]:
    """Return the message that deltas of one choice add up to."""
    assembler = started()
    for delta in deltas:
        assembler.add(0, delta)
    message: dict[str, Any] = completed(assembler)["choices"][0]["message"]
    return message


def of_chunks(*chunks: dict[str, Any] | bytes) -> dict[str, Any]:
    """Return the completion that a stream of chunks adds up to."""
    return completed(fed_live(play(data(*chunks))))


def of_stream(pieces: bytes | Sequence[bytes]) -> dict[str, Any]:
    """Return the completion that a response body adds up to; both ways of feeding have to agree on it."""
    played = play(pieces)
    live = fed_live(played)
    assert read_back(events_of(played)).completion() == live.completion()
    return completed(live)
