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

__all__ = ["ChunkTemplate", "UsualReads", "learn_template"]

MAX_BYTES = 4096
"""Longest read that becomes a template: long reads are rare, and cost little per byte."""

_SAMPLE = "streamworker sample 9d1f"
_TEXT = re.compile(rb'"(content|reasoning_content|reasoning)": ?("(?:[^"\\]|\\.)*")')

_decode_text = msgspec.json.Decoder(str).decode
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


class UsualReads:
    """Takes the reads of a stream that fit a template. It is used for nearly every delta, so it counts as little as it can.

    The ledger gets its counts by `settle`.
    """

    __slots__ = (
        "_chars",
        "_extra_bytes",
        "_extra_utf8",
        "_head",
        "_keep",
        "_ledger",
        "_settled",
        "_tail",
        "_text",
        "is_over",
        "seq",
        "template",
    )

    def __init__(self, template: ChunkTemplate, ledger: Ledger, seq: int) -> None:
        """`seq` is that of the next event."""
        self.template = template
        self.seq = self._settled = seq
        self.is_over = False
        """Whether no read is taken any more."""
        self._ledger = ledger
        self._head, self._tail, self._text = template.head, template.tail, template.text
        self._keep = ledger.keep if ledger.keeps_text else None
        self._chars = 0
        self._extra_bytes = 0  # of escapes and UTF-8: the text as it was sent is longer than its characters
        self._extra_utf8 = 0

    def take(self, data: bytes) -> bytes | None:
        """Take a read that differs from the template in its text alone; return that text as a JSON string.

        It counts as published with the `seq` that `seq` was before. If the result is None, nothing was done.
        """
        if self.is_over or not (data.startswith(self._head) and data.endswith(self._tail)):
            return None
        text = data[self._text]
        try:
            decoded = _decode_text(text)
        except ValueError:
            return None
        self._count(text, decoded)
        return text

    def take_several(self, data: bytes, limit: int) -> list[bytes]:
        """Take a read of several chunks, each of which differs from the template in its text alone; return their texts.

        They count as published from the `seq` on that `seq` was before. If the result is empty, because there are other
        chunks or more than `limit`, nothing was done.
        """
        if self.is_over or not (data.startswith(self._head) and data.endswith(self._tail)):
            return []
        # The end of one chunk and the beginning of the next contain quotes, so they cannot be part of a valid text.
        between = self._tail + self._head
        texts = [b'"%b"' % text for text in data[len(self._head) : -len(self._tail)].split(between, limit)]
        if not 1 < len(texts) <= limit:
            return []
        try:
            decoded = [_decode_text(text) for text in texts]
        except ValueError:
            return []
        for text, characters in zip(texts, decoded, strict=True):
            self._count(text, characters)
        return texts

    def _count(self, text: bytes, decoded: str) -> None:
        size = len(decoded)
        self.seq += 1
        self._chars += size
        if size != len(text) - 2:  # it has escapes, or characters beyond ASCII
            utf8 = decoded.encode("utf-8", "replace")
            self._extra_bytes += len(text) - 2 - size
            self._extra_utf8 += len(utf8) - size
            if self._keep is not None:
                self._keep(utf8)
        elif self._keep is not None:
            self._keep(text[1:-1])

    def settle(self) -> None:
        """Add what was taken since the last time to the ledger."""
        count = self.seq - self._settled
        if not count:
            return
        self._settled = self.seq
        chars, self._chars = self._chars, 0
        extra_bytes, self._extra_bytes = self._extra_bytes, 0
        extra_utf8, self._extra_utf8 = self._extra_utf8, 0
        self._ledger.count_texts(
            count,
            chars,
            size=count * (len(self._head) + len(self._tail)) + chars + extra_bytes,
            utf8=chars + extra_utf8,
            is_reasoning=self.template.is_reasoning,
        )


def learn_template(read: bytes) -> ChunkTemplate | None:
    """Return the template that one read gives; None if it holds anything but one chunk with one text and nothing else that is new."""
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
