"""Chunks that differ from an earlier one in one text alone, as nearly all chunks of a stream do.

A template is the bytes of a read around that text. A read that begins and ends like it, with a valid JSON string between,
is a valid chunk whose other members are known: only the string is decoded, and it is copied into the event unchanged.
Whether a read can serve as a template is not decided by rules of its own: the chunk reader reads a sample.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.model import ChunkDelta
from streamworker.stream.chunks import ChunkReader
from streamworker.stream.sse import EventStreamParser
from streamworker.stream.usage import Ledger
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.model import StreamItem

__all__ = ["ChunkTemplate", "decode_text", "learn_template"]

MAX_BYTES = 4096
"""Longest read that becomes a template: long reads are rare, and cost little per byte."""

_SAMPLE = "streamworker sample 9d1f"
_TEXT = re.compile(rb'"(content|reasoning_content|reasoning)": ?("(?:[^"\\]|\\.)*")')

decode_text = msgspec.json.Decoder(str).decode
"""Decode a JSON string. Raises ValueError if it is not one, or holds a lone surrogate."""


class ChunkTemplate(NamedTuple):
    """The bytes before and after the text, its quotes excluded; and what the reader makes of such a chunk."""

    head: bytes
    tail: bytes
    choice: int
    delta: tuple[bytes, bytes]
    """The encoded delta before and after the text, its quotes excluded."""
    is_reasoning: bool
    text: slice
    """Where in a read the text is, with its quotes."""


def learn_template(read: bytes) -> ChunkTemplate | None:
    """Return the template that one read gives; None if it holds anything but one chunk with one text and no other news."""
    if len(read) > MAX_BYTES or not read.startswith(b"data: {") or not read.endswith(b"}\n\n"):
        return None
    found = [match for match in _TEXT.finditer(read) if match[2] != b'""']
    if len(found) != 1:
        return None
    [match] = found
    member = match[1].decode()
    begin, end = match.span(2)
    head, tail = read[: begin + 1], read[end - 1 :]
    sample = _read_sample(read, head + _SAMPLE.encode() + tail)
    if sample is None or sample.delta.get(member) != _SAMPLE or sample.choice is None:
        return None
    before, found_sample, after = encode(sample.delta).partition(_SAMPLE.encode())
    rest: dict[str, Any] = {name: value for name, value in sample.delta.items() if name != member}
    if not found_sample or any(value is not None for name, value in rest.items() if name != "role"):
        return None
    text = slice(begin, end - len(read))
    return ChunkTemplate(head, tail, sample.choice, (before, after), member != "content", text)


def _read_sample(read: bytes, sample: bytes) -> ChunkDelta | None:
    """Return the one delta that the sample gives after the read itself; None if it gives anything else."""
    ledger = Ledger()
    parser, reader = EventStreamParser(), ChunkReader(ledger)
    results: list[Sequence[StreamItem]] = []
    for data in (read, sample):
        events = parser.feed(data)
        if len(events) != 1 or events[0].type != "message":
            return None
        results.append(reader.read(events[0]))
    usage, _, _ = ledger.settle(completed=True)
    [last] = results[1:]
    if usage is not None or len(last) != 1 or not isinstance(delta := last[0], ChunkDelta):
        return None
    is_plain = delta.finish_reason is None and delta.logprobs is delta.chunk is delta.extra is msgspec.UNSET
    return delta if is_plain and list(reader.finish_reasons.values()) == [None] else None
