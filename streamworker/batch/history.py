"""What Kafka has of a run from before this start: the lines that were submitted, and those whose records are deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.batch.errors import RunRefused
from streamworker.batch.identity import MAX_ROUND
from streamworker.batch.index import State
from streamworker.kafka.partitioner import partition_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.batch.identity import JobIds, JobRef
    from streamworker.batch.index import LineIndex
    from streamworker.batch.record import RunRecord
    from streamworker.batch.topics import RunTopics

__all__ = ["History"]


class History:
    """Sets the states of the lines of an index by the records of earlier starts."""

    def __init__(self, topics: RunTopics, index: LineIndex, ids: JobIds, record: RunRecord) -> None:
        self._topics = topics
        self._index = index
        self._ids = ids
        self._run = record.run
        self._start: Mapping[int, int] = record.offsets(topics.jobs)
        self._endings: Mapping[int, int] = record.offsets(topics.endings)
        self._lost_jobs: set[int] = set()
        self._lost_endings: set[int] = set()

    async def find_losses(self) -> None:
        """Find the partitions of which records were deleted since the run's first start. Raises KafkaError."""
        self._lost_jobs = await self._topics.lost(self._topics.jobs, self._start)
        self._lost_endings = await self._topics.lost(self._topics.endings, self._endings)

    async def next_round(self, round_: int) -> int:
        """Return the number of a new round: `round_`, unless a finished start of the same name has used it.

        Raises RunRefused if there is none. Raises KafkaError.
        """
        last = 0

        def note_round(ref: JobRef) -> None:
            nonlocal last
            last = max(last, ref.round)

        await self._topics.read_jobs(self._ids, self._start, note_round)
        if last < round_:
            return round_
        if last >= MAX_ROUND:
            raise RunRefused(
                f"the run {self._run} has had {last} rounds of --retry-failed: use another --batch-id"
            )
        return last + 1

    async def mark_submitted(self) -> None:
        """Mark the lines whose jobs are in the job topic. Raises KafkaError."""
        await self._topics.read_jobs(self._ids, self._start, self._mark)

    def _mark(self, ref: JobRef) -> None:
        index = self._index
        line = index.find(ref.digest)
        if line is None or ref.round < index.round(line):
            return
        if index.is_in(line, State.PENDING):
            index.set_state(line, State.SUBMITTED)
        if index.is_in(line, State.SUBMITTED):
            index.set_round(line, ref.round)

    def mark_unknown(self) -> int:
        """Mark the lines whose records may have been deleted: they may have been submitted, or have ended.

        Call it when the endings were read to their present end. Returns the number of these lines.
        """
        if not (self._lost_jobs or self._lost_endings):
            return 0
        index, topics = self._index, self._topics
        for line in index.lines_in(State.PENDING, State.SUBMITTED):
            key = self._ids.job_id(index.digest(line), index.round(line)).encode()
            lost, topic = (
                (self._lost_jobs, topics.jobs)
                if index.is_in(line, State.PENDING)
                else (self._lost_endings, topics.endings)
            )
            if partition_of(key, topics.partitions(topic)) in lost:
                index.set_state(line, State.UNKNOWN)
        return index.counts[State.UNKNOWN]

    def resubmit_unknown(self) -> None:
        """Mark the unknown lines as pending again, in a further round: their former ids may be in use."""
        for line in self._index.lines_in(State.UNKNOWN):
            self._index.set_state(line, State.PENDING)
            self._index.set_round(line, min(self._index.round(line) + 1, MAX_ROUND))
