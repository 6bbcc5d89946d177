"""Strategies: bytes like event streams, JSON like chunks, and chunkings."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from tests.streams import cut_at

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
"""Any JSON value whose strings are clean Unicode."""

_WORDS = """
    id object created model choices usage error obfuscation index delta finish_reason logprobs content role
    reasoning_content reasoning reasoning_details tool_calls function_call function custom name arguments input
    refusal text thinking summary x_groq message type code error_type detail extra
"""
_NAMES = st.sampled_from(_WORDS.split())
CHUNK_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 600)
    | st.sampled_from(["", "a", "stop", "error", "500", "None", "\ud83d", "\udc1f", "🐟", 10**30, 0.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=5),
    max_leaves=25,
)
"""JSON made of a chunk's own words in places where they do not belong; strings may hold lone surrogates."""

_CHUNKS = [
    b'{"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}',
    b'{"id":"c","choices":[{"index":0,"delta":{"content":"one "}}]}',
    '{"id":"c","choices":[{"index":0,"delta":{"content":"🐟\u2028"}}]}'.encode(),
    b'{"id":"c","choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}',
    b'{"id":"c","choices":[{"index":0,"delta":{"content":"\\udc1f"}}]}',
    b'{"id":"d","choices":[{"index":1,"delta":{"content":"two"}},{"index":0,"delta":{}}]}',
    b'{"choices":[{"delta":{"reasoning":"hm"},"logprobs":{}}],"usage":{"completion_tokens":1}}',
    b'{"choices":[{"delta":{},"finish_reason":"stop"}]}',
    b'{"choices":[{"index":1,"finish_reason":"length"}],"usage":{"completion_tokens":9}}',
    b'{"choices":[],"prompt_filter_results":[]}',
    b'{"choices":[],"usage":{"completion_tokens":5}}',
    b'{"choices":[{"delta":{"content":"e"}}],"error":{"message":"m"}}',
    b'{"type":"ping"}',
    b"null",
    b"",
]
_ENDS = [
    b"[DONE]",
    b'{"error":{"message":"m","code":500}}',
    b'{"choices":[{"delta":5}]}',
    b"not json",
    b'{"object":"error"}',
]
_LINE_ENDS = st.sampled_from([b"\n\n", b"\n", b"\r\n\r\n", b"\r\r", b"\r\n"])

_FRAGMENTS = st.sampled_from(
    [
        b"data",
        b"data:",
        b"data: ",
        b"event",
        b"event: x",
        b"id: 1",
        b"id: \x00",
        b"retry: 5",
        b"retry: +5",
        b"error: {}",
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\r\r",
        b":",
        b": c",
        b" ",
        b"\t",
        b"\xef\xbb\xbf",
        b"\xef",
        b"\xbb\xbf",
        b"a",
        b"[DONE]",
        b"{",
        b"}",
        b"{}",
        b'{"a":"',
        b'"',
        b"\\",
        b'\\"',
        b"[",
        b"]",
        b",",
        b"1",
        "🐟".encode(),
        "🐟".encode()[:2],
        "\u2028\x85".encode(),
        b"\xff",
        b"\x00",
        b"\x0b\x0c\x1c",
    ]
)
_BROKEN = st.lists(_FRAGMENTS, max_size=30).map(b"".join)
_LINES = st.tuples(
    st.sampled_from([b"data: ", b"data:", b"event: error\ndata: "]), st.sampled_from(_CHUNKS), _LINE_ENDS
)
_CHUNK_STREAMS = st.tuples(
    st.lists(_LINES.map(b"".join) | st.just(b": ping\n\n"), max_size=10).map(b"".join),
    st.sampled_from([b"", *(b"data: " + end for end in _ENDS)]),
    st.sampled_from(
        [b"", b"\n", b"\n\n", b"\r\n\r\n", b'\n\ndata: {"choices":[{"delta":{"content":"late"}}]}\n\n']
    ),
).map(b"".join)

STREAMS = _BROKEN | st.binary(max_size=60) | _CHUNK_STREAMS
"""Event streams, whole, broken, and none at all."""

CHAT_STREAMS = _CHUNK_STREAMS | st.tuples(_CHUNK_STREAMS, STREAMS).map(b"".join)
"""Streams that mostly are chat completions."""

CUTS = st.lists(st.integers(1, 1500), max_size=12)


def pieces_of(text: bytes, cuts: list[int]) -> list[bytes]:
    """Cut a text where it is drawn to be cut; positions beyond its end come round again."""
    return cut_at(text, [cut % (len(text) or 1) for cut in cuts])


def escaped(value: Any) -> bytes:
    """Write JSON with every character beyond ASCII as an escape, lone surrogates too."""
    return json.dumps(value).encode()
