"""Finds job records that repeat the id of an earlier one: a producer's retry, or a pipeline's resubmission.

A partition's ids are remembered in memory. The next owner of the partition reads them back from its log.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import KafkaError
from streamworker.progress.dedup import RecentIds
from streamworker.redaction import without_message
from streamworker.wire.job import is_rerun

if TYPE_CHECKING:
    from streamworker.model import ConsumerRecord, TopicPartition
    from streamworker.ports import Source
    from streamworker.worker.intake import Intake

__all__ = ["Duplicates"]

READ_BACK_BYTES = 64 << 20
"""Bytes of values read in one pass when a partition is opened. Beyond it, only the last ids are read."""

READ_BACK_S = 5.0
"""How long reading a partition's ids may delay its opening."""

log = structlog.get_logger()


class Duplicates:
    """Remembers the ids of the last `records` records of each partition; 0: of none."""

    def __init__(self, source: Source, intake: Intake, *, records: int) -> None:
        self._source = source
        self._intake = intake
        self._records = records

    async def read_back(self, partition: TopicPartition, offset: int) -> RecentIds:
        """Return the ids of the records before `offset`. A failure is logged, and the ids read so far count."""
        recent = RecentIds(self._records)
        start = max(0, offset - self._records)
        if start == offset:
            return recent
        try:
            async with asyncio.timeout(READ_BACK_S):
                await self._read(recent, partition, start, offset)
        except (KafkaError, TimeoutError) as error:
            reason = str(error) or f"not read within {READ_BACK_S:g} s"
            log.warning("partition.ids_not_read", partition=str(partition), reason=reason)
        return recent

    def remember(self, recent: RecentIds, record: ConsumerRecord) -> None:
        """Store the id of a record whose job is not run here: it has ended, or is open."""
        if not self._records:
            return
        try:
            job_id = self._intake.own_id(record)
        except Exception as error:  # a bug, which one record may trigger
            log.error("intake.crashed", at=str(record.at), exc_info=without_message(error))  # noqa: TRY400 - the text may repeat the prompt
            return
        if job_id is not None:
            recent.remember(job_id, record.at.offset)

    def check(self, recent: RecentIds, record: ConsumerRecord, job_id: str, *, has_begun: bool) -> int | None:
        """Return the offset of the earlier record that this one repeats, None if it is to run; store its id.

        A record with the header `streamworker-rerun` is never a duplicate. Neither is a job that has begun under an owner that did
        not know the earlier record: readers wait for its terminal event. The id that a record gets from its coordinates
        is not stored.
        """
        if job_id == str(record.at):
            return None
        must_run = has_begun or is_rerun(record.headers)
        earlier = None if must_run else recent.earlier(job_id, record.at.offset)
        recent.remember(job_id, record.at.offset)
        return earlier

    async def _read(self, recent: RecentIds, partition: TopicPartition, start: int, stop: int) -> None:
        """Read the ids of [start, stop). Where that is too much, skip to the last records: retries repeat those."""
        reached = await self._read_some(recent, partition, start, stop)
        if reached < stop:
            reason = f"the records have more than {READ_BACK_BYTES} bytes"
            log.warning("partition.ids_not_read", partition=str(partition), reason=reason)
            fits = max(1, (reached - start) // 2)
            await self._read_some(recent, partition, max(reached, stop - fits), stop)

    async def _read_some(self, recent: RecentIds, partition: TopicPartition, start: int, stop: int) -> int:
        """Read ids until `stop` or READ_BACK_BYTES; return the first offset that was not read."""
        size = 0
        async with aclosing(self._source.read_back(partition, start, stop)) as batches:
            async for batch in batches:
                for record in batch:
                    size += len(record.value or b"")
                    if size > READ_BACK_BYTES:
                        return record.at.offset
                    self.remember(recent, record)
        return stop
