"""Commits the progress of one assigned partition, one short commit after another.

A commit has the entries that wait: `started` events of jobs that begin, terminal events of jobs that ended, dead
letters, and the partition's offset with its map. So a terminal event and its offset are committed together or not at
all, and the number of deliveries is committed with `started`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import structlog

from streamworker.errors import KafkaError, MetadataTooLarge, RecordTooLarge
from streamworker.progress.offset_map import LIMIT, Damaged, OffsetMap, decode_map
from streamworker.progress.partition import PartitionProgress
from streamworker.redaction import without_message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.model import ProducerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStore

__all__ = ["PartitionCommitter"]

MAX_COMMIT_RECORDS = 500
"""Entries of one commit. A transaction blocks read_committed readers, so it stays short."""

MAX_COMMIT_BYTES = 1 << 20
"""Bytes of one commit's records; a commit has at least one entry, however large."""

_REFUSED_BACKOFF_S = 5.0
_METADATA_BACKOFF_S = 0.1

STALLED_S = 5.0
"""How long a commit may take before its partition accepts and starts no more jobs, and the worker is not ready."""

log = structlog.get_logger()


class _Entry(NamedTuple):
    offset: int | None  # finished by this entry's records, and committed with them
    records: Sequence[ProducerRecord]
    fallback: Sequence[ProducerRecord]
    done: asyncio.Future[int | None]

    @property
    def size(self) -> int:
        return sum(record.size for record in self.records)


