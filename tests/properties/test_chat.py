"""The chunk reader's short way and its long one mean the same."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from streamworker.core.chat import ChunkReader
from streamworker.core.sse import ServerSentEvent
from streamworker.core.usage import Ledger
from tests.properties.strategies import CHUNK_LIKE, JSON, escaped

VALUES = st.none() | st.sampled_from(
    ["", "a", "chat.completion.chunk", "error", "stop", 0, 1, True, 10**30, 0.5]
)
CHOICES = st.fixed_dictionaries(
    {"delta": st.dictionaries(st.sampled_from(["content", "role", "x"]), CHUNK_LIKE | st.text(), max_size=2)},
    optional={
        "index": st.integers(-1, 200) | VALUES,
        "finish_reason": VALUES,
        "logprobs": st.none() | JSON,
        "usage": st.none() | st.just({"completion_tokens": 1}),
    },
)
MEMBERS = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation", "own")
USAGES: st.SearchStrategy[Any] = st.none() | st.just({}) | st.just({"completion_tokens": 2})
NEARLY_USUAL = st.fixed_dictionaries(
    {"choices": st.lists(CHOICES | st.just({}), max_size=3)},
    optional={**dict.fromkeys(MEMBERS, VALUES), "usage": USAGES, "error": st.none() | st.just("e")},
)
CHUNKS = st.lists((NEARLY_USUAL | CHUNK_LIKE).map(escaped), max_size=6)


class Closely(ChunkReader):
    """Knows no short way."""

    def read(self, event: ServerSentEvent) -> Any:
        return self._read_closely(event)


def told(reader: ChunkReader, ledger: Ledger, chunks: list[bytes], event_type: str) -> Any:
    news = [list(reader.read(ServerSentEvent(event_type, chunk))) for chunk in chunks]
    return msgspec.json.encode(news), reader.finish_reasons, ledger.observed, ledger.settle(completed=False)


@given(CHUNKS, st.sampled_from(["message", "message", "error", "x"]))
def test_chat_usual_chunk_is_read_as_any_other(chunks: list[bytes], event_type: str) -> None:
    """News, finish reasons and account do not depend on the way."""
    short, long = Ledger(), Ledger()
    assert told(ChunkReader(short), short, chunks, event_type) == told(
        Closely(long), long, chunks, event_type
    )
