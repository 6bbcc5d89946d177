"""A run's records in Kafka: where they begin, which of its jobs were submitted, and how its jobs ended."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.batch.follow import MAX_COMPLETION_BYTES, EventFollower, ResultFollower, ended_job
from streamworker.errors import KafkaRefused
from streamworker.kafka.scan import LogScanner
from streamworker.kafka.submitter import PlainSubmitter, TransactionalSubmitter
from streamworker.model import TopicPartition
from streamworker.reader import EventReader, Notice
from streamworker.stream.completion import CompletionAssembler
from streamworker.wire.event import read_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamworker.batch.follow import Ending
    from streamworker.batch.identity import JobIds, JobRef
    from streamworker.batch.output import EndedJob
    from streamworker.config import Settings

__all__ = ["RunTopics"]


class RunTopics:
    """The job topic and the topic of endings of one run."""

    def __init__(self, settings: Settings, jobs: str, transactional_id: str) -> None:
        self.jobs = jobs
        self.endings = settings.topics.results or settings.topics.events
        self.has_results = bool(settings.topics.results)
        self.jobs_positions: dict[int, int] = {}
        """The offset after the last record that was read or written, by partition."""
        self._settings = settings
        self._id = transactional_id
        self._scanner = LogScanner(settings.kafka)
        self._partitions: dict[str, int] = {}
        self.submitter: PlainSubmitter | None = None

    @property
    def names(self) -> dict[str, str]:
        """The topics, as the run's record names them."""
        return {"jobs": self.jobs, "results" if self.has_results else "events": self.endings}

    def partitions(self, topic: str) -> int:
        """Return the number of partitions of one of the topics."""
        return self._partitions[topic]

    async def open(self) -> None:
        """Connect, and read the numbers of partitions. Raises KafkaError."""
        for topic in (self.jobs, self.endings):
            self._partitions[topic] = await self._scanner.partitions(topic)

    async def close(self) -> None:
        """Close the connections. Bounded in time; never raises."""
        await asyncio.gather(*([self.submitter.close()] if self.submitter else []), self._scanner.stop())

    async def fence(self) -> None:
        """Open the producer; the former one of the run is fenced. Raises KafkaError."""
        if self.submitter is None:
            settings, partitions = self._settings, self._partitions[self.jobs]
            if settings.worker.delivery == "exactly_once":
                self.submitter = TransactionalSubmitter(settings.kafka, self.jobs, partitions, self._id)
            else:
                self.submitter = PlainSubmitter(settings.kafka, self.jobs, partitions)
        await self.submitter.open()

    async def ends(self, topic: str) -> dict[int, int]:
        """Return the end of each partition, open transactions included. Raises KafkaError."""
        return {p.partition: await self._scanner.end(p, committed_only=False) for p in self._of(topic)}

    async def beginnings(self, topic: str) -> dict[int, int]:
        """Return the first offset of each partition. Raises KafkaError."""
        return {p.partition: await self._scanner.beginning(p) for p in self._of(topic)}

    async def lost(self, topic: str, start: Mapping[int, int]) -> set[int]:
        """Return the partitions whose records from `start` on are not all there: deleted, or the topic is another one."""
        beginnings, ends = await self.beginnings(topic), await self.ends(topic)
        return {
            partition
            for partition, offset in start.items()
            if not beginnings.get(partition, 0) <= offset <= ends.get(partition, -1)
        }

    async def read_jobs(self, ids: JobIds, start: Mapping[int, int], found: Callable[[JobRef], None]) -> None:
        """Call `found` for each job of the run in the job topic, from `start` to its present end. Raises KafkaError.

        The end includes open transactions: those of other programs are waited for, because committed records of this
        run may be behind them.
        """
        ends = await self.ends(self.jobs)
        await asyncio.gather(
            *(
                self._read_partition(ids, p, start.get(p.partition, 0), ends[p.partition], found)
                for p in self._of(self.jobs)
            )
        )
        self.jobs_positions = ends

    async def _read_partition(
        self, ids: JobIds, partition: TopicPartition, start: int, end: int, found: Callable[[JobRef], None]
    ) -> None:
        start = max(start, await self._scanner.beginning(partition))
        async with aclosing(self._scanner.scan(partition, start, end, committed_only=True)) as batches:
            async for records in batches:
                for record in records:
                    if record.value is not None and (ref := ids.read(record.key)) is not None:
                        found(ref)

    async def submit(self, records: list[tuple[bytes, bytes]]) -> None:
        """Write a chunk of jobs. Raises as the submitter's `submit` does."""
        assert self.submitter is not None
        self.jobs_positions |= await self.submitter.submit(records)

    def follower(
        self, ids: JobIds, start: Mapping[int, int], wants: Callable[[JobRef], bool], on_ending: Ending
    ) -> ResultFollower | EventFollower:
        """Return a follower of the endings, not started."""
        kind = ResultFollower if self.has_results else EventFollower
        return kind(self._settings.kafka, self.endings, start, ids, wants=wants, on_ending=on_ending)

    async def events_written(self) -> int:
        """Return a number that grows while any worker writes events. Raises KafkaError."""
        topic = self._settings.topics.events
        if topic not in self._partitions:
            self._partitions[topic] = await self._scanner.partitions(topic)
        return sum((await self.ends(topic)).values())

    async def read_completion(self, job: EndedJob) -> EndedJob:
        """Return the job with the completion of its events; the same job where they are deleted. Raises KafkaError."""
        if job.events is None:
            return job
        at = TopicPartition(job.events.topic, job.events.partition)
        try:
            end = await self._scanner.end(at, committed_only=True)
            if await self._scanner.beginning(at) > job.events.offset:
                return job
            return await self._assembled(job, at, job.events.offset, end)
        except KafkaRefused:  # the topic does not exist any more
            return job

    async def _assembled(self, job: EndedJob, at: TopicPartition, start: int, end: int) -> EndedJob:
        reader, assembler = EventReader(), CompletionAssembler(limit_bytes=MAX_COMPLETION_BYTES)
        key = job.job_id.encode()
        async with aclosing(self._scanner.scan(at, start, end, committed_only=True)) as batches:
            async for records in batches:
                for record in records:
                    if record.key != key or record.value is None:
                        continue
                    event: dict[str, Any] = read_event(record.value)
                    if any(reading.notice is Notice.VALID for reading in reader.read(event)):
                        assembler.read(event)
                        if event["type"] == "usage" and event["attempt"] == job.attempt:
                            whole = ended_job(event, assembler)
                            return msgspec.structs.replace(job, completion=whole.completion, omitted=[])
        return job

    def _of(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(topic, number) for number in range(self._partitions[topic])]
