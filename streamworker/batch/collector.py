"""Collect the endings of a run's jobs, and complete those that a record does not hold whole."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.batch.submission import request_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.batch.identity import JobIds, JobRef
    from streamworker.batch.ledger import Ledger
    from streamworker.batch.output import EndedJob
    from streamworker.batch.ports import BatchInput, BatchOutput
    from streamworker.batch.topics import RunTopics

__all__ = ["Collector"]

PAUSE_BYTES = 16 << 20
"""Unwritten output at which no further records are fetched."""


class Collector:
    """Passes endings to a ledger."""

    def __init__(
        self,
        ledger: Ledger,
        source: BatchInput,
        output: BatchOutput,
        topics: RunTopics,
        ids: JobIds,
        start: Mapping[int, int],
    ) -> None:
        """`start` has the offsets from which the topic of endings is read."""
        self._ledger = ledger
        self._source = source
        self._output = output
        self._topics = topics
        self._follower = topics.follower(ids, start, self._wants, self._take)
        self._incomplete: asyncio.Queue[tuple[int, EndedJob]] = asyncio.Queue()
        self._held: dict[int, tuple[int, int]] = {}  # line -> partition and offset of its ending
        self._is_paused = False

    @property
    def crashed(self) -> asyncio.Future[None]:
        """Fails if the reader of the topic does."""
        return self._follower.tail.crashed

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        await self._follower.tail.start()

    async def stop(self) -> None:
        """Close the reader. Bounded in time; never raises."""
        await self._follower.tail.stop()

    def has_reached(self, ends: Mapping[int, int]) -> bool:
        """Whether every partition was read to these offsets, and all endings before them are written."""
        positions = self._follower.tail.positions
        return not self._held and all(positions.get(partition, 0) >= end for partition, end in ends.items())

    def positions(self) -> dict[int, int]:
        """Return the offsets from which a later run must read, by partition."""
        positions = self._follower.positions()
        for partition, offset in self._held.values():
            positions[partition] = min(positions[partition], offset)
        return positions

    def relieve(self) -> None:
        """Fetch again after the output was flushed."""
        if self._is_paused and self._output.buffered < PAUSE_BYTES // 4:
            self._is_paused = False
            for partition in self._follower.tail.positions:
                self._follower.tail.resume(partition)

    async def complete(self) -> None:
        """Complete endings without end: read what a record omits from the events, and a missing custom id from the input."""
        while True:
            line, job = await self._incomplete.get()
            if job.omitted:
                job = await self._topics.read_completion(job)
            custom_id = job.metadata.get("custom_id")
            if custom_id is None:
                custom_id = (await request_at(self._ledger, self._source, line)).custom_id
            del self._held[line]
            self._ledger.end(line, custom_id, job)
            self._relieve_later()

    def _wants(self, ref: JobRef) -> bool:
        return self._ledger.line_of(ref) is not None

    def _take(self, ref: JobRef, job: EndedJob, partition: int, offset: int) -> None:
        line = self._ledger.line_of(ref)
        if line is None or line in self._held:
            return
        custom_id = job.metadata.get("custom_id")
        if job.omitted or custom_id is None:
            self._held[line] = (partition, offset)
            self._incomplete.put_nowait((line, job))
            return
        self._ledger.end(line, custom_id, job)
        self._relieve_later()

    def _relieve_later(self) -> None:
        if not self._is_paused and self._output.buffered > PAUSE_BYTES:
            self._is_paused = True
            for partition in self._follower.tail.positions:
                self._follower.tail.pause(partition)
