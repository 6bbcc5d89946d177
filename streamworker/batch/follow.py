"""Follow the endings of a run's jobs: in the results topic, or in the events topic with an assembler per job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import structlog

from streamworker.batch.output import EndedJob, read_result
from streamworker.kafka.tail import TopicTail
from streamworker.reader import EventReader, Notice
from streamworker.stream.completion import CompletionAssembler
from streamworker.wire.event import read_event
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from streamworker.batch.identity import JobIds, JobRef
    from streamworker.config import KafkaSettings
    from streamworker.kafka.clients import FetchedRecord

__all__ = ["MAX_COMPLETION_BYTES", "EventFollower", "Follower", "ResultFollower", "ended_job"]

MAX_COMPLETION_BYTES = 64 << 20
"""Largest completion that is assembled here."""

log = structlog.get_logger()

T = TypeVar("T")


class Ending(Protocol):
    """What a follower calls with each ending: the job, how it ended, and the record's partition and offset."""

    def __call__(self, ref: JobRef, job: EndedJob, partition: int, offset: int) -> None: ...


class Follower(Protocol):
    """Reads a topic from given offsets on."""

    tail: TopicTail

    def positions(self) -> dict[int, int]:
        """Return the offsets from which a later run must read, by partition."""


class ResultFollower:
    """Follows the results topic: one record per ending."""

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        start: Mapping[int, int],
        ids: JobIds,
        *,
        wants: Callable[[JobRef], bool],
        on_ending: Ending,
    ) -> None:
        """`wants(ref)` is asked before a record is decoded."""
        self.tail = TopicTail(settings, topic, self._read, committed_only=True, start=start)
        self._ids = ids
        self._wants = wants
        self._on_ending = on_ending

    def positions(self) -> dict[int, int]:
        """Return the offsets from which a later run must read."""
        return dict(self.tail.positions)

    def _read(self, partition: int, records: Sequence[FetchedRecord], _: int) -> None:
        for ref, job, offset in _decoded(partition, records, self._ids, self._wants, read_result):
            self._on_ending(ref, job, partition, offset)


class EventFollower:
    """Follows the events topic. Memory: the completions of the jobs that have started and not ended."""

    def __init__(
        self,
        settings: KafkaSettings,
        topic: str,
        start: Mapping[int, int],
        ids: JobIds,
        *,
        wants: Callable[[JobRef], bool],
        on_ending: Ending,
    ) -> None:
        self.tail = TopicTail(settings, topic, self._read, committed_only=True, start=start)
        self._ids = ids
        self._wants = wants
        self._on_ending = on_ending
        self._reader = EventReader(remembered=1000)
        self._open: dict[
            str, tuple[CompletionAssembler, int, int]
        ] = {}  # with partition and offset of `started`

    def positions(self) -> dict[int, int]:
        """Return the offsets from which a later run must read: the first events of the jobs that have not ended."""
        positions = dict(self.tail.positions)
        for _, partition, offset in self._open.values():
            positions[partition] = min(positions[partition], offset)
        return positions

    def _read(self, partition: int, records: Sequence[FetchedRecord], _: int) -> None:
        for ref, event, offset in _decoded(partition, records, self._ids, self._wants, read_event):
            for reading in self._reader.read(event):
                if reading.notice is Notice.VALID:
                    self._add(ref, event, partition, offset)

    def _add(self, ref: JobRef, event: dict[str, Any], partition: int, offset: int) -> None:
        job_id = event["job_id"]
        if event["type"] == "started" or job_id not in self._open:
            first = self._open[job_id][2] if job_id in self._open else offset
            self._open[job_id] = (CompletionAssembler(limit_bytes=MAX_COMPLETION_BYTES), partition, first)
        assembler = self._open[job_id][0]
        assembler.read(event)
        if event["type"] == "usage":
            del self._open[job_id]
            self._on_ending(ref, ended_job(event, assembler), partition, offset)


def _decoded(
    partition: int,
    records: Sequence[FetchedRecord],
    ids: JobIds,
    wants: Callable[[JobRef], bool],
    read: Callable[[bytes], T],
) -> Iterator[tuple[JobRef, T, int]]:
    """Yield job, value and offset of the records of a run's jobs. A value that cannot be read is logged."""
    for record in records:
        ref = ids.read(record.key)
        if ref is None or record.value is None or not wants(ref):
            continue
        try:
            value = read(record.value)
        except ValueError as error:
            log.warning("batch.record_ignored", at=f"{partition}-{record.offset}", reason=str(error))
            continue
        yield ref, value, record.offset


def ended_job(event: Mapping[str, Any], assembler: CompletionAssembler) -> EndedJob:
    """Return the ending of a job from its terminal event and the completion of its deltas."""
    completion = assembler.completion(load=msgspec.Raw)
    return EndedJob(
        job_id=event["job_id"],
        attempt=event["attempt"],
        status=event["status"],
        usage=event.get("usage"),
        usage_source=event["usage_source"],
        error=event.get("error"),
        metadata=event.get("metadata") or {},
        completion=msgspec.Raw(encode(completion)),
    )
