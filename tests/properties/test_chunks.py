"""The fast and the careful path of the chunk reader give the same result."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from streamworker.stream.chunks import ChunkReader
from streamworker.stream.sse import ServerSentEvent
from streamworker.stream.usage import Ledger
from tests.properties.strategies import CHUNK_LIKE, JSON, escaped

VALUES = st.none() | st.sampled_from(["", "a", "stop", "error", 0, 1, True, 10**30, 0.5, {}, {"a": []}])
NAMES = st.sampled_from(["a", "b", None])
USUAL_CHOICES = st.fixed_dictionaries(
    {
        "delta": st.dictionaries(
            st.sampled_from(["content", "role"]),
            st.sampled_from(["a", "🐟", "\ud83d", "\udc1f", None]),
            max_size=2,
        )
    },
    optional={
        "index": st.integers(0, 1),
        "finish_reason": st.sampled_from([None, "stop", ""]),
        "logprobs": st.none() | JSON,
    },
)
USUAL_CHUNKS = st.fixed_dictionaries(
    {"choices": st.lists(USUAL_CHOICES, max_size=2)},
    optional={
        "id": NAMES,
        "object": st.sampled_from(["chat.completion.chunk", "chat.completion.chunk", "error", ""]),
        "model": NAMES,
        "usage": st.none() | st.just({}) | st.just({"completion_tokens": 2}),
        "error": st.none(),
        "obfuscation": NAMES,
    },
)


def oddity(names: str) -> st.SearchStrategy[dict[str, Any]]:
    """At most one unusual member."""
    return st.dictionaries(st.sampled_from(names.split()), VALUES, max_size=1)


def chunk_of(parts: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Add the unusual members; they are rare enough that the rest stays usual."""
    chunk, odd, odd_choice = parts
    choices = [{**choice, **odd_choice} for choice in chunk["choices"]]
    return {**chunk, "choices": choices, **odd}


CHUNKS = st.lists(
    USUAL_CHUNKS
    | st.tuples(
        USUAL_CHUNKS,
        oddity("own error id created choices usage object"),
        oddity("own index delta finish_reason usage"),
    ).map(chunk_of)
    | CHUNK_LIKE,
    min_size=2,
    max_size=5,
).map(lambda chunks: [escaped(chunk) for chunk in chunks])


USUAL = b'{"id":"a","choices":[{"delta":{"content":"a"}}]}'


class CarefulReader(ChunkReader):
    """A reader without the fast path."""

    def read(self, event: ServerSentEvent) -> Any:
        return self._read_carefully(event)


def result(reader: ChunkReader, ledger: Ledger, chunks: list[bytes], event_type: str) -> Any:
    items = [list(reader.read(ServerSentEvent(event_type, chunk))) for chunk in chunks]
    return msgspec.json.encode(items), reader.finish_reasons, ledger.observed, ledger.settle(completed=False)


@example([USUAL, b'{"id":"b","own":1,"choices":[{"delta":{}}]}', USUAL], "message")
@example([b'{"choices":[{"delta":{"content":"\\ud83d"}}]}', USUAL], "message")
@given(CHUNKS, st.sampled_from(["message", "message", "error", "x"]))
def test_reader_fast_path_gives_the_result_of_the_careful_path(chunks: list[bytes], event_type: str) -> None:
    """Items, finish reasons and counts do not depend on the path."""
    short, long = Ledger(), Ledger()
    assert result(ChunkReader(short), short, chunks, event_type) == result(
        CarefulReader(long), long, chunks, event_type
    )
