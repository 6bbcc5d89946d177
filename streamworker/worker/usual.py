"""Publishes the deltas of reads that differ in their text alone, as nearly all reads of a stream do.

This is the worker's cost per delta. Everything that such reads have in common was prepared before, and is held by few
objects: with hundreds of streams, memory that is not in the processor's cache costs more than instructions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.ports import Series
    from streamworker.stream.completion import CompletionAssembler
    from streamworker.stream.template import ChunkTemplate, UsualReads
    from streamworker.worker.runner import Tools
    from streamworker.worker.timeouts import StreamTimeouts

__all__ = ["DELTAS_PER_TURN", "UsualDeltas"]

DELTAS_PER_TURN = 64
"""Deltas of one stream that are published before other tasks run: about a millisecond of work. One read may hold
thousands, and the group's heartbeats run on the same loop."""

_decode = msgspec.json.Decoder(dict).decode


class UsualDeltas:
    """Publishes the deltas of one attempt's usual reads."""

    __slots__ = (
        "_deltas_published",
        "_gather",
        "_max_bytes",
        "_now_ms",
        "_pattern",
        "_reads",
        "_series",
        "_sink",
        "_timeouts",
        "_upstream",
    )

    def __init__(
        self,
        tools: Tools,
        reads: UsualReads,
        timeouts: StreamTimeouts,
        series: Series,
        *,
        pattern: bytes,
        max_bytes: int,
        upstream: str,
        completion: CompletionAssembler | None,
    ) -> None:
        """`pattern` is what `EventWriter.text_pattern` returns. Reads of more than `max_bytes` are left to others."""
        self._reads = reads
        self._sink = tools.sink
        self._series = series
        self._pattern = pattern
        self._max_bytes = max_bytes
        self._now_ms = tools.clock.now_ms
        self._timeouts = timeouts
        self._deltas_published = tools.observer.deltas_published
        self._upstream = upstream
        self._gather = None if completion is None else _gatherer(completion, reads.template)

    def publish(self, data: bytes) -> bool:
        """Publish the deltas of a read, if they may go on now. If the result is false, nothing was done."""
        if len(data) > self._max_bytes or not self._sink.has_room:
            return False
        reads = self._reads
        seq = reads.seq
        text = reads.take(data)
        if text is None:
            return self._publish_several(data)
        size = self._series.publish(self._pattern % (seq, self._now_ms(), text))
        if self._gather is not None:
            self._gather(text)
        self._deltas_published(self._upstream, 1, size, self._timeouts.delta_came())
        return True

    def _publish_several(self, data: bytes) -> bool:
        """Publish the deltas of a read of several chunks, as a loop that is late receives them."""
        now_ms = self._now_ms()
        seq = self._reads.seq
        size = 0
        texts = self._reads.take_several(data, DELTAS_PER_TURN)
        for number, text in enumerate(texts, seq):
            size += self._series.publish(self._pattern % (number, now_ms, text))
            if self._gather is not None:
                self._gather(text)
        if texts:
            self._deltas_published(self._upstream, len(texts), size, self._timeouts.delta_came())
        return bool(texts)


def _gatherer(completion: CompletionAssembler, template: ChunkTemplate) -> Callable[[bytes], None]:
    """Return what adds a delta to a completion, by its text as a JSON string."""
    choice = template.choice
    before, after = template.delta[0][:-1], template.delta[1][1:]  # the text has its quotes
    return lambda text: completion.add(choice, _decode(before + text + after))