class PartitionCommitter:
    """Open it, run `run` as a task, and add entries.

    `lost` is called once, when another worker owns the partition.
    """

    def __init__(
        self,
        partition: TopicPartition,
        committer: CommitStore,
        *,
        commit_id: str,
        metadata_limit: int = LIMIT,
        lost: Callable[[str], None],
        observer: Observer | None = None,
    ) -> None:
        self.partition = partition
        self._committer = committer
        self._commit_id = commit_id
        self._metadata_limit = metadata_limit
        self._lost = lost
        self._observer = observer
        self._busy_since: float | None = None
        self._progress: PartitionProgress | None = None
        self._waiting: list[_Entry] = []
        self._under_way: list[_Entry] = []
        self._filled = asyncio.Event()
        self._succeeded = asyncio.Event()

    async def open(self) -> int:
        """Fence the former owner; return the offset to read from. Raises KafkaError."""
        committed, metadata = await self._committer.open()
        try:
            offset_map = decode_map(committed, metadata)
        except Damaged as fault:
            log.warning("commit.offset_map_ignored", partition=str(self.partition), reason=str(fault))
            offset_map = OffsetMap()
        self._progress = PartitionProgress(
            committed, offset_map, commit_id=self._commit_id, limit=self._metadata_limit
        )
        return committed

    @property
    def backlog(self) -> int:
        """Entries that wait for a commit."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be committed, and no commit is under way."""
        return not self._waiting and not self._under_way

    @property
    def is_stalled(self) -> bool:
        """Whether the commit under way has failed, or not been answered, for longer than `STALLED_S`."""
        return self.busy_s > STALLED_S

    async def flowing(self) -> None:
        """Wait until commits succeed again. While they fail, a new call would be paid and could not be recorded."""
        while self.is_stalled:
            self._succeeded.clear()
            await self._succeeded.wait()

    @property
    def busy_s(self) -> float:
        """Seconds since the commit in progress began; 0 if there is none."""
        return 0.0 if self._busy_since is None else asyncio.get_running_loop().time() - self._busy_since

    @property
    def is_open(self) -> bool:
        """Whether `open` has returned, so that there is a `progress`."""
        return self._progress is not None

    @property
    def progress(self) -> PartitionProgress:
        """The partition's progress. Raises RuntimeError before `open` has returned."""
        if self._progress is None:
            raise RuntimeError(f"the committer of {self.partition} is not open")
        return self._progress

    def start(self, record: ProducerRecord) -> asyncio.Future[int | None]:
        """Write a `started` event; the future is done when it is durable, with its offset if that is known."""
        return self._add(None, [record])

    def finish(
        self, offset: int, records: Sequence[ProducerRecord], *, fallback: Sequence[ProducerRecord] = ()
    ) -> asyncio.Future[int | None]:
        """Write the records that end a job and commit its offset with them; the future is done when they are durable.

        `fallback` replaces `records` where the broker refuses them for their size.
        """
        return self._add(offset, records, fallback)

    def touch(self) -> asyncio.Future[int | None]:
        """Commit the progress without records."""
        return self._add(None, ())

    async def run(self) -> None:
        """Commit waiting entries until cancelled, or until the partition is lost."""
        while True:
            await self._filled.wait()
            count = self._portion()
            entries, self._waiting = self._waiting[:count], self._waiting[count:]
            self._under_way = entries
            if not self._waiting:
                self._filled.clear()
            try:
                await self._commit(entries)
            except KafkaError as error:
                self._lost(str(error))
                return
            finally:
                self._busy_since = None
                self._succeeded.set()
            self._under_way = []

    async def close(self) -> None:
        """Cancel all entries and close the store. Waiting entries are not written; those in progress may be."""
        for entry in (*self._under_way, *self._waiting):
            entry.done.cancel()
        self._waiting.clear()
        await self._committer.close()

    def _portion(self) -> int:
        """Return the number of waiting entries for the next commit."""
        total = 0
        for count, entry in enumerate(self._waiting[:MAX_COMMIT_RECORDS]):
            total += entry.size
            if total > MAX_COMMIT_BYTES and count:
                return count
        return min(len(self._waiting), MAX_COMMIT_RECORDS)

    def _report(self, entries: list[_Entry], busy_s: float) -> None:
        """Notify the observer of a durable commit; an exception there must not repeat the commit or end the worker."""
        if self._observer is None:
            return
        try:
            self._observer.committed([record for entry in entries for record in entry.records], busy_s)
        except Exception as error:
            log.error("telemetry.failed", exc_info=without_message(error))  # noqa: TRY400 - without the exception's text
            with suppress(Exception):
                self._observer.telemetry_failed()

    def _add(
        self, offset: int | None, records: Sequence[ProducerRecord], fallback: Sequence[ProducerRecord] = ()
    ) -> asyncio.Future[int | None]:
        done: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(offset, records, fallback, done))
        self._filled.set()
        return done

    async def _commit(self, entries: list[_Entry]) -> None:
        """Commit the entries; where the broker refuses them for their size, in halves.

        An entry that is refused alone is replaced by its fallback.
        """
        self._busy_since = asyncio.get_running_loop().time()
        while True:
            try:
                offsets = await self._write(entries)
            except RecordTooLarge as refusal:
                facts = {"partition": str(self.partition), "entries": len(entries), "reason": str(refusal)}
                log.error("commit.record_refused", **facts)  # noqa: TRY400 - not a bug, so without a trace
                if len(entries) > 1:
                    middle = len(entries) // 2
                    await self._commit(entries[:middle])
                    await self._commit(entries[middle:])
                    return
                if entries[0].fallback:
                    entries = [entries[0]._replace(records=entries[0].fallback, fallback=())]
                else:
                    # The topic accepts less than at the start. Nothing is skipped, and no job is run again, which would
                    # be paid for again: the commit waits until the topic's limit is raised.
                    await asyncio.sleep(_REFUSED_BACKOFF_S)
            except MetadataTooLarge as refusal:
                limit = self.progress.metadata_refused()
                facts = {"partition": str(self.partition), "limit": limit, "reason": str(refusal)}
                log.error("commit.metadata_refused", **facts)  # noqa: TRY400 - not a bug, so without a trace
                await asyncio.sleep(_METADATA_BACKOFF_S)
            else:
                self._settle(entries, offsets)
                return

    async def _write(self, entries: list[_Entry]) -> Sequence[int | None]:
        """Commit the entries at once, and mark what they finish as finished; return the offsets of their records."""
        finishing = [entry.offset for entry in entries if entry.offset is not None]
        point = self.progress.point(finishing=finishing)
        if self.progress.is_cut:
            log.error("commit.offset_map_cut", partition=str(self.partition), size=self.progress.map_size)
        offsets = await self._committer.commit(
            [record for entry in entries for record in entry.records], point
        )
        for offset in finishing:
            self.progress.finish(offset)
        return offsets

    def _settle(self, entries: list[_Entry], offsets: Sequence[int | None]) -> None:
        """Report a durable commit to those that wait for it, and to the observer."""
        busy_s, self._busy_since = self.busy_s, None
        self._succeeded.set()
        for entry in entries:
            if not entry.done.done():
                entry.done.set_result(offsets[0] if entry.records and offsets else None)
            offsets = offsets[len(entry.records) :]
        self._report(entries, busy_s)
